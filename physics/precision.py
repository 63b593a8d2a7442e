"""Keeps reduced precision out of complex linear algebra."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch autocast and TF32 off for the block, and restore both after it.

    Autocast would turn matrix products into bf16 and TF32 would keep ten mantissa bits of
    float32; either one ruins a Cholesky factorisation of a covariance.
    """
    matmul = torch.backends.cuda.matmul
    tf32 = matmul.allow_tf32
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        if tf32:
            matmul.allow_tf32 = False
            stack.callback(setattr, matmul, "allow_tf32", True)
        yield


def in_full_precision(function: Callable[P, T]) -> Callable[P, T]:
    """Run ``function`` under :func:`full_precision`."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with full_precision():
            return function(*args, **kwargs)

    return wrapped
