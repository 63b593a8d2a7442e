"""Handling of a full disk: no data is lost, and a one-line message says how to resume."""

from __future__ import annotations

import errno
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tuner.errors import LedgerLost, StudyError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Messages of safetensors, SQLite and Ray, which do not expose the error number. SQLite reports a
# file that may not grow as an I/O error.
_WORDS = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|database or disk is full"
    r"|disk I/O error"
    r"|StorageFull|FileTooLarge|QuotaExceeded"
)


def speaks_of_full_disk(text: str) -> bool:
    """Return whether a message says that a disk is full."""
    return _WORDS.search(text) is not None


def full_disk(error: BaseException) -> str | None:
    """Return the message on a full disk of an exception or its causes; None if there is none.

    A full disk of a database server counts as an outage of the server.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, LedgerLost) and not seen.no_room:
            return None
        if isinstance(seen, OSError) and seen.errno in _FULL:
            where = f": {seen.filename}" if seen.filename else ""
            return f"{seen.strerror}{where}"
        if speaks_of_full_disk(str(seen)):
            return next(line for line in str(seen).splitlines() if speaks_of_full_disk(line))
        seen = seen.__cause__ or seen.__context__
    return None


@contextmanager
def full_disk_said(folder: Path, mode: str) -> Iterator[None]:
    """Turn an error from a full disk in the block into a one-line StudyError.

    Args:
        folder: the run folder.
        mode: the mode option of the resume command, from :func:`tuner.ledger.mode_of`.

    Raises:
        StudyError: a disk is full; the text says how to resume the study in ``folder``.
    """
    try:
        yield
    except Exception as error:
        said = full_disk(error)
        if said is None:
            raise
        raise disk_error(folder, said, mode) from error


def disk_error(folder: Path, said: str, mode: str = "") -> StudyError:
    """Return the error that ends a session on a full disk."""
    resume = f"python -m tuner.run --resume {shlex.quote(str(folder))}{mode}"
    return ended_by_disk(said, f": {resume}")


def ended_by_disk(said: str, command: str) -> StudyError:
    """Return the error that ends a command on a full disk, with the command that resumes."""
    return StudyError(
        f"the disk cannot be written ({said}); nothing that was finished is lost: make room and "
        f"go on with{command}"
    )
