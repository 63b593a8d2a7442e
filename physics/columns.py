"""Columns of a covariance's factor, and what was computed of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def serves(kept: Tensor, wanted: bool) -> bool:
    """Whether a kept product may be used here; one made without a graph lacks the gradient."""
    if kept.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return kept.requires_grad or not (wanted and torch.is_grad_enabled())


def _version(tensor: Tensor) -> int:
    """Counts changes in place; tensors of inference mode do not, and are never seen again."""
    return -2 if tensor.is_inference() else tensor._version


class _Gram(torch.autograd.Function):
    """``C^H C`` (…, r, r) of rows C^T (…, r, N); backward takes one product for the two sides."""

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
    """``C^H D`` (…, r, s) of rows C^T and D^T; backward conjugates no rows."""

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
    """``(C W)^T`` (…, K, N) of weights W (…, r, K) and rows C^T; backward conjugates no rows."""

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


class Columns:
    """Columns C (…, N, r) of a factor, and products of them that are kept.

    Covariances that scale or weigh the same columns differently share one of these.
    """

    def __init__(self, columns: Tensor) -> None:
        if not columns.is_complex() or columns.ndim < 2:
            raise ValueError(
                f"factor is {columns.dtype} of shape {tuple(columns.shape)}; "
                "expected a complex tensor (..., N, r)"
            )
        if 0 in columns.shape[-2:]:
            raise ValueError(
                f"factor has shape {tuple(columns.shape)}; expected at least one row and "
                "column (a zero column stands for rank 0)"
            )
        self.columns = columns
        self._gram: Tensor | None = None
        self._gram_version = -1
        self._vectors: Tensor | None = None
        self._vectors_version = -1
        self._projected: Tensor | None = None

    @property
    def rank(self) -> int:
        """Number of columns."""
        return self.columns.shape[-1]

    def gram(self) -> Tensor:
        """C^H C (…, r, r)."""
        version = _version(self.columns)
        fresh = self._gram_version == version >= 0
        if self._gram is None or not (fresh and serves(self._gram, self.columns.requires_grad)):
            self._gram, self._gram_version = _Gram.apply(self.columns.mT), version
        return self._gram

    def across(self, other: Columns) -> Tensor:
        """C^H D (…, r, s) of other columns D."""
        product: Tensor = _InnerProducts.apply(self.columns.mT, other.columns.mT)
        return product

    def project(self, vectors: Tensor) -> Tensor:
        """conj(C^H v) (…, r, G)."""
        if vectors.ndim == 2:
            rows = self.columns.mT.reshape(-1, self.columns.shape[-2])
            return (rows @ vectors.mH).unflatten(0, (*self.columns.shape[:-2], self.rank))
        wanted = self.columns.requires_grad or vectors.requires_grad
        seen = self._vectors is vectors and self._vectors_version == _version(vectors) >= 0
        if self._projected is None or not (seen and serves(self._projected, wanted)):
            self._vectors, self._vectors_version = vectors, _version(vectors)
            # Few rows times many columns, the other way around takes twice as long.
            self._projected = _InnerProducts.apply(vectors, self.columns.mT).mT
        return self._projected

    def combined(self, weights: Tensor) -> Tensor:
        """Vectors C W in rows (…, K, N), of weights W (…, r, K)."""
        vectors: Tensor = _Combined.apply(weights, self.columns.mT)
        return vectors
