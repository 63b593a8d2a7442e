"""Eigendecompositions that leave it to the device to say where they failed."""

from __future__ import annotations

import threading
from functools import cache

import torch
from torch import Tensor

_this_thread = threading.local()


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.linalg.eigh`` for which the host does not wait.

    PyTorch looks whether a decomposition succeeded, and the host waits there until the device has
    done all that it was asked for; there is no ``eigh_ex``. On a GPU that look is left out here.

    Args:
        matrix: (…, r, r) Hermitian.

    Returns:
        Eigenvalues (…, r) in ascending order, eigenvectors (…, r, r) in columns, and (…) bool where
        the decomposition failed: there the two hold anything. On a CPU it failed nowhere.

    Raises:
        torch.linalg.LinAlgError: on a CPU, where one of them failed.
    """
    if matrix.is_cuda:
        _take_the_look("CUDA")
    infos: list[Tensor] = []
    _this_thread.infos = infos
    try:
        values, vectors = torch.linalg.eigh(matrix)
    finally:
        _this_thread.infos = None
    failed = torch.zeros(matrix.shape[:-2], dtype=torch.bool, device=matrix.device)
    for info in infos:
        failed = failed | (info != 0).view_as(failed)
    return values, vectors, failed


def leaves_the_look() -> bool:
    """Whether this thread is within :func:`eigh`."""
    return getattr(_this_thread, "infos", None) is not None


@cache
def _take_the_look(backend: str) -> torch.library.Library | None:
    """Put :func:`_look` in the place of PyTorch's own look at the LAPACK codes of a backend.

    None where this PyTorch has no such operator: then it looks as ever.
    """
    if not hasattr(torch.ops.aten, "_linalg_check_errors"):
        return None
    library = torch.library.Library("aten", "IMPL")
    library.impl("_linalg_check_errors", _look, backend)
    return library


def _look(infos: Tensor, api_name: str, *, is_matrix: bool) -> None:
    """Keep the codes for :func:`eigh`; raise for everybody else, as PyTorch does."""
    kept: list[Tensor] | None = getattr(_this_thread, "infos", None)
    if kept is not None:
        kept.append(infos)
        return
    if not bool(infos.any()):
        return
    first = int(infos.flatten().nonzero()[0])
    where = "" if is_matrix else f" (batch element {first})"
    raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]  # it is public all the same
        f"{api_name}{where}: failed with code {int(infos.flatten()[first])}: the matrix is not "
        "finite, singular, or the algorithm did not converge"
    )
