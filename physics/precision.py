"""Keeps reduced precision out of complex linear algebra."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

_BACKENDS: tuple[Any, ...] = (
    torch.backends.cuda.matmul,
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]  # made at run time
)

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch autocast and TF32 off for the block, and restore both after it.

    Autocast would turn matrix products into bf16 and TF32 would keep ten mantissa bits of
    float32; either one ruins a Cholesky factorisation of a covariance. Both of torch's TF32
    settings are handled, ``set_float32_matmul_precision`` (with the older ``allow_tf32``) and
    ``fp32_precision``, on the GPU (cuBLAS) and on the CPU (oneDNN, where it may also be bf16).

    A backward pass runs outside the block: if TF32 is enabled (torch's default is off), gradients
    use it.
    """
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        precisions = [backend.fp32_precision for backend in _BACKENDS]
        if "tf32" in precisions or "bf16" in precisions:
            for backend, precision in zip(_BACKENDS, precisions, strict=True):
                stack.callback(setattr, backend, "fp32_precision", precision)
            # If the older setting was used, torch requires both settings to agree.
            if (older := _older_switch()) != "highest":
                stack.callback(torch.set_float32_matmul_precision, older)
                torch.set_float32_matmul_precision("highest")
            for backend in _BACKENDS:
                backend.fp32_precision = "ieee"
        yield


def _older_switch() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch raises if only the newer setting was used
        return "highest"


def in_full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Run ``function`` under :func:`full_precision`."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with full_precision():
            return function(*args, **kwargs)

    return wrapped
