"""Norms and scaling of complex tensors, computed on pairs of reals.

PyTorch promotes a real operand of complex arithmetic to complex. That is acceptable for a product
but not for its gradient with respect to the real operand, and a complex division costs many times
a real one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def power(value: Tensor) -> Tensor:
    """|value|^2 (…) real."""
    return _squared_norm(value, ())


def energy(value: Tensor) -> Tensor:
    """Squared Frobenius norm (…) of matrices (…, n, m)."""
    return _squared_norm(value, (-2, -1))


def column_energy(value: Tensor) -> Tensor:
    """Squared norms (…, m) of the columns of matrices (…, n, m)."""
    return _squared_norm(value, (-2,))


def peak(value: Tensor, n_dims: int = 2) -> Tensor:
    """Largest real or imaginary part over the last dimensions (…), cut from the graph.

    It is within a factor of sqrt(2) of the largest modulus. It serves as a scale to divide by
    before squaring, on which the final result does not depend.
    """
    parts = torch.view_as_real(value.detach().resolve_conj())
    dims = tuple(range(-n_dims - 1, 0))
    return torch.maximum(parts.amax(dims), -parts.amin(dims))


def divisor(scale: Tensor) -> Tensor:
    """A scale that is safe to divide by.

    0 and non-finite values are replaced by 1. Division by a subnormal number would overflow, so
    those are replaced by the smallest normal number.
    """
    usable = scale.clamp_min(torch.finfo(scale.dtype).tiny)
    return torch.where((scale > 0) & torch.isfinite(scale), usable, torch.ones_like(scale))


def divide(value: Tensor, real: Tensor) -> Tensor:
    """value / real for complex value; ``real`` broadcasts against it."""
    return torch.view_as_complex(torch.view_as_real(value.resolve_conj()) / real.unsqueeze(-1))


def multiply(value: Tensor, real: Tensor) -> Tensor:
    """value * real for complex value; ``real`` broadcasts against it."""
    if not real.requires_grad:
        return value * real
    return torch.view_as_complex(torch.view_as_real(value.resolve_conj()) * real.unsqueeze(-1))


def _squared_norm(value: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Sum of |value|^2 over dimensions given as negative indices."""
    if value.requires_grad and torch.is_grad_enabled():
        total: Tensor = _SquaredNorm.apply(value, dims)
        return total
    squares = torch.view_as_real(value.resolve_conj()).square()
    if -1 in dims:
        return squares.sum((*(dim - 1 for dim in dims), -1))
    squares = squares[..., 0] + squares[..., 1]  # a sum over pairs is slow
    return squares.sum(dims) if dims else squares


class _SquaredNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, dims: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(value)
        ctx.dims = dims
        return _squared_norm(value, dims)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (value,) = ctx.saved_tensors
        for dim in reversed(ctx.dims):
            grad = grad.unsqueeze(dim)
        return multiply(value, 2.0 * grad), None
