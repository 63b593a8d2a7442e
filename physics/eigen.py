"""Eigendecompositions that leave it to the device to say where they failed."""

from __future__ import annotations

import threading
from functools import cache

import torch
from torch import Tensor

_OPERATOR = "_linalg_check_errors"
_this_thread = threading.local()


def eigh_trusting(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.linalg.eigh`` for which the host does not look whether it succeeded.

    PyTorch looks at the codes of LAPACK, and the host waits there until the device has done all
    that it was asked for; there is no ``eigh_ex``. On a GPU the codes are returned in place of that
    look. For that the operator by which PyTorch looks is replaced in this process, at the first
    call with a matrix on a GPU, by one that calls it for everybody but this function.

    Args:
        matrix: (…, r, r) Hermitian.

    Returns:
        Eigenvalues (…, r) in ascending order, eigenvectors (…, r, r) in columns, and (…) bool where
        the decomposition failed: there the two hold anything. On a CPU it failed nowhere.

    Raises:
        torch.linalg.LinAlgError: on a CPU, where one of them failed.
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
    """Whether this thread is within :func:`eigh_trusting`."""
    return getattr(_this_thread, "codes", None) is not None


@cache
def _replace_check(backend: str) -> torch.library.Library:
    """Let PyTorch's check of LAPACK's codes on a backend keep those of :func:`eigh_trusting`."""
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
    return library  # what it registers goes with it
