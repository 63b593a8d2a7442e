"""Atomic replacement of folders, and lock files; :mod:`model.files` handles single files."""

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

_TRIES, _PAUSE = 5, 0.02  # attempts to take a lock that readers hold briefly; pause [s]


def sweep(folder: Path, *, below: bool = True) -> None:
    """Remove partial files of killed writers; the caller must be the only writer there.

    Args:
        folder: folder to clean up.
        below: whether to include subfolders.
    """
    found = folder.rglob(f".*{PART}") if below else folder.glob(f".*{PART}")
    for left in sorted(found, reverse=True):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def replace_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a new folder and replace the old one with it, so that contents are never mixed."""
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
    """Another process holds the lock; the text names that process, if known."""


class FileLock:
    """A lock held until its process ends, with process id and host in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock or raise Locked immediately; OSError if the file cannot be written."""
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
        """Release the lock and clear the file, which marks a regular end."""
        if self._handle is not None:
            os.ftruncate(self._handle, 0)
            os.close(self._handle)
            self._handle = None


def _lock(handle: int) -> None:
    """Take the lock, with a few retries, as readers hold it briefly."""
    for left in range(_TRIES - 1, -1, -1):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not left or error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            time.sleep(_PAUSE)
        else:
            return
