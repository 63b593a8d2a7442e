"""Folders that are replaced as a whole; single files are :mod:`model.files`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def replace_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a fresh folder, then put it in the place of the old one; never a mixture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    old = fresh.with_name(fresh.name + ".old")
    try:
        fresh.chmod(0o755)
        fill(fresh)
        if path.exists():
            path.rename(old)
        fresh.rename(path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
