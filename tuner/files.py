"""Folders that are replaced as a whole, and locks; single files are :mod:`model.files`."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from model.files import PART

_TRIES, _PAUSE = 5, 0.02  # of taking a lock, which who looks at it holds for an instant [s]


def sweep(folder: Path, *, below: bool = True) -> None:
    """Remove what writers left that were killed; only who alone writes there may ask for it.

    Args:
        folder: whose files are looked at.
        below: whether those of the folders in it are, too.
    """
    found = folder.rglob(f".*{PART}") if below else folder.glob(f".*{PART}")
    for left in sorted(found, reverse=True):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def replace_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a fresh folder, then put it in the place of the old one; never a mixture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART))
    old = fresh.with_name(f"{fresh.stem}.old{PART}")
    try:
        fresh.chmod(0o755)
        fill(fresh)
        if path.exists():
            path.rename(old)
        fresh.rename(path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


class Locked(Exception):
    """A lock that another process holds; its text says which, if that is known."""


class FileLock:
    """A lock that its process holds as long as it lives, with process and host in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take it, or raise Locked at once; OSError where the file cannot be written."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(handle)
        except OSError as error:
            holder = os.read(handle, 300).decode(errors="replace").strip()
            os.close(handle)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise Locked(f" (process {holder})" if holder else "") from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} on {platform.node()}".encode(), 0)
        self._handle = handle

    def release(self) -> None:
        """Let another process have it, and leave word that this one was not cut off."""
        if self._handle is not None:
            os.ftruncate(self._handle, 0)
            os.close(self._handle)
            self._handle = None


def _lock(handle: int) -> None:
    """Take the lock; the glances of others, who hold it for an instant, are waited for."""
    for left in range(_TRIES - 1, -1, -1):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not left or error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            time.sleep(_PAUSE)
        else:
            return
