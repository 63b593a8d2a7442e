"""Folders that are replaced as a whole; single files are :mod:`model.files`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from model.files import PART


def sweep(folder: Path) -> None:
    """Remove what writers left that were killed; only who alone writes there may ask for it."""
    for left in sorted(folder.rglob(f".*{PART}"), reverse=True):
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
