"""Spectra as a projection on few vectors: evaluation at many points, and local maximisation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from physics.covariance import LowRankCovariance
from physics.fit import position_of
from physics.geometry import PlanarArray
from physics.precision import in_full_precision
from physics.scaling import multiply, power
from physics.steering import Wavefront, steering_derivatives

_BLOCK_BYTES = {"cpu": 2**21, "cuda": 2**28}  # of projections, to fit a core's cache
_REACH = 0.5  # longest step, as the distance that the steering vector moves (at most sqrt(2))
_FLATTEST = 1e-3  # smallest curvature that a step is divided by; the metric's is 1
_STILL = 100  # roundings; a coordinate that moves the steering vector less has no effect


@dataclass(frozen=True)
class SpectralForm:
    """A spectrum ``level / (1 - ||W a||^2)`` of unit-norm steering vectors a.

    MUSIC and MVDR both have this form (:func:`music_form`, :func:`mvdr_form`), so one search serves
    both. Autograd does not differentiate it.
    """

    rows: Tensor  # W (…, r, N) complex, ||W|| at most 1
    level: Tensor  # (…) real, above 0
    margin: float  # value of 1 - ||W a||^2 below which it is rounding

    def __getitem__(self, index: slice) -> SpectralForm:
        """A subset of the items."""
        return SpectralForm(self.rows[index], self.level[index], self.margin)

    def energy(self, vectors: Tensor) -> Tensor:
        """``||W a||^2`` (…, G) of row vectors (G, N) that all items share.

        Computes one real matrix product per block of vectors and items; each block's product stays
        in the cache, and the result is the only tensor of its size.
        """
        *batch, rank, size = self.rows.shape
        total = self.level.new_zeros((math.prod(batch), len(vectors)))
        if 0 in total.shape or rank == 0:
            return total.unflatten(0, batch) if batch else total.squeeze(0)
        # Re and Im of u^H a are products of (Re u, Im u) and (-Im u, Re u) with (Re a, Im a).
        parts = torch.cat([self.rows.conj(), 1j * self.rows.conj()], dim=-2).resolve_conj()
        real = torch.view_as_real(parts).reshape(len(total), 2 * rank, 2 * size)
        points = torch.view_as_real(vectors.resolve_conj()).flatten(1)
        room = _BLOCK_BYTES.get(total.device.type, 2**28) // total.element_size()
        n_items = max(1, min(len(total), room // 1024 // (2 * rank)))
        n_points = min(len(points), max(256, room // (2 * rank * n_items)))
        buffer = total.new_empty(n_items * 2 * rank * n_points)
        for first in range(0, len(points), n_points):
            some = points[first : first + n_points]
            for item in range(0, len(total), n_items):
                part = real[item : item + n_items]
                seen = buffer[: part.shape[0] * 2 * rank * len(some)].view(-1, len(some))
                torch.mm(part.reshape(-1, 2 * size), some.mT, out=seen)
                torch.sum(
                    seen.square_().view(len(part), 2 * rank, -1),
                    1,
                    out=total[item : item + n_items, first : first + n_points],
                )
        return total.unflatten(0, batch) if batch else total.squeeze(0)

    def height(self, energy: Tensor, *, in_place: bool = False) -> Tensor:
        """The spectrum (…, G) for ``energy`` (…, G), the values of ``||W a||^2``."""
        result = energy if in_place else energy.clone()
        result.neg_().add_(1.0).clamp_(self.margin, 1.0).reciprocal_()
        return result.mul_(self.level.unsqueeze(-1))


@in_full_precision
@torch.no_grad()
def music_form(covariance: LowRankCovariance, n_sources: int | Tensor) -> SpectralForm:
    """W = U_K^H, an orthonormal basis of the K dominant eigenvectors, and level 1.

    Rows with index K or the rank of R and above are 0.

    Args:
        covariance: R (…), size N.
        n_sources: K, one for all or (…).
    """
    unit = covariance.normalized()
    values, vectors = torch.linalg.eigh(unit.gram())
    kind = torch.finfo(values.dtype)
    counts = torch.as_tensor(n_sources, device=values.device)
    most = int(counts.max()) if counts.numel() else 0
    n_top = max(0, min(most, unit.rank, unit.size))
    top = vectors[..., unit.rank - n_top :].flip(-1)
    # Strongest first: QR removes the rounding residue of strong eigenvectors from weak ones.
    basis, _ = torch.linalg.qr(unit.factor @ top)
    floor = (values[..., -1:] * (unit.rank * kind.eps)).clamp_min(kind.tiny)
    order = torch.arange(n_top, device=values.device)
    signal = (values[..., unit.rank - n_top :].flip(-1) > floor) & (order < counts.unsqueeze(-1))
    batch = torch.broadcast_shapes(signal.shape[:-1], covariance.batch_shape)
    rows = multiply(basis.mH, signal.to(values.dtype).unsqueeze(-1))
    rows = rows.expand(*batch, n_top, unit.size)
    return SpectralForm(rows, values.new_ones(batch), 8 * kind.eps)


@in_full_precision
@torch.no_grad()
def mvdr_form(covariance: LowRankCovariance, loading: float = 1e-2) -> SpectralForm:
    """W with ``loading R^-1 = I - W^H W`` for R loaded by ``loading``, which is also the level.

    With ``F^H F = V Lambda V^H``, ``W = (Lambda + loading I)^-1/2 V^H F^H``.

    Args:
        covariance: R (…), size N; scaled to trace N.
        loading: relative to tr(R)/N, above 0.

    Raises:
        ValueError: loading not above 0.
    """
    check_loading(loading)
    loaded = covariance.normalized().loaded(loading)
    values, vectors = torch.linalg.eigh(loaded.gram())
    weight = (values.clamp_min(0.0) + loaded.loading.unsqueeze(-1)).rsqrt()
    rows = multiply((loaded.factor @ vectors).mH, weight.unsqueeze(-1))
    level = loaded.loading.expand(rows.shape[:-2])
    return SpectralForm(rows, level, torch.finfo(values.dtype).eps)


def check_loading(loading: float) -> None:
    """Raise ValueError unless the relative loading of MVDR is above 0."""
    if not loading > 0:
        raise ValueError(
            f"loading is {loading}; MVDR of a low-rank covariance needs it above 0: try 1e-2"
        )


@dataclass(frozen=True)
class _Slope:
    """``||W a||^2 / 2`` and its first and second derivatives at points."""

    energy: Tensor  # (B, C) ||W a||^2, without the factor 1/2
    gradient: Tensor  # (B, C, 3)
    curvature: Tensor  # (B, C, 3, 3) negative second derivatives
    metric: Tensor  # (B, C, 3) squared speed of the steering vector, up to its phase

    def where(self, chosen: Tensor, other: _Slope) -> _Slope:
        """This one where ``chosen`` (B, C) is True, the other elsewhere."""
        return _Slope(
            torch.where(chosen, self.energy, other.energy),
            torch.where(chosen[..., None], self.gradient, other.gradient),
            torch.where(chosen[..., None, None], self.curvature, other.curvature),
            torch.where(chosen[..., None], self.metric, other.metric),
        )


def _slope(
    form: SpectralForm, coordinates: Tensor, array: PlanarArray, wavefront: Wavefront
) -> _Slope:
    """Derivatives of ``||W a||^2 / 2`` with respect to azimuth, elevation and inverse range.

    The second derivatives are ``Re((W a_i)^H W a_j) + Re(v^H a_ij)`` with ``v = W^H W a`` and
    ``a_ij = (-k^2 d_i d_j - j k d_ij) a``. The term with the path's second derivatives ``d_ij`` is
    omitted: it is 0 where v is parallel to a, and smaller by wavelength / aperture elsewhere.
    """
    a, da = steering_derivatives(position_of(coordinates), array, wavefront)  # (B, C, (3,) N)
    seen = a @ form.rows.mT  # (B, C, r)
    moved = (da.flatten(1, 2) @ form.rows.mT).unflatten(1, da.shape[1:3])  # (B, C, 3, r)
    back = seen @ form.rows.conj()  # v (B, C, N)
    gradient = torch.einsum("bcn,bcin->bci", back.conj(), da).real
    bent = torch.view_as_real(da * (back.conj() * a).real.mul(array.size).unsqueeze(-2)).flatten(-2)
    curvature = bent @ torch.view_as_real(da).flatten(-2).mT
    moved = torch.view_as_real(moved).flatten(-2)
    curvature = curvature - moved @ moved.mT
    turning = torch.einsum("bcn,bcin->bci", a.conj(), da)
    metric = power(da).sum(-1) - power(turning)
    return _Slope(power(seen).sum(-1), gradient, curvature, metric)


@in_full_precision
@torch.no_grad()
def climb(
    form: SpectralForm,
    start: Tensor,
    bounds: Tensor,
    array: PlanarArray,
    wavefront: Wavefront = "spherical",
    n_steps: int = 8,
) -> tuple[Tensor, Tensor]:
    """Local maxima of a spectrum near the given points, by Newton's method in a box.

    Steps go uphill along every principal axis of the curvature, whatever its sign, and move the
    steering vector by at most a trust radius; a step that lowers the spectrum is rejected and the
    radius shrinks. A coordinate at its bound stays there while the gradient points outwards.

    Args:
        form: the spectra of B scenes, rows (B, r, N).
        start: (B, C, 3) azimuth, elevation [rad], inverse range [1/m].
        bounds: (2, 3) lowest and highest coordinates.
        array: the surface, N elements.
        wavefront: model of the steering vectors.
        n_steps: number of Newton steps.

    Returns:
        coordinates (B, C, 3) and ``||W a||^2`` there (B, C), never below its value at the start.

    Source: Dauphin et al., "Identifying and attacking the saddle point problem in high-dimensional
    non-convex optimization", NIPS 2014, algorithm 1 (the absolute curvature); Nocedal and Wright,
    "Numerical Optimization", 2nd ed., 2006, algorithm 4.1 (the trust radius).
    """
    low, high = bounds
    kind = torch.finfo(start.dtype)
    here = start.clamp(low, high)
    slope = _slope(form, here, array, wavefront)
    radius = torch.full_like(slope.energy, _REACH)
    for _ in range(n_steps):
        outward = ((here <= low) & (slope.gradient < 0)) | ((here >= high) & (slope.gradient > 0))
        still = outward | (slope.metric <= _STILL * kind.eps)
        unit = torch.where(still, 0.0, slope.metric.clamp_min(kind.tiny).rsqrt())
        scaled = slope.curvature * unit.unsqueeze(-1) * unit.unsqueeze(-2)
        values, axes = torch.linalg.eigh(scaled)
        along = (axes.mT @ (slope.gradient * unit).unsqueeze(-1)).squeeze(-1)
        step = (axes @ (along / values.abs().clamp_min(_FLATTEST)).unsqueeze(-1)).squeeze(-1)
        length = torch.linalg.vector_norm(step, dim=-1)
        step = step * (radius / length.clamp_min(kind.tiny)).clamp_max(1.0).unsqueeze(-1)
        there = (here + step * unit).clamp(low, high)
        new = _slope(form, there, array, wavefront)
        better = new.energy >= slope.energy
        radius = torch.where(
            better, (2.0 * radius).clamp_max(_REACH), 0.25 * torch.minimum(radius, length)
        )
        here = torch.where(better.unsqueeze(-1), there, here)
        slope = new.where(better, slope)
    return here, slope.energy
