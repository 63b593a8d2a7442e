"""A lock in the database that allows only one driver per study.

The lock of a run folder keeps a second driver out of the folder. A copy of the folder has its own
lock but refers to the same study in a shared database, so the database needs a lock too. It is
released when the process that holds it ends, even if it is killed.
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

_GRACE = 5.0  # seconds within which a server notices that a driver was killed
_PAUSE = 0.2


class Claim(Protocol):
    """The exclusive right to write a study."""

    def take(self) -> None:
        """Acquire it, or raise StudyError if another driver holds it."""

    def renew(self) -> bool:
        """Make sure that it is still held, or raise Outage if another driver holds it.

        Returns:
            Whether it had been lost, so that another driver may have held it meanwhile.
        """

    def release(self) -> None:
        """Release it."""


def claim_of(url: URL, study: str) -> Claim:
    """Return the claim for a study in a database.

    Args:
        url: the database.
        study: name of the study in the database.
    """
    if url.get_backend_name() == "sqlite":
        return FileClaim(Path(f"{url.database}-{study}.lock"), study)
    return ServerClaim(url, study)


class ServerClaim:
    """A PostgreSQL advisory lock on a dedicated connection.

    The server releases it when the connection ends, which happens immediately if the driver is
    killed. If the driver's machine is lost, the server detects it by keepalive probes after a
    while.
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
            self._drop()  # it would reconnect automatically, without the lock
            raise
        if not got:
            self._drop()  # only a connection that holds the lock is kept
        return got

    def _asked(self) -> bool:
        from sqlalchemy import text

        if self._connection is None:
            self._connection = self._engine.connect()
            # A lost peer is noticed within a minute; the system's default is hours.
            for setting in ("idle = 30", "interval = 10", "count = 3"):
                self._connection.exec_driver_sql(f"SET tcp_keepalives_{setting}")
            # The connection is idle most of the time. Servers before 14 lack this setting.
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
    """A lock file next to a SQLite database."""

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
        """Return False: the lock is never lost, whatever happens to the database file."""
        return False

    def release(self) -> None:
        self._lock.release()
