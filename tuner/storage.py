"""Where the ledger lies: a relational database, opened with care and waited for when it is out.

A server that restarts, a network that fails or a lock that is held are no reason to lose a study.
Whatever Optuna asks of the database is asked again until it answers, for
PATIENCE at most; here and nowhere else. An answer may be all that was lost: what cannot simply be
done twice first looks whether it has been done.
"""

from __future__ import annotations

import abc
import inspect
import logging
import os
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from model.files import PART, sync
from tuner.duration import format_duration
from tuner.errors import LedgerLost, StudyError

if TYPE_CHECKING:
    from sqlalchemy.engine import URL, ExceptionContext

    from tuner.claim import Claim
    from tuner.rdb import BatchedStorage

logger = logging.getLogger(__name__)

PATIENCE = 300.0  # seconds that an outage may last
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds between two attempts: doubled each time
_RENEW_EVERY = 60.0  # seconds: a claim that is not used can go without a word
_SILENCE = 1.0  # seconds of an outage that nobody needs to be told of
_SIGNATURE = "ristune:driver"
_OPENINGS = 3  # of a database: others may be making its tables, or its server be restarting
_TABLES = {"studies", "trials", "version_info", "alembic_version"}  # Optuna's first ones and last

_DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
_DIALECTS = ("postgresql", "sqlite")
_SECRETS = ("password", "passwd", "pwd", "passcode")
# A connection of which nothing is heard is given up in a minute; the system's own limit is hours.
_LIBPQ: dict[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}
_SQLITE = {"timeout": 60}
_SQLITE_PASSING = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
    }
)

_T = TypeVar("_T")


# No room on the disk, or, as SQLite says it of a file that may not grow, no writing.
_SQLITE_NO_ROOM = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE})


class Outage(Exception):
    """The database does not answer, or cannot write, just now.

    Args:
        text: what it said.
        no_room: whether its disk, which is the run folder's too, is full: waiting makes no room.
    """

    def __init__(self, text: str, *, no_room: bool = False) -> None:
        super().__init__(text)
        self.no_room = no_room


def parse_url(text: str) -> URL:
    """The URL of a database, with the driver that is installed with ristune.

    Raises:
        ValueError: no URL, another kind of database, a password, or a database in memory.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ValueError("is no URL of a database; expected postgresql://USER@HOST/NAME") from None
    # SQLAlchemy takes what follows a bracket for a part of the host's name.
    secrets = [key for key in url.query if any(word in key.lower() for word in _SECRETS)]
    if url.password is not None or secrets:
        raise ValueError(
            "the URL holds a password, which would end up in files and logs; leave it out and put "
            "it into ~/.pgpass or PGPASSWORD"
        )
    url = url.set(drivername=_DRIVERS.get(url.drivername, url.drivername))
    if url.get_backend_name() not in _DIALECTS:
        raise ValueError(
            f"the ledger cannot lie in {url.get_backend_name()}; expected "
            "postgresql://USER@HOST/NAME or sqlite:////PATH"
        )
    if url.get_backend_name() == "sqlite":
        if url.database in (None, "", ":memory:") or "mode" in url.query:
            raise ValueError("a ledger in memory is no record; name a file: sqlite:////PATH")
        return url.set(database=str(Path(str(url.database)).expanduser().absolute()))
    return url


def sqlite_url(database: Path) -> URL:
    """The URL of a SQLite file, whatever its path is made of."""
    from sqlalchemy.engine import URL

    return URL.create("sqlite", database=str(database))


def connect_args(url: URL) -> dict[str, Any]:
    """What bounds the waiting for this database, except what the URL itself says."""
    if url.get_backend_name() == "sqlite":
        return dict(_SQLITE)
    if url.get_driver_name() in ("psycopg", "psycopg2"):
        return {key: value for key, value in _LIBPQ.items() if key not in url.query}
    return {}


def open_storage(url: URL) -> PatientStorage:
    """Connect to a database and make its tables if there are none.

    Raises:
        StudyError: in one line, after some ten seconds at most for a server that does not answer.
    """
    from sqlalchemy import event

    place = shown(url)

    def opened() -> BatchedStorage:
        if url.get_backend_name() == "sqlite":
            _make_sqlite(Path(str(url.database)))
        return _opened(url)

    rdb = _tried(place, opened)
    event.listen(rdb.engine, "handle_error", as_outage)
    cached = optuna.storages.get_storage(rdb)
    # The rest of its methods is put in below the class, where mypy does not look.
    return PatientStorage(cached, place, rdb.engine.dispose)  # type: ignore[abstract]


def has_tables(url: URL) -> bool:
    """Whether a database can hold studies as it is; it is asked, and left so.

    Raises:
        StudyError: in one line; nobody answers, or a SQLite file has no folder to lie in.
    """
    from sqlalchemy import create_engine, inspect
    from sqlalchemy.pool import NullPool

    place = shown(url)
    if url.get_backend_name() == "sqlite" and not (file := Path(str(url.database))).exists():
        if not file.parent.is_dir():
            raise StudyError(f"the ledger at {place} cannot be opened: no folder {file.parent}")
        return False

    def looked() -> bool:
        engine = create_engine(url, poolclass=NullPool, connect_args=connect_args(url))
        with engine.connect() as connection:
            return set(inspect(connection).get_table_names()) >= _TABLES

    return _tried(place, looked)


def _tried(place: str, work: Callable[[], _T]) -> _T:
    """What `work` returns, begun anew where its beginning was disturbed.

    Two studies that begin at the same time in an empty database make the same tables; and a server
    that has answered may end the connection before all has been asked over it.

    Raises:
        StudyError: in one line; it was disturbed each time, or cannot be done.
    """
    from sqlalchemy.exc import DBAPIError

    begun = time.monotonic()
    with _refused(place):
        for _ in range(_OPENINGS - 1):
            try:
                return work()
            except (DBAPIError, optuna.exceptions.StorageInternalError) as error:
                late = time.monotonic() - begun > _LONGEST_PAUSE  # what has waited is not disturbed
                if late or not _was_asked(error):
                    raise
                time.sleep(_FIRST_PAUSE)
        return work()


def _was_asked(error: BaseException | None) -> bool:
    """Whether a database had been reached when this happened.

    What a lost connection raises last is that nothing can be rolled back over it.
    """
    while error is not None:
        if getattr(error, "statement", None):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _refused(place: str) -> Iterator[None]:
    """Say in one line why a database cannot be opened."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except ImportError as error:
        raise StudyError(
            f"the ledger at {place}: its driver is not installed ({_first_line(error)}); "
            "pip install 'ristune[postgresql]'"
        ) from error
    except (SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:
        raise StudyError(f"the ledger at {place} cannot be opened: {_first_line(error)}") from error


def _opened(url: URL) -> BatchedStorage:
    from tuner.rdb import BatchedStorage

    # Braces are a template's to Optuna.
    text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    return BatchedStorage(text, engine_kwargs={"connect_args": connect_args(url)})


def _make_sqlite(path: Path) -> None:
    """Make a SQLite file with Optuna's tables, whole or not at all, where there is none.

    Optuna makes table after table, each with its indexes, and of tables that are there it makes no
    index any more. In a file whose making a full disk or a power cut ended amid, studies may lack
    the one that keeps their names apart, and every session would begin a study of its own.
    """
    if path.exists() or not path.parent.is_dir():  # what is wrong there is said when it is opened
        return
    with suppress(OSError), ExitStack() as stack:
        beside = TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
        fresh = Path(stack.enter_context(beside)) / path.name
        _opened(sqlite_url(fresh)).engine.dispose()
        sync(fresh)
        # Not by renaming: another study may have made it meanwhile, and begun. A file system
        # without hard links has it made in its place.
        os.link(fresh, path)
        sync(path.parent)


def shown(url: URL) -> str:
    """A database as users know it."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    return url.render_as_string()


def as_outage(context: ExceptionContext) -> Exception | None:
    """What SQLAlchemy raises in place of an error that will pass; None leaves the error as it is.

    It is no error of SQLAlchemy's: Optuna would wrap that, or try by itself to make a trial again.
    """
    error = context.original_exception
    if isinstance(error, sqlite3.Error):
        # The low byte is the kind, the rest its shade.
        code = getattr(error, "sqlite_errorcode", 0)
        if code in _SQLITE_NO_ROOM:
            return Outage(_first_line(error), no_room=True)
        passing = code & 0xFF in _SQLITE_PASSING
    else:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        passing = context.is_disconnect or bool({"OperationalError", "InterfaceError"} & {*kinds})
    return Outage(_first_line(error)) if passing else None


class PatientStorage(BaseStorage):
    """An Optuna storage that waits while its database is out.

    Args:
        backend: the storage, whose database raises :class:`Outage`.
        place: what the database is called before the user.
        release: lets go of the database.

    One driver at a time writes a study: a trial that has appeared since an attempt to make one
    failed is the one that was to be made.
    """

    def __init__(
        self, backend: BaseStorage, place: str, release: Callable[[], None] = lambda: None
    ) -> None:
        self.place = place
        self.say: Callable[[str, int], None] = lambda text, level: logger.log(level, text)
        self.lost: LedgerLost | None = None
        self._backend = backend
        self._release = release
        self._claim: Claim | None = None
        self._renewed = 0.0  # monotonic: when the claim was last seen to be held
        self._signature: tuple[int, str] | None = None
        self._is_sure = True  # that nobody else has driven the study since it was signed
        self._way_on = ""

    def hold(self, claim: Claim, way_on: str) -> None:
        """Keep other drivers out until the end; `way_on` is said where the database is lost."""
        claim.take()
        self._claim, self._renewed = claim, time.monotonic()
        self._way_on = f"; {way_on}"

    def sign(self, study_id: int) -> None:
        """Leave word in a study of who drives it, by which a driver knows its study again."""
        signature = uuid.uuid4().hex
        self.set_study_system_attr(study_id, _SIGNATURE, signature)
        self._signature = study_id, signature  # now that it can be read

    def _make_sure(self) -> None:
        """After an outage, and now and then: that no other driver has had the study meanwhile.

        Raises:
            Outage: the database does not answer, or another driver has the study now.
            LedgerLost: another one has had it: what this one knows of its trials may be old.
        """
        if self._claim is not None:
            self._is_sure = not self._claim.renew() and self._is_sure
            self._renewed = time.monotonic()
        if self._is_sure or self._signature is None:
            return
        study_id, signature = self._signature
        if self._backend.get_study_system_attrs(study_id).get(_SIGNATURE) != signature:
            self.lost = LedgerLost(
                f"another run has driven the study in {self.place} while this one was cut off from "
                f"it{self._way_on}"
            )
            raise self.lost
        self._is_sure = True  # as long as the claim stays

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Make a trial, once; one whose number is known beforehand spares a look at all others."""
        known = template_trial.number if template_trial is not None else -1
        if known < 0:
            known = self.get_n_trials(study_id)

        def make() -> int:
            return self._backend.create_new_trial(study_id, template_trial)

        def look() -> int:
            trials = self._backend.get_all_trials(study_id, deepcopy=False)
            return trials[known]._trial_id if len(trials) > known else make()

        return self._patiently(make, look)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Begin or end a trial, once."""

        def write() -> bool:
            return self._backend.set_trial_state_values(trial_id, state, values)

        def look() -> bool:
            return self._backend.get_trial(trial_id).state == state or write()

        return self._patiently(write, look)

    def write_together(
        self, trial_id: int, values: Mapping[int, float], attrs: Mapping[str, Any]
    ) -> None:
        """Values by step and attributes of a trial that runs: all of them, or none, are there.

        In a database that is one commit, which waits for the disk once.
        """
        self._patiently(lambda: self._write_together(trial_id, values, attrs))

    def _write_together(
        self, trial_id: int, values: Mapping[int, float], attrs: Mapping[str, Any]
    ) -> None:
        rdb = getattr(self._backend, "_backend", None)
        if write := getattr(rdb, "write_together", None):
            write(trial_id, values, attrs)
            return
        for step, value in values.items():  # in memory
            self._backend.set_trial_intermediate_value(trial_id, step, value)
        for key, attr in attrs.items():
            self._backend.set_trial_user_attr(trial_id, key, attr)

    def remove_session(self) -> None:
        """Let go of the database, which needs no answer."""
        self._backend.remove_session()
        self._release()
        if self._claim is not None:
            self._claim.release()

    def _patiently(self, work: Callable[[], _T], again: Callable[[], _T] | None = None) -> _T:
        """What `work` returns; after an outage what `again` does, or `work` once more.

        A driver comes here every second while trials run, as it keeps their time.

        Raises:
            LedgerLost: the database has been out for PATIENCE, its disk is full, or the user
                interrupted the waiting; from then on at once.
        """
        if self.lost is not None:
            raise self.lost
        begun: float | None = None
        told, pause = False, _FIRST_PAUSE
        while True:
            try:
                if begun is None:
                    if self._claim and time.monotonic() - self._renewed >= _RENEW_EVERY:
                        self._make_sure()
                    return work()
                self._make_sure()
                found = (again or work)()
            except Outage as error:
                now = time.monotonic()
                begun = now if begun is None else begun
                spent = now - begun
                logger.info("%s is out since %.1f s: %s", self.place, spent, error)
                lost = LedgerLost(
                    f"the ledger at {self.place} was out for {format_duration(spent)}: "
                    f"{error}{self._way_on}",
                    no_room=error.no_room,
                )
                if error.no_room or spent >= PATIENCE:
                    self.lost = lost
                    raise lost from error
                if spent >= _SILENCE and not told:
                    told = True
                    self.say(
                        f"the ledger at {self.place} is out ({error}); trying again for "
                        f"{format_duration(PATIENCE)}, and nothing is lost meanwhile",
                        logging.WARNING,
                    )
                try:
                    time.sleep(min(pause, max(0.0, PATIENCE - spent)))
                except KeyboardInterrupt:  # the user has lost patience: nothing waits again
                    self.lost = lost
                    raise
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                if told:
                    out = format_duration(time.monotonic() - begun)
                    self.say(f"the ledger answers again, after {out}", logging.INFO)
                return found


def _patient(name: str) -> Callable[..., Any]:
    """A method of Optuna's interface that may simply be done twice."""

    def method(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
        call = getattr(self._backend, name)
        return self._patiently(lambda: call(*args, **kwargs))

    return method


# Attributes, values and parameters are written over, or into the place that they already have.
# Every method of the interface is taken, so that none is without patience.
for _name, _function in inspect.getmembers(BaseStorage, inspect.isfunction):
    if not _name.startswith("_") and _name not in vars(PatientStorage):
        setattr(PatientStorage, _name, _patient(_name))
abc.update_abstractmethods(PatientStorage)  # type: ignore[type-abstract]


def patient(storage: Path | BaseStorage) -> PatientStorage:
    """A storage with patience: a SQLite file, made where there is none, or one that is open."""
    if isinstance(storage, Path):
        return open_storage(sqlite_url(storage))
    if isinstance(storage, PatientStorage):
        return storage
    # Its methods are set beside the class, which mypy cannot see.
    return PatientStorage(storage, "memory")  # type: ignore[abstract]


def _first_line(error: BaseException) -> str:
    """What a driver says, without the statement and the links that SQLAlchemy adds."""
    cause = getattr(error, "orig", None) or error.__cause__ or error
    cause = getattr(cause, "orig", None) or cause
    return " ".join(str(cause).split()) or type(cause).__name__
