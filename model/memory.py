"""CPU memory of a training: memory freed by one step is reused by the next."""

from __future__ import annotations

import ctypes
import os
from functools import cache

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT = 32 * 2**20  # largest block in bytes that is allocated on the heap; glibc's maximum
_CHOSEN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
_MOST_KEPT = 2**30  # free bytes at the top of the heap


@cache
def keep_freed_memory() -> bool:
    """Make glibc keep freed large blocks instead of returning them to the system.

    A step allocates and frees dozens of tensors of some megabytes. Memory returned to the system
    comes back as zeroed pages, with a page fault every 4 KiB. The process keeps up to 1 GiB to
    avoid that. Blocks above 32 MiB are returned as before. Limits of glibc that are set in the
    environment (``MALLOC_MMAP_THRESHOLD_``, ``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES``) take
    precedence.

    Returns:
        Whether the C library accepted the setting; libraries other than glibc have none.
    """
    tuned = "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    if tuned or not os.environ.keys().isdisjoint(_CHOSEN):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = (_M_MMAP_THRESHOLD, _LARGEST_KEPT), (_M_TRIM_THRESHOLD, _MOST_KEPT)
    return all(mallopt(name, value) == 1 for name, value in settings)
