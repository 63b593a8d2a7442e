"""Memory of a training on the CPU: what one step frees, the next one takes again."""

from __future__ import annotations

import ctypes
import os
from functools import cache

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 32 * 2**20  # bytes of a block that comes from the heap; glibc allows no more
_CHOSEN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
_MOST_KEPT = 2**30  # free bytes at the top of the heap


@cache
def keep_freed_memory() -> bool:
    """Let glibc keep large blocks that are freed, in place of giving them back to the system.

    A step allocates and frees tensors of some megabytes by the dozen. Given back, each comes
    again as zeroed pages, a page fault every 4 KiB. The process keeps up to 1 GiB for that.
    Blocks beyond 32 MiB go back as before. Who has set glibc's limits in the environment
    (``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES``) keeps them.

    Returns:
        Whether the C library took the setting; others than glibc have none.
    """
    tuned = "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or not os.environ.keys().isdisjoint(_CHOSEN):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = (_M_MMAP_THRESHOLD, _LARGEST_KEPT), (_M_TRIM_THRESHOLD, _MOST_KEPT)
    return all(mallopt(name, value) == 1 for name, value in settings)
