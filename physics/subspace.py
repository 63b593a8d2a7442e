"""Energy in the dominant subspace of a covariance, from its Gram matrix, with a safe gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from physics.scaling import multiply, power


def dominant_energy(
    gram: Tensor, projected: Tensor, n_sources: int | Tensor, at_most: int | None = None
) -> Tensor:
    """``||U_K^H v||^2`` (…, G) for the subspace U_K of the K largest eigenvalues of ``F F^H``.

    With ``F^H F = V Lambda V^H`` it is ``sum_k |v_k^H F^H v|^2 / lambda_k``: U_K is never formed.
    Eigenvalues below the rounding of the largest one add nothing. NaN in one batch item stays
    there.

    The gradient is that of a matrix function (Daleckii and Krein, 1965), which weighs
    ``V^H dG V`` with divided differences of ``f = 1/lambda`` on the K largest eigenvalues and 0 on
    the others. Inside the subspace they are ``-1/(lambda_i lambda_j)``, regular however close the
    eigenvalues lie; only across the gap ``1/(lambda_i (lambda_i - lambda_j))`` can blow up, and
    there ``1/d`` is broadened to ``d / (d^2 + eps^2)``.

    Args:
        gram: F^H F (…, r, r) Hermitian.
        projected: ``conj(F^H v)`` (…, r, G).
        n_sources: K, one for all or (…) one for each batch item; at most r counts.
        at_most: a bound on K, which saves work.
    """
    counts = torch.as_tensor(n_sources, device=gram.device)
    batch = torch.broadcast_shapes(counts.shape, gram.shape[:-2], projected.shape[:-2])
    rank = gram.shape[-1]
    if isinstance(n_sources, int):
        at_most = n_sources
    energy: Tensor = _DominantEnergy.apply(
        gram.expand(*batch, *gram.shape[-2:]),
        projected.expand(*batch, *projected.shape[-2:]),
        counts.expand(batch),
        rank if at_most is None else max(0, min(at_most, rank)),
    )
    return energy


class _DominantEnergy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gram: Tensor, projected: Tensor, n_sources: Tensor, n_top: int) -> Tensor:
        # eigh raises on NaN; such items go through as NaN instead, and only they.
        finite = torch.isfinite(torch.view_as_real(gram.resolve_conj()).sum((-3, -2, -1)))
        values, vectors = torch.linalg.eigh(torch.where(finite[..., None, None], gram, 0.0))
        rank = gram.shape[-1]
        kind = torch.finfo(values.dtype)
        floor = (values[..., -1:] * (rank * kind.eps)).clamp_min(kind.tiny)
        order = torch.arange(rank - n_top, rank, device=gram.device)
        top = values[..., rank - n_top :]
        signal = (order >= rank - n_sources.unsqueeze(-1)) & (top > floor)
        inverse = torch.where(signal, top, torch.inf).reciprocal()
        inverse = torch.where(finite.unsqueeze(-1), inverse, torch.nan)
        ctx.save_for_backward(projected, values, vectors, inverse, signal, floor)
        seen = vectors[..., rank - n_top :].mT @ projected
        return (power(seen) * inverse.unsqueeze(-1)).sum(-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        projected, values, vectors, inverse, signal, floor = ctx.saved_tensors
        n_top = inverse.shape[-1]
        n_rest = values.shape[-1] - n_top
        top = vectors[..., n_rest:]
        seen = vectors.mT @ projected
        weighted = multiply(seen[..., n_rest:, :], grad.unsqueeze(-2))
        to_projected = to_gram = None
        if ctx.needs_input_grad[1]:
            to_projected = top.conj() @ multiply(weighted, 2.0 * inverse.unsqueeze(-1))
        if ctx.needs_input_grad[0]:
            divided = _divided_differences(values, inverse, signal, floor)
            # Pairs inside the top are met twice, as (i, j) and as (j, i).
            divided[..., n_rest:] *= 0.5
            core = multiply(weighted.conj() @ seen.mT, divided)
            half = top @ core @ vectors.mH
            to_gram = half + half.mH
        return to_gram, to_projected, None, None


def _divided_differences(values: Tensor, inverse: Tensor, signal: Tensor, floor: Tensor) -> Tensor:
    """``(f_i - f_j) / (lambda_i - lambda_j)`` (…, K, r) of the top eigenvalues against all."""
    n_rest = values.shape[-1] - inverse.shape[-1]
    rest = values.new_zeros(1).expand(*values.shape[:-1], n_rest)
    f = torch.cat([rest, inverse], dim=-1)
    in_signal = torch.cat([rest > 0, signal], dim=-1).unsqueeze(-2)
    # In units of the largest eigenvalue, so that no square over- or underflows.
    unit = values[..., -1:].clamp_min(torch.finfo(values.dtype).tiny)
    relative = values / unit
    gap = relative[..., n_rest:].unsqueeze(-1) - relative.unsqueeze(-2)
    broadening = (8.0 * floor / unit).square().unsqueeze(-1)
    across = gap / (gap.square() + broadening) / unit.unsqueeze(-1)
    difference = (inverse.unsqueeze(-1) - f.unsqueeze(-2)) * across
    inside = -inverse.unsqueeze(-1) * f.unsqueeze(-2)
    return torch.where(signal.unsqueeze(-1) != in_signal, difference, inside)
