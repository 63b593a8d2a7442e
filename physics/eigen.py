"""Eigendecompositions that report failures on the device, without synchronising the host."""

from __future__ import annotations

import threading
from functools import cache

import torch
from torch import Tensor

_OPERATOR = "_linalg_check_errors"
_this_thread = threading.local()


def eigh_trusting(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.linalg.eigh`` without the host's check for success.

    PyTorch reads LAPACK's error codes, for which the host waits until the device has finished all
    queued work; there is no ``eigh_ex``. On a GPU this function returns the codes instead of
    checking them. To do so, the first call with a matrix on a GPU replaces PyTorch's check operator
    in this process by one that calls the original for every caller except this function.

    Args:
        matrix: (…, r, r) Hermitian.

    Returns:
        Eigenvalues (…, r) in ascending order, eigenvectors (…, r, r) in columns, and (…) bool, True
        where the decomposition failed: the other two are undefined there. On a CPU it is False.

    Raises:
        torch.linalg.LinAlgError: a decomposition failed on a CPU.
    """
    if matrix.is_cuda:
        _replace_check("CUDA")
    codes: list[Tensor] = []
    _this_thread.codes = codes
    try:
        values, vectors = torch.linalg.eigh(matrix)
    finally:
        _this_thread.codes = None
    failed = torch.zeros(matrix.shape[:-2], dtype=torch.bool, device=matrix.device)
    for code in codes:
        failed = failed | (code != 0).view_as(failed)
    return values, vectors, failed


def keeps_codes() -> bool:
    """Whether this thread is inside :func:`eigh_trusting`."""
    return getattr(_this_thread, "codes", None) is not None


@cache
def _replace_check(backend: str) -> torch.library.Library:
    """Replace PyTorch's check of LAPACK's codes on a backend; store those of `eigh_trusting`."""
    check = torch.library.get_kernel(f"aten::{_OPERATOR}", backend)

    def keep_or_check(
        keys: torch._C.DispatchKeySet, codes: Tensor, api_name: str, *, is_matrix: bool
    ) -> None:
        kept: list[Tensor] | None = getattr(_this_thread, "codes", None)
        if kept is None:
            check.call_boxed(keys, codes, api_name, is_matrix=is_matrix)
        else:
            kept.append(codes)

    library = torch.library.Library("aten", "IMPL")
    library.impl(_OPERATOR, keep_or_check, backend, with_keyset=True)
    return library  # keep a reference: the registration ends with the object
