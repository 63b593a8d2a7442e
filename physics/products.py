"""Products of factor columns with gradients that conjugate only small matrices.

A factor (…, N, r) is passed as its rows C^T (…, r, N). Autograd's own gradients of the same
products copy the conjugate of every N x r operand, and compute some of them twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from physics.scaling import energy, multiply, power


def gram(rows: Tensor) -> Tensor:
    """``C^H C`` (…, r, r) of rows C^T (…, r, N)."""
    product: Tensor = _Gram.apply(rows)
    return product


def inner_products(rows: Tensor, others: Tensor) -> Tensor:
    """``C^H D`` (…, r, s) of rows C^T (…, r, N) and D^T (…, s, N)."""
    product: Tensor = _InnerProducts.apply(rows, others)
    return product


def combined(weights: Tensor, rows: Tensor) -> Tensor:
    """``(C W)^T`` (…, K, N) of weights W (…, r, K) and rows C^T (…, r, N)."""
    product: Tensor = _Combined.apply(weights, rows)
    return product


def energy_beyond(gram: Tensor, projected: Tensor, weights: Tensor) -> Tensor:
    """``||F^H F||^2 - 2 ||F^H G||^2`` (…) of ``G = C diag(s)``.

    Args:
        gram: F^H F (…, r, r).
        projected: ``conj(F^H C)`` (…, r, K).
        weights: s^2 (…, K), which receive no gradient.
    """
    difference: Tensor = _EnergyBeyond.apply(gram, projected, weights)
    return difference


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return rows.conj() @ rows.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        return (grad + grad.mH).mT @ rows


class _InnerProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, others: Tensor) -> Tensor:
        ctx.save_for_backward(rows, others)
        return rows.conj() @ others.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, others = ctx.saved_tensors
        to_rows = to_others = None
        if ctx.needs_input_grad[0]:
            to_rows = (grad.conj() @ others).sum_to_size(rows.shape)
        if ctx.needs_input_grad[1]:
            to_others = (grad.mT @ rows).sum_to_size(others.shape)
        return to_rows, to_others


class _Combined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(weights, rows)
        return weights.mT @ rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        weights, rows = ctx.saved_tensors
        to_weights = to_rows = None
        if ctx.needs_input_grad[0]:
            to_weights = (grad.conj() @ rows.mT).mH.sum_to_size(weights.shape)
        if ctx.needs_input_grad[1]:
            to_rows = (weights.conj() @ grad).sum_to_size(rows.shape)
        return to_weights, to_rows


class _EnergyBeyond(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gram: Tensor, projected: Tensor, weights: Tensor) -> Tensor:
        weights = weights.unsqueeze(-2)
        ctx.save_for_backward(gram, projected, weights)
        return energy(gram) - 2.0 * (power(projected) * weights).sum((-2, -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        gram, projected, weights = ctx.saved_tensors
        grad = grad[..., None, None]
        to_gram = multiply(gram, 2.0 * grad).sum_to_size(gram.shape)
        to_projected = multiply(projected, (-4.0 * grad) * weights).sum_to_size(projected.shape)
        return to_gram, to_projected, None
