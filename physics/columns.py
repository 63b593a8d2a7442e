"""Columns of a covariance's factor, and what was computed of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from physics.scaling import multiply


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
        return (rows @ rows.mH).conj().resolve_conj()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        return (grad + grad.mH).mT @ rows


@dataclass
class _Kept:
    """Products of columns: their Gram matrix, and the projection of the vectors seen last."""

    gram: Tensor | None = None
    of_version: int = -1
    vectors: Tensor | None = None
    version: int = -1
    projected: Tensor | None = None

    def saw(self, vectors: Tensor) -> bool:
        """Whether the kept projection is of these vectors, unchanged since."""
        return self.vectors is vectors and self.version == _version(vectors) >= 0


class Columns:
    """Columns F = C diag(s) of a factor.

    The columns C and what was computed of them are shared by the blocks that differ in s alone.
    """

    def __init__(self, columns: Tensor, amplitudes: Tensor | None = None) -> None:
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
        if amplitudes is not None and (
            amplitudes.is_complex() or amplitudes.shape[-1:] != columns.shape[-1:]
        ):
            raise ValueError(
                f"amplitudes are {amplitudes.dtype} of shape {tuple(amplitudes.shape)}; expected "
                f"a real tensor (..., {columns.shape[-1]}), one for each column"
            )
        self.columns, self._amplitudes = columns, amplitudes
        self._kept = _Kept()

    def reweighted(self, amplitudes: Tensor) -> Columns:
        """The same columns with other amplitudes (…, r)."""
        other = Columns(self.columns, amplitudes)
        other._kept = self._kept
        return other

    def scaled(self, root: Tensor) -> Columns:
        """The same columns with amplitudes times ``root`` (…)."""
        return self.reweighted(root.unsqueeze(-1) * self.amplitudes)

    def detach(self) -> Columns:
        """Cut from the graph."""
        amplitudes = None if self._amplitudes is None else self._amplitudes.detach()
        return Columns(self.columns.detach(), amplitudes)

    @property
    def rank(self) -> int:
        """Number of columns."""
        return self.columns.shape[-1]

    @property
    def batch_shape(self) -> torch.Size:
        """Leading shape."""
        return torch.broadcast_shapes(self.columns.shape[:-2], self.amplitudes.shape[:-1])

    @property
    def amplitudes(self) -> Tensor:
        """s (…, r)."""
        if self._amplitudes is None:
            return self.columns.real.new_ones(self.rank)
        return self._amplitudes

    @property
    def wants_gradient(self) -> bool:
        """Whether a gradient is to flow into it."""
        amplitudes = self._amplitudes
        return self.columns.requires_grad or (amplitudes is not None and amplitudes.requires_grad)

    def factor(self) -> Tensor:
        """F (…, N, r)."""
        return self._weighted(self.columns, self._amplitudes, -2)

    def gram(self) -> Tensor:
        """F^H F (…, r, r)."""
        kept = self._kept
        version = _version(self.columns)
        fresh = kept.of_version == version >= 0
        if kept.gram is None or not (fresh and serves(kept.gram, self.columns.requires_grad)):
            kept.of_version = version
            kept.gram = _Gram.apply(self.columns.mT)
        return self._outer_weighted(kept.gram, self)

    def across(self, other: Columns) -> Tensor:
        """F^H G (…, r, s) of another block G."""
        return self._outer_weighted(self.columns.mH @ other.columns, other)

    def project(self, vectors: Tensor) -> Tensor:
        """conj(F^H v) (…, r, G)."""
        if vectors.ndim == 2:
            rows = self.columns.mT.reshape(-1, self.columns.shape[-2])
            product = (rows @ vectors.mH).unflatten(0, (*self.columns.shape[:-2], self.rank))
            return self._weighted(product, self._amplitudes, -1)
        kept = self._kept
        wanted = self.columns.requires_grad or vectors.requires_grad
        if kept.projected is None or not (kept.saw(vectors) and serves(kept.projected, wanted)):
            kept.vectors, kept.version = vectors, _version(vectors)
            kept.projected = self.columns.mT @ vectors.mH
        return self._weighted(kept.projected, self._amplitudes, -1)

    def _outer_weighted(self, product: Tensor, other: Columns) -> Tensor:
        if self._amplitudes is None and other._amplitudes is None:
            return product
        return multiply(product, self.amplitudes.unsqueeze(-1) * other.amplitudes.unsqueeze(-2))

    @staticmethod
    def _weighted(product: Tensor, amplitudes: Tensor | None, dim: int) -> Tensor:
        return product if amplitudes is None else multiply(product, amplitudes.unsqueeze(dim))
