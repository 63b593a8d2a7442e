"""One driver a study: the right to write, held in the database itself.

A run folder's lock keeps a second driver out of the folder. A copy of the folder has a lock of its
own but the same study in a team's database, so that the database has to keep the right too. It is
gone with the process that held it, killed or not.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tuner.errors import StudyError
from tuner.files import FileLock, Locked
from tuner.storage import Outage, as_outage, connect_args, shown

if TYPE_CHECKING:
    from sqlalchemy.engine import URL, Connection

_GRACE = 5.0  # seconds in which a server notices that a killed driver is gone
_PAUSE = 0.2


class Claim(Protocol):
    """The right to write a study."""

    def take(self) -> None:
        """Get it, or raise StudyError where another driver has it."""

    def renew(self) -> bool:
        """Make sure that it is still held, or raise Outage where another has it.

        Returns:
            Whether it was gone, so that another driver may have had it meanwhile.
        """

    def release(self) -> None:
        """Let another driver have it."""


def claim_of(url: URL, study: str) -> Claim:
    """The claim to a study in a database.

    Args:
        url: the database.
        study: the study's name there.
    """
    if url.get_backend_name() == "sqlite":
        return FileClaim(Path(f"{url.database}-{study}.lock"), study)
    return ServerClaim(url, study)


class ServerClaim:
    """A PostgreSQL advisory lock on a connection of its own.

    The server frees it when the connection ends, which a killed driver's does at once. Of a
    machine that is lost the server hears nothing, and asks after a while.
    """

    def __init__(self, url: URL, study: str) -> None:
        from sqlalchemy import create_engine, event
        from sqlalchemy.pool import NullPool

        self._what = f"{study} in {shown(url)}"
        digest = hashlib.sha256(f"ristune/{study}".encode()).digest()
        self._key = int.from_bytes(digest[:8], "big", signed=True)
        self._engine = create_engine(
            url,
            poolclass=NullPool,
            isolation_level="AUTOCOMMIT",
            connect_args=connect_args(url),
        )
        event.listen(self._engine, "handle_error", as_outage)
        self._connection: Connection | None = None

    def take(self) -> None:
        deadline = time.monotonic() + _GRACE
        while True:
            try:
                if self._got():
                    return
            except Outage as error:
                if time.monotonic() > deadline:
                    raise StudyError(f"{self._what}: cannot be claimed: {error}") from error
            else:
                if time.monotonic() > deadline:
                    raise StudyError(
                        f"another run is at work on the study {self._what}; wait for its end (a "
                        "machine that was lost is forgotten within two minutes)"
                    )
            time.sleep(_PAUSE)

    def renew(self) -> bool:
        if self._connection is not None:
            try:
                self._connection.exec_driver_sql("SELECT 1")
            except Outage:
                self._drop()
            else:
                return False
        if not self._got():
            raise Outage("the study is claimed by another connection")
        return True

    def release(self) -> None:
        self._drop()
        self._engine.dispose()

    def _got(self) -> bool:
        try:
            got = self._asked()
        except Outage:
            self._drop()  # it would connect anew by itself, without the lock
            raise
        if not got:
            self._drop()  # a connection that is kept is one that has the lock
        return got

    def _asked(self) -> bool:
        from sqlalchemy import text

        if self._connection is None:
            self._connection = self._engine.connect()
            # A peer that is gone is noticed in a minute; the system's own limit is hours.
            for setting in ("idle = 30", "interval = 10", "count = 3"):
                self._connection.exec_driver_sql(f"SET tcp_keepalives_{setting}")
            # It has nothing to say for most of the time. Servers before 14 do not mind.
            self._connection.exec_driver_sql(
                "SELECT set_config(name, '0', false) FROM pg_settings "
                "WHERE name = 'idle_session_timeout'"
            )
        query = text("SELECT pg_try_advisory_lock(:key)")
        return bool(self._connection.execute(query, {"key": self._key}).scalar())

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.invalidate()
            connection.close()


class FileClaim:
    """A lock file beside a SQLite database."""

    def __init__(self, path: Path, study: str) -> None:
        self._lock = FileLock(path)
        self._study = study

    def take(self) -> None:
        try:
            self._lock.acquire()
        except Locked as error:
            raise StudyError(f"another run{error} is at work on the study {self._study}") from None
        except OSError as error:
            raise StudyError(f"{self._lock.path}: cannot be written: {error.strerror}") from error

    def renew(self) -> bool:
        """Nothing is gone: a file's lock outlives what happens to the file beside it."""
        return False

    def release(self) -> None:
        self._lock.release()
