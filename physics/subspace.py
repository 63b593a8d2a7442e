"""The dominant subspace of a covariance, from its Gram matrix, with a safe gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from physics.eigen import eigh_trusting
from physics.scaling import column_energy, divide, multiply


def dominant_energy(
    gram: Tensor, projected: Tensor, n_sources: int | Tensor, at_most: int | None = None
) -> Tensor:
    """``||U_K^H v||^2`` (…, G) for the subspace U_K of the K largest eigenvalues of ``F F^H``.

    U_K is never formed; see :func:`dominant_weights`.

    Args:
        gram: F^H F (…, r, r) Hermitian.
        projected: ``conj(F^H v)`` (…, r, G).
        n_sources: K, one for all or (…) one for each batch item; clamped to r.
        at_most: an upper bound on K, which saves work.
    """
    return column_energy(dominant_weights(gram, n_sources, at_most).mT @ projected)


def dominant_weights(
    gram: Tensor, n_sources: int | Tensor, at_most: int | None = None, *, trusting: bool = False
) -> Tensor:
    """``W = V_K Lambda_K^-1/2`` (…, r, at_most) of ``F^H F = V Lambda V^H``: ``U_K = F W``.

    U_K are the eigenvectors of the K largest eigenvalues of ``F F^H``. Columns beyond K are zero,
    and so are those of eigenvalues below the rounding of the largest one. NaN in one batch item
    does not affect the others.

    The gradient is that of ``W W^H``: results computed from W must depend on ``W W^H`` only, as
    ``||U_K^H v||^2`` does, since eigenvectors are defined up to rotations. It is the gradient of a
    matrix function (Daleckii and Krein, 1965), which weights ``V^H dG V`` with divided differences
    of ``f = 1/lambda`` on the K largest eigenvalues and 0 on the others. Inside the subspace they
    are ``-1/(lambda_i lambda_j)``, regular however close the eigenvalues lie; only across the gap
    can ``1/(lambda_i (lambda_i - lambda_j))`` blow up, and there ``1/d`` is broadened to
    ``d / (d^2 + eps^2)``.

    Args:
        gram: F^H F (…, r, r) Hermitian.
        n_sources: K, one for all or (…) one for each batch item; clamped to r.
        at_most: an upper bound on K, which saves work.
        trusting: do not wait to check whether the eigendecomposition succeeded; where it failed, W
            is NaN (:func:`physics.eigen.eigh_trusting`).

    Raises:
        torch.linalg.LinAlgError: it failed and ``trusting`` is False.
    """
    counts = torch.as_tensor(n_sources, device=gram.device)
    rank = gram.shape[-1]
    if isinstance(n_sources, int):
        at_most = n_sources
    n_top = rank if at_most is None else max(0, min(at_most, rank))
    weights: Tensor = _DominantWeights.apply(gram, counts, n_top, trusting)
    return weights


class _DominantWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gram: Tensor, n_sources: Tensor, n_top: int, trusting: bool) -> Tensor:
        # eigh raises on NaN; items with NaN return NaN instead, without affecting the others.
        total = torch.view_as_real(gram.resolve_conj()).sum((-3, -2, -1))
        broken = (total.abs() < torch.inf).logical_not()
        sound = gram.masked_fill(broken[..., None, None], 0.0)
        if trusting:
            values, vectors, failed = eigh_trusting(sound)
            broken = broken | failed
        else:
            values, vectors = torch.linalg.eigh(sound)
        rank = gram.shape[-1]
        kind = torch.finfo(values.dtype)
        # In units of the largest eigenvalue, so that no square over- or underflows.
        unit = values[..., -1].clamp_min(kind.tiny).masked_fill(broken, torch.nan).unsqueeze(-1)
        relative = values / unit
        order = torch.arange(rank, 0, -1, device=gram.device)
        beyond = order > n_sources.clamp_max(n_top).unsqueeze(-1)
        root = relative.masked_fill(beyond | (relative <= rank * kind.eps), torch.inf).rsqrt()
        scale = (root * unit.rsqrt())[..., rank - n_top :]
        ctx.batch_shape = gram.shape[:-2]
        ctx.save_for_backward(relative, vectors, root, scale, unit)
        return multiply(vectors[..., rank - n_top :], scale.unsqueeze(-2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        relative, vectors, root, scale, unit = ctx.saved_tensors
        n_rest = relative.shape[-1] - scale.shape[-1]
        gap = relative[..., n_rest:].unsqueeze(-2) - relative.unsqueeze(-1)
        broadening = (8.0 * relative.shape[-1] * torch.finfo(gap.dtype).eps) ** 2
        across = gap / (gap.square() + broadening)
        # Pairs inside the subspace count by half, since they occur as (j, k) and as (k, j).
        inside = -0.5 * root.square().unsqueeze(-1)
        divided = torch.where(inside < 0, inside, across) * (scale / unit).unsqueeze(-2)
        # With M = dL/d(WW^H), grad is 2 M W, and V^H M V_K is V^H grad Lambda_K^1/2 / 2.
        core = multiply((grad.mH @ vectors).mH, divided)
        # Only the columns k: for a Hermitian matrix only the Hermitian part of this matters.
        to_gram = (core.mT @ vectors.mT).mT @ vectors[..., n_rest:].mH
        return to_gram.sum_to_size(*ctx.batch_shape, *to_gram.shape[-2:]), None, None, None


def orthonormal_weights(columns: Tensor) -> tuple[Tensor, Tensor]:
    """T (…, K, K) of an orthonormal basis A T of the span of A's columns, and its dimension (…).

    Computes ``A^H A = L D L^H`` without pivoting, column by column: ``T = L^-H D^-1/2``. A column
    that lies in the span of the previous ones to within the rounding of A adds no dimension: its
    column of T is zero. Double precision is used, since sources close to each other leave pivots
    near that rounding. The host reads no value.

    Args:
        columns: A (…, N, K) complex of similar norm, except for zero columns.

    Source: Golub and Van Loan, "Matrix Computations", 4th ed., 2013, sec. 4.1.2.
    """
    exact = columns.to(torch.complex128)
    rest = exact.mH @ exact
    diagonal = rest.diagonal(dim1=-2, dim2=-1).real
    rounding = columns.shape[-2] * torch.finfo(columns.dtype).eps
    least = rounding * diagonal.amax(-1)
    factor, pivots = [], []
    for k in range(columns.shape[-1]):
        pivot = rest[..., k, k].real
        pivot = torch.where(pivot > least, pivot, torch.inf)
        column = divide(rest[..., :, k], pivot.unsqueeze(-1))
        rest = rest - column.unsqueeze(-1) * rest[..., k, :].unsqueeze(-2)
        factor.append(column)
        pivots.append(pivot)
    scale = torch.stack(pivots, dim=-1).rsqrt()  # (…, K), 0 where a column adds no dimension
    weights = torch.linalg.solve_triangular(
        torch.stack(factor, dim=-1).mH,
        torch.diag_embed(scale.to(exact.dtype)),
        upper=True,
        unitriangular=True,
    )
    return weights.to(columns.dtype), (scale > 0).sum(-1)
