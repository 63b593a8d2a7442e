"""Scales of complex tensors, taken on their real view.

PyTorch promotes a real operand of complex arithmetic to complex, and a complex division costs many
times a real one; these do the same on pairs of reals.
"""

from __future__ import annotations

import torch
from torch import Tensor


def power(value: Tensor) -> Tensor:
    """|value|^2 (…) real."""
    pair = torch.view_as_real(value.resolve_conj())
    return pair[..., 0].square() + pair[..., 1].square()


def energy(value: Tensor) -> Tensor:
    """Squared Frobenius norm (…) of matrices (…, n, m)."""
    return torch.view_as_real(value.resolve_conj()).square().sum((-3, -2, -1))


def peak(value: Tensor, n_dims: int = 2) -> Tensor:
    """Largest real or imaginary part over the last dimensions (…), cut from the graph.

    Within a factor of sqrt(2) of the largest modulus: a scale to divide by before squaring, on
    which the result does not depend.
    """
    parts = torch.view_as_real(value.detach().resolve_conj())
    return parts.abs().amax(tuple(range(-n_dims - 1, 0)))


def divisor(scale: Tensor) -> Tensor:
    """A scale that is safe to divide by.

    1 stands in for 0 and for what is not finite. A subnormal divisor would overflow: the smallest
    normal number serves those.
    """
    usable = scale.clamp_min(torch.finfo(scale.dtype).tiny)
    return torch.where((scale > 0) & torch.isfinite(scale), usable, torch.ones_like(scale))


def divide(value: Tensor, real: Tensor) -> Tensor:
    """value / real for complex value; ``real`` broadcasts against it."""
    return torch.view_as_complex(torch.view_as_real(value.resolve_conj()) / real.unsqueeze(-1))


def multiply(value: Tensor, real: Tensor) -> Tensor:
    """value * real for complex value; ``real`` broadcasts against it."""
    return torch.view_as_complex(torch.view_as_real(value.resolve_conj()) * real.unsqueeze(-1))
