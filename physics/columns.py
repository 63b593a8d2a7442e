"""Columns of a covariance's factor, with cached products of them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from physics import products


def serves(kept: Tensor, wanted: bool) -> bool:
    """Whether a cached product may be used here; one made without a graph lacks the gradient."""
    if kept.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return kept.requires_grad or not (wanted and torch.is_grad_enabled())


def joined(parts: list[Tensor], dim: int) -> Tensor:
    """Concatenate parts along ``dim``, broadcasting the dimensions before it."""
    if len(parts) == 1:
        return parts[0]
    shapes = {part.shape[:dim] for part in parts}
    if len(shapes) > 1:
        batch = torch.broadcast_shapes(*shapes)
        parts = [part.expand(*batch, *part.shape[dim:]) for part in parts]
    return torch.cat(parts, dim=dim)


def _version(tensor: Tensor) -> int:
    """Count of in-place changes; -2, which never matches, for inference tensors (no counter)."""
    return -2 if tensor.is_inference() else tensor._version


class Block:
    """Columns C (…, N, r) of one tensor, with their Gram matrix and latest projection cached."""

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
            self._gram, self._gram_version = products.gram(self.columns.mT), version
        return self._gram

    def across(self, other: Block) -> Tensor:
        """C^H D (…, r, s) of other columns D."""
        return products.inner_products(self.columns.mT, other.columns.mT)

    def project(self, vectors: Tensor) -> Tensor:
        """conj(C^H v) (…, r, G)."""
        if vectors.ndim == 2:
            rows = self.columns.mT.reshape(-1, self.columns.shape[-2])
            return (rows @ vectors.mH).unflatten(0, (*self.columns.shape[:-2], self.rank))
        wanted = self.columns.requires_grad or vectors.requires_grad
        seen = self._vectors is vectors and self._vectors_version == _version(vectors) >= 0
        if self._projected is None or not (seen and serves(self._projected, wanted)):
            self._vectors, self._vectors_version = vectors, _version(vectors)
            # The few vectors go on the left: MKL takes twice as long for the transposed product.
            self._projected = products.inner_products(vectors, self.columns.mT).mT
        return self._projected


class Columns:
    """Columns C (…, N, r) of a factor, in blocks.

    Covariances that weight the same columns differently share them. The blocks are those of the
    parts of a blend: products cached for a part are reused by the blend, and backward skips the
    blocks that need no gradient.
    """

    def __init__(self, *blocks: Block) -> None:
        self.blocks = blocks

    def __add__(self, other: Columns) -> Columns:
        return Columns(*self.blocks, *other.blocks)

    def detach(self) -> Columns:
        """Cut from the graph."""
        return Columns(*(Block(block.columns.detach()) for block in self.blocks))

    @property
    def first(self) -> Tensor:
        """Columns of the first block (…, N, r_1); all blocks agree in N, dtype and device."""
        return self.blocks[0].columns

    @property
    def ranks(self) -> list[int]:
        """Number of columns of each block."""
        return [block.rank for block in self.blocks]

    @property
    def batch_shape(self) -> torch.Size:
        """Leading shape."""
        return torch.broadcast_shapes(*(block.columns.shape[:-2] for block in self.blocks))

    @property
    def requires_grad(self) -> bool:
        """Whether any of the columns require a gradient."""
        return any(block.columns.requires_grad for block in self.blocks)

    def together(self) -> Tensor:
        """C (…, N, r)."""
        return joined([block.columns for block in self.blocks], dim=-1)

    def gram(self) -> Tensor:
        """C^H C (…, r, r)."""
        rows: list[list[Tensor]] = []
        for i, one in enumerate(self.blocks):
            before = [rows[j][i].mH for j in range(i)]
            after = [one.across(other) for other in self.blocks[i + 1 :]]
            rows.append([*before, one.gram(), *after])
        return joined([joined(row, dim=-1) for row in rows], dim=-2)

    def project(self, vectors: Tensor) -> Tensor:
        """conj(C^H v) (…, r, G) of row vectors (…, G, N)."""
        return joined([block.project(vectors) for block in self.blocks], dim=-2)

    def combined(self, weights: Tensor) -> Tensor:
        """Vectors C W as rows (…, K, N), for weights W (…, r, K)."""
        parts = zip(weights.split(self.ranks, dim=-2), self.blocks, strict=True)
        vectors = [products.combined(part, block.columns.mT) for part, block in parts]
        return functools.reduce(torch.add, vectors)
