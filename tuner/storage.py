"""Access to the ledger's database, with retries during outages.

A restarting server, a failing network or a held lock must not end a study. Every database call of
Optuna is retried until it succeeds, for PATIENCE seconds at most; only this module retries. A call
may have succeeded although its answer was lost: operations that are not idempotent first check
whether they have been done.
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

PATIENCE = 300.0  # maximum duration of an outage in seconds
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds between retries: doubled each time
_RENEW_EVERY = 60.0  # seconds: an idle claim can be lost without notice
_SILENCE = 1.0  # seconds of an outage before the user is told
_SIGNATURE = "ristune:driver"
_OPENINGS = 3  # attempts: others may be creating the tables, or the server may be restarting
_TABLES = {"studies", "trials", "version_info", "alembic_version"}  # Optuna's first and last ones

_DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
_DIALECTS = ("postgresql", "sqlite")
_SECRETS = ("password", "passwd", "pwd", "passcode")
# A silent connection is dropped within a minute; the system's default is hours.
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


# A full disk, or a write error, which SQLite reports for a file that may not grow.
_SQLITE_NO_ROOM = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE})


class Outage(Exception):
    """The database temporarily does not answer or cannot write.

    Args:
        text: the message of the database driver.
        no_room: whether its disk, which also holds the run folder, is full, so that waiting does
            not help.
    """

    def __init__(self, text: str, *, no_room: bool = False) -> None:
        super().__init__(text)
        self.no_room = no_room


def parse_url(text: str) -> URL:
    """Parse the URL of a database and set the driver that is installed with ristune.

    Raises:
        ValueError: invalid URL, unsupported database, a password, or an in-memory database.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ValueError("is no URL of a database; expected postgresql://USER@HOST/NAME") from None
    # SQLAlchemy parses what follows a bracket as part of the host name.
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
    """Return the URL of a SQLite file; the path may hold any characters."""
    from sqlalchemy.engine import URL

    return URL.create("sqlite", database=str(database))


def connect_args(url: URL) -> dict[str, Any]:
    """Return the timeouts for connections to this database, except those set in the URL."""
    if url.get_backend_name() == "sqlite":
        return dict(_SQLITE)
    if url.get_driver_name() in ("psycopg", "psycopg2"):
        return {key: value for key, value in _LIBPQ.items() if key not in url.query}
    return {}


def open_storage(url: URL) -> PatientStorage:
    """Connect to a database and create its tables if they are missing.

    Raises:
        StudyError: the database cannot be opened; raised within about ten seconds if the server
            does not answer. The text is one line.
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
    # The remaining methods are set below the class, which mypy does not see.
    return PatientStorage(cached, place, rdb.engine.dispose)  # type: ignore[abstract]


def has_tables(url: URL) -> bool:
    """Return whether a database already has Optuna's tables, without changing it.

    Raises:
        StudyError: the server does not answer, or the folder of a SQLite file does not exist. The
            text is one line.
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
    """Call `work`, and call it again if another process or the server disturbed it.

    Two studies that start at the same time in an empty database create the same tables, and a
    server that has answered may close the connection before all statements are sent.

    Raises:
        StudyError: all attempts failed, or the failure is permanent. The text is one line.
    """
    from sqlalchemy.exc import DBAPIError

    begun = time.monotonic()
    with _refused(place):
        for _ in range(_OPENINGS - 1):
            try:
                return work()
            except (DBAPIError, optuna.exceptions.StorageInternalError) as error:
                late = time.monotonic() - begun > _LONGEST_PAUSE  # a timeout is not retried
                if late or not _was_asked(error):
                    raise
                time.sleep(_FIRST_PAUSE)
        return work()


def _was_asked(error: BaseException | None) -> bool:
    """Return whether the database had been reached when the error occurred.

    The causes are searched too, as the last error of a lost connection is that of the rollback.
    """
    while error is not None:
        if getattr(error, "statement", None):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _refused(place: str) -> Iterator[None]:
    """Turn an error on opening a database into a one-line StudyError."""
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

    # Optuna treats braces as a template.
    text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    return BatchedStorage(text, engine_kwargs={"connect_args": connect_args(url)})


def _make_sqlite(path: Path) -> None:
    """Create a SQLite file with Optuna's tables atomically if it does not exist.

    Optuna creates one table after another with its indexes, and creates no indexes for existing
    tables. In a file whose creation was interrupted by a full disk or a power cut, the index that
    makes study names unique may be missing, and every session would start a new study.
    """
    if path.exists() or not path.parent.is_dir():  # opening it reports the error
        return
    with suppress(OSError), ExitStack() as stack:
        beside = TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
        fresh = Path(stack.enter_context(beside)) / path.name
        _opened(sqlite_url(fresh)).engine.dispose()
        sync(fresh)
        # Do not rename: another study may have created the file meanwhile. On a file system without
        # hard links, Optuna creates the tables in place.
        os.link(fresh, path)
        sync(path.parent)


def shown(url: URL) -> str:
    """Return the name of a database for messages: a path, or the URL."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    return url.render_as_string()


def as_outage(context: ExceptionContext) -> Exception | None:
    """Return an Outage for SQLAlchemy to raise instead of a temporary error; None keeps the error.

    Outage is not a SQLAlchemy error, which Optuna would wrap, or on which it would retry the
    creation of a trial itself.
    """
    error = context.original_exception
    if isinstance(error, sqlite3.Error):
        # The low byte is the primary error code, the rest the extended one.
        code = getattr(error, "sqlite_errorcode", 0)
        if code in _SQLITE_NO_ROOM:
            return Outage(_first_line(error), no_room=True)
        passing = code & 0xFF in _SQLITE_PASSING
    else:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        passing = context.is_disconnect or bool({"OperationalError", "InterfaceError"} & {*kinds})
    return Outage(_first_line(error)) if passing else None


class PatientStorage(BaseStorage):
    """An Optuna storage that waits while its database is unavailable.

    Args:
        backend: the wrapped storage, whose database raises :class:`Outage`.
        place: name of the database in messages.
        release: closes the connections to the database.

    Only one driver at a time writes a study, so a trial that appears after a failed attempt to
    create one is the result of that attempt.
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
        self._renewed = 0.0  # monotonic time when the claim was last confirmed
        self._signature: tuple[int, str] | None = None
        self._is_sure = True  # that no other driver had the study since it was signed
        self._way_on = ""

    def hold(self, claim: Claim, way_on: str) -> None:
        """Hold the claim until the end; `way_on` is part of the message if the database is lost."""
        claim.take()
        self._claim, self._renewed = claim, time.monotonic()
        self._way_on = f"; {way_on}"

    def sign(self, study_id: int) -> None:
        """Write a signature into a study, by which this driver recognises it after an outage."""
        signature = uuid.uuid4().hex
        self.set_study_system_attr(study_id, _SIGNATURE, signature)
        self._signature = study_id, signature  # set after the write succeeded

    def _make_sure(self) -> None:
        """Check, after an outage and periodically, that no other driver has had the study.

        Raises:
            Outage: the database does not answer, or another driver has the study now.
            LedgerLost: another driver has had it, so that the trials in memory may be outdated.
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
        self._is_sure = True  # until the claim is lost

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Create a trial exactly once; a number known in advance saves a query of all trials."""
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
        """Start or end a trial exactly once."""

        def write() -> bool:
            return self._backend.set_trial_state_values(trial_id, state, values)

        def look() -> bool:
            return self._backend.get_trial(trial_id).state == state or write()

        return self._patiently(write, look)

    def write_together(
        self, trial_id: int, values: Mapping[int, float], attrs: Mapping[str, Any]
    ) -> None:
        """Write intermediate values by step and attributes of a running trial atomically.

        In a database this is a single commit, which waits for the disk once.
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
        """Close the connections and release the claim; needs no answer from the database."""
        self._backend.remove_session()
        self._release()
        if self._claim is not None:
            self._claim.release()

    def _patiently(self, work: Callable[[], _T], again: Callable[[], _T] | None = None) -> _T:
        """Call `work` and return its result; after an outage call `again`, or `work` once more.

        The driver calls this every second while trials run, as it stores their running time.

        Raises:
            LedgerLost: the database has been unavailable for PATIENCE seconds, its disk is full, or
                the user interrupted the wait; all later calls raise it immediately.
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
                except KeyboardInterrupt:  # later calls fail immediately
                    self.lost = lost
                    raise
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                if told:
                    out = format_duration(time.monotonic() - begun)
                    self.say(f"the ledger answers again, after {out}", logging.INFO)
                return found


def _patient(name: str) -> Callable[..., Any]:
    """Return a method that retries an idempotent method of Optuna's interface."""

    def method(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
        call = getattr(self._backend, name)
        return self._patiently(lambda: call(*args, **kwargs))

    return method


# Writes of attributes, values and parameters overwrite existing entries, so they are idempotent.
# All methods of the interface are wrapped, so that each of them retries.
for _name, _function in inspect.getmembers(BaseStorage, inspect.isfunction):
    if not _name.startswith("_") and _name not in vars(PatientStorage):
        setattr(PatientStorage, _name, _patient(_name))
abc.update_abstractmethods(PatientStorage)  # type: ignore[type-abstract]


def patient(storage: Path | BaseStorage) -> PatientStorage:
    """Wrap a storage with retries: a SQLite file, created if missing, or an open storage."""
    if isinstance(storage, Path):
        return open_storage(sqlite_url(storage))
    if isinstance(storage, PatientStorage):
        return storage
    # Its methods are set outside the class, which mypy cannot see.
    return PatientStorage(storage, "memory")  # type: ignore[abstract]


def _first_line(error: BaseException) -> str:
    """Return a driver's message without the statement and links that SQLAlchemy adds."""
    cause = getattr(error, "orig", None) or error.__cause__ or error
    cause = getattr(cause, "orig", None) or cause
    return " ".join(str(cause).split()) or type(cause).__name__
