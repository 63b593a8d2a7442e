"""A disk that is full: nothing is lost by it, and one line says how to go on."""

from __future__ import annotations

import errno
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tuner.errors import LedgerLost, StudyError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What safetensors, SQLite and Ray say, who keep the number to themselves. To SQLite a file that
# may not grow is an I/O error.
_WORDS = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|database or disk is full"
    r"|disk I/O error"
    r"|StorageFull|FileTooLarge|QuotaExceeded"
)


def speaks_of_full_disk(text: str) -> bool:
    """Whether a message says that a disk is full."""
    return _WORDS.search(text) is not None


def full_disk(error: BaseException) -> str | None:
    """What an exception, or one that it came from, says of a full disk; None if it does not.

    That a database server's disk is full is an outage of the server.
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
    """Turn a full disk within the block into one line.

    Args:
        folder: the study's.
        mode: of the command that goes on, as :func:`tuner.ledger.mode_of` says it.

    Raises:
        StudyError: what the disk said, and how the study in ``folder`` goes on.
    """
    try:
        yield
    except Exception as error:
        said = full_disk(error)
        if said is None:
            raise
        raise disk_error(folder, said, mode) from error


def disk_error(folder: Path, said: str, mode: str = "") -> StudyError:
    """The line that ends a session on a full disk."""
    resume = f"python -m tuner.run --resume {shlex.quote(str(folder))}{mode}"
    return ended_by_disk(said, f": {resume}")


def ended_by_disk(said: str, command: str) -> StudyError:
    """The line that ends a command on a full disk, with what goes on."""
    return StudyError(
        f"the disk cannot be written ({said}); nothing that was finished is lost: make room and "
        f"go on with{command}"
    )
