"""What every test shares: a quiet, tokenless Ray, and the origin's shards where they lie."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

# Before any test module imports ray: a token would be written to the home folder.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

# What tests keep of candidates and images goes with the session; trials in processes of their own
# see it too.
_CACHE = tempfile.TemporaryDirectory(prefix="ristune-cache-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

ROOT = Path(__file__).resolve().parent.parent


def _origin_shards() -> Path:
    named = os.environ.get("RISTUNE_ORIGIN_SHARDS")
    return Path(named) if named else ROOT.parent / "shared" / "data" / "origin-shards"


@pytest.fixture(scope="session")
def origin_shards() -> Path:
    """Folder of the origin's shards; tests of real data skip without it, unless demanded.

    RISTUNE_ORIGIN_SHARDS names another folder, RISTUNE_REQUIRE_ORIGIN=1 turns skip into failure.
    """
    folder = _origin_shards()
    if not (folder / "train").is_dir():
        if os.environ.get("RISTUNE_REQUIRE_ORIGIN") == "1":
            pytest.fail(f"RISTUNE_REQUIRE_ORIGIN=1, but there is no {folder / 'train'}")
        pytest.skip(f"no origin shards at {folder}")
    return folder
