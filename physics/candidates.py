"""Candidate sources of an overcomplete matching pursuit, with the likelihood of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from physics.config import FrozenModel
from physics.fit import Fit, Measurement, coordinate_covariance, position_of, refine
from physics.geometry import PlanarArray, direction
from physics.order import conditional_deviance, symbol_powers
from physics.precision import in_full_precision
from physics.pursuit import PursuitConfig, Search
from physics.rows import Rows
from physics.scaling import power
from physics.scene import SceneConfig
from physics.steering import Wavefront, steering_vector

# Increment when the candidates of the same scenes change, so that older cached ones are not read.
VERSION = 4

# Powers at which a source's likelihood is averaged, relative to the fitted one: +-6 dB.
_POWERS = tuple(4.0 ** (step / 3.0) for step in range(-3, 4))
_SPREAD = 4.0  # standard deviations of inverse range that the cells of a candidate reach
_WEAKEST = 1e-9  # fraction of the strongest candidate's power that counts as no power
_REFUTED = 10.0  # log-likelihood below the best at which a wave model is rejected


class CandidateConfig(FrozenModel):
    """How candidates are found."""

    count: int = Field(
        6,
        ge=1,
        description="candidates that the pursuit takes per scene, at least scene.max_sources",
    )
    range_cells: int = Field(24, ge=2, description="ranges at which each candidate is judged")
    waves: tuple[Literal["spherical", "fresnel", "paraxial"], ...] = Field(
        (),
        max_length=2,
        description="wave models, in addition to scene.wavefront, by which each candidate is "
        "judged",
    )
    search: PursuitConfig = PursuitConfig()

    def check_waves(self, nominal: Wavefront) -> None:
        """Raise ValueError for a wave model named twice or combined with plane waves."""
        if self.waves and nominal == "planar":
            raise ValueError(
                f"waves {list(self.waves)} beside scene.wavefront planar: plane waves have no "
                "range, and cannot be one of several models; name none, or another wavefront"
            )
        for index, wavefront in enumerate(self.waves):
            if wavefront == nominal or wavefront in self.waves[:index]:
                raise ValueError(
                    f"waves {list(self.waves)} beside scene.wavefront {nominal}: {wavefront} "
                    "stands there twice; name other models of the waves, each once"
                )


@dataclass(frozen=True)
class Candidates(Rows):
    """Candidate sources of B scenes in the order in which the pursuit picked them.

    No field depends on the scale of y, H or codes: powers are relative to the noise. For a
    candidate that the criterion rejects, the fields of the W other wave models repeat the values
    of the nominal model.
    """

    coordinates: Tensor  # (B, P, 3) azimuth, elevation [rad], inverse range [1/m]
    covariance: Tensor  # (B, P, 3, 3) of their errors, as the fit predicts it
    power: Tensor  # (B, P) of the source, relative to the noise
    received: Tensor  # (B, P) energy over noise beyond the others, per snapshot; constant: total
    likely: Tensor  # (B, P) bool: whether the criterion keeps it
    evidence: Tensor  # (B, P) log-likelihood ratio of the source against none, others kept
    crowded: Tensor  # (B, P) the same, given all other candidates
    coherence: Tensor  # (B, P, P) |a_i^H a_j|
    range_m: Tensor  # (B, P, S) range cells [m], evenly spaced from near to far
    range_evidence: Tensor  # (B, P, S) log-likelihood ratio with the source in the cell
    deviance: Tensor  # (B, P + 1) twice the negative log-likelihood with the first 0..P
    misfit: Tensor  # (B,) residual's power over the noise
    other_coordinates: Tensor  # (B, P, W, 3) fitted with another wave model
    other_evidence: Tensor  # (B, P, W) under that model
    other_range_evidence: Tensor  # (B, P, W, S) under that model, in the same cells
    wave_evidence: Tensor  # (B, W) log-likelihood ratio of that model over the nominal, kept ones


@in_full_precision
@torch.no_grad()
def find_candidates(
    y: Tensor,
    H: Tensor,
    codes: Tensor,
    *,
    array: PlanarArray | None = None,
    scene: SceneConfig | None = None,
    snr_db: float | Tensor | None = None,
    config: CandidateConfig | None = None,
) -> Candidates:
    """Pick a fixed number of sources by matching pursuit and evaluate each given the others.

    The sources that the criterion keeps are refined without the rest and evaluated given one
    another; the rest are evaluated given all candidates. The evidence of a source is the logarithm
    of the likelihood with it over that without it, with its symbols integrated out as circular
    normal and its power averaged over +-6 dB around the fitted one, while the other sources stay
    fixed. The range cells reach four standard deviations of inverse range to both sides of the
    fit, within the field of view; where the residual is stronger than the noise, as with hardware
    errors, the standard deviations grow with the root of their ratio (Birge's ratio).

    The kept sources are fitted again with each other wave model, starting from the coordinates at
    which both models have the same curvature, and are evaluated as with the nominal model. The
    cells then cover those of every model that is not rejected.

    Args:
        y: (B, L, M) complex.
        H: (B, M, N) or (M, N) complex.
        codes: (B, L, N) or (L, N) complex.
        array: the surface; 12 x 12 at half a wavelength if left out.
        scene: field of view, wavefront and source mode.
        snr_db: (B,) or one for all [dB]; None where it is unknown: the noise is then estimated.
        config: number of candidates and search settings.

    Raises:
        TypeError, ValueError: as :func:`physics.nomp`, or more candidates than the measurement can
            resolve.

    Source: Birge's ratio: Birge, "The calculation of errors by the method of least squares",
    Phys. Rev. 40(2), 1932.
    """
    config = config or CandidateConfig()
    array, scene = array or PlanarArray(), scene or SceneConfig()
    search = Search(array, scene, config.search, y, H, codes)
    if config.count > search.resolvable:
        raise ValueError(
            f"{config.count} candidates asked; {search.n_snapshots} snapshots of {y.shape[-1]} "
            f"antennas tell at most {search.resolvable} {scene.source_mode} sources apart"
        )
    config.check_waves(scene.wavefront)
    parts = [
        _of_chunk(search, measurement, noise, config)
        for _, measurement, noise in search.chunks(snr_db, None)
    ]
    return Candidates.concatenate(parts) if parts else _nothing(search, config)


def _of_chunk(
    search: Search, measurement: Measurement, noise: Tensor | None, config: CandidateConfig
) -> Candidates:
    best = conditional_deviance(measurement, measurement.energy, noise)
    deviance, count = [best], torch.zeros_like(best, dtype=torch.int64)
    coordinates = search.points.new_zeros(len(measurement), 0, 3)
    kept, residual = coordinates.new_ones(len(measurement), config.count, 3), measurement.y
    for k in range(1, config.count + 1):
        fit, matrix = search.grow(measurement, coordinates, residual)
        coordinates, residual = fit.coordinates, fit.residual
        deviance.append(search.deviance(measurement, fit, noise))
        value = deviance[-1] + k * search.price
        gain = (value < best) & (k <= search.max_sources)
        best, count = torch.where(gain, value, best), torch.where(gain, k, count)
        kept[gain, :k] = coordinates[gain]
    every = _State.of(search, measurement, (fit, matrix), noise)
    # The kept sources are refined without the others, which fit noise.
    likely = torch.arange(config.count, device=count.device) < count.unsqueeze(-1)
    start = torch.where(likely.unsqueeze(-1), kept, coordinates)
    steps = search.config.joint_iterations
    found = refine(measurement, start, search.bounds, steps, likely)
    alone, others = _State.of(search, measurement, found, noise), []
    for wavefront in config.waves:
        bent = replace(measurement, wavefront=wavefront)
        start = _as_bent(alone.fit.coordinates, search.scene.wavefront, wavefront)
        found = refine(bent, start, search.bounds, steps, likely)
        others.append(_State.of(search, bent, found, noise))

    def pick(one: Tensor, two: Tensor) -> Tensor:
        return torch.where(likely.view(*likely.shape, *(1,) * (one.ndim - 2)), one, two)

    # Residuals beyond the noise are scaled by the residual power of the best model.
    models = [alone, *others]
    scale = torch.stack([state.misfit for state in models]).amin(0).clamp_min(1.0)
    fitted = torch.stack([-0.5 * state.deviance / scale for state in models], dim=-1)
    possible = fitted >= fitted.amax(-1, keepdim=True) - _REFUTED
    near, far = (
        torch.stack([getattr(state, side) for state in models], dim=-1) for side in ("near", "far")
    )
    near = near.masked_fill(~possible.unsqueeze(1), torch.inf).amin(-1)
    far = far.masked_fill(~possible.unsqueeze(1), -torch.inf).amax(-1)
    near, far = pick(near, every.near), pick(far, every.far)
    shares = torch.linspace(0.0, 1.0, config.range_cells, device=near.device, dtype=near.dtype)
    cells = torch.lerp(near.unsqueeze(-1), far.unsqueeze(-1), shares)
    (crowd, crowded, crowd_cells), (received, evidence, in_cells), *by_others = (
        state.judged(cells) for state in (every, alone, *others)
    )
    coordinates = pick(alone.fit.coordinates, every.fit.coordinates)
    evidence, in_cells = pick(evidence, crowded), pick(in_cells, crowd_cells)
    a = steering_vector(position_of(coordinates), search.array, search.scene.wavefront)

    def of_others(values: list[Tensor], nominal: Tensor) -> Tensor:
        """(B, P, W, ...): values of the other wave models for kept candidates."""
        parts = [pick(value, nominal).unsqueeze(2) for value in values]
        return torch.cat([nominal.unsqueeze(2)[:, :, :0], *parts], dim=2)

    return Candidates(
        coordinates=coordinates,
        covariance=pick(alone.covariance, every.covariance),
        power=pick(alone.relative_power, every.relative_power),
        received=pick(received, crowd),
        likely=likely,
        evidence=evidence,
        crowded=crowded,
        coherence=power(a.conj() @ a.mT).sqrt(),
        range_m=cells,
        range_evidence=in_cells,
        deviance=torch.stack(deviance, dim=-1),
        misfit=every.misfit,
        other_coordinates=of_others([state.fit.coordinates for state in others], coordinates),
        other_evidence=of_others([by for _, by, _ in by_others], evidence),
        other_range_evidence=of_others([by for *_, by in by_others], in_cells),
        wave_evidence=fitted[:, 1:] - fitted[:, :1],
    )


def _as_bent(coordinates: Tensor, assumed: Wavefront, wavefront: Wavefront) -> Tensor:
    """Coordinates (B, K, 3) at which one wave model has the curvature of another.

    The mean curvature of the waves across the surface is the inverse range, or that times
    ``1 - (u^2 + v^2) / 2`` where the direction cosines (u, v) along the surface foreshorten it.
    """
    u = direction(coordinates[..., 0], coordinates[..., 1])
    foreshortened = 1.0 - 0.5 * u[..., :2].square().sum(-1)
    bend = coordinates[..., 2]
    bend = bend if assumed == "paraxial" else bend * foreshortened
    inverse_range = bend if wavefront == "paraxial" else bend / foreshortened
    return torch.cat([coordinates[..., :2], inverse_range.unsqueeze(-1)], dim=-1)


@dataclass(frozen=True)
class _State:
    """A fit and the quantities derived from it; absent sources have no power."""

    measurement: Measurement
    fit: Fit
    power: Tensor  # (B, P)
    noise_power: Tensor  # (B,)
    covariance: Tensor  # (B, P, 3, 3) of azimuth, elevation and inverse range
    misfit: Tensor  # (B,)
    near: Tensor  # (B, P) [m], of the range cells
    far: Tensor  # (B, P) [m]
    deviance: Tensor  # (B,)

    @classmethod
    def of(
        cls,
        search: Search,
        measurement: Measurement,
        found: tuple[Fit, Tensor],
        noise: Tensor | None,
    ) -> _State:
        fit, matrix = found
        n_sources = fit.coordinates.shape[1]
        symbols = symbol_powers(measurement, fit, noise)
        sigma2 = symbols.noise_power
        covariance = coordinate_covariance(matrix, sigma2).unflatten(-1, (n_sources, 3))
        own = covariance.unflatten(1, (n_sources, 3)).diagonal(dim1=1, dim2=3).movedim(-1, 1)
        q, (low, high) = fit.coordinates[..., 2], search.bounds[:, 2]
        misfit = fit.cost / search.n_rows / sigma2
        variance = own[..., 2, 2].clamp_min(0.0) * misfit.clamp_min(1.0).unsqueeze(-1)
        width = _SPREAD * variance.sqrt()
        far, near = ((q + side).clamp(low, high).reciprocal() for side in (-width, width))
        deviance = search.deviance(measurement, fit, noise)
        return cls(measurement, fit, symbols.power, sigma2, own, misfit, near, far, deviance)

    @property
    def relative_power(self) -> Tensor:
        """Power (B, P) relative to the noise."""
        return self.power / self.noise_power.unsqueeze(-1)

    def judged(self, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Energy over noise (B, P), and log-likelihood ratios at the fit (B, P) and in the cells.

        Args:
            cells: (B, P, S) ranges [m].
        """
        position = self.fit.position
        ranges = torch.cat([position[..., 2:], cells], dim=-1)
        received, evidence = _evidence(
            self.measurement, position, ranges, self.power, self.noise_power
        )
        return received, evidence[..., 0], evidence[..., 1:]


def _evidence(
    measurement: Measurement,
    position: Tensor,  # (B, P, 3)
    ranges: Tensor,  # (B, P, S) [m], the candidate's own first
    powers: Tensor,  # (B, P)
    sigma2: Tensor,  # (B,)
) -> tuple[Tensor, Tensor]:
    """Energy over noise (B, P) at the first cell, and log-likelihood ratios (B, P, S).

    With C_i the covariance of a group without source i, a source of power p and signal g adds
    ``p |g^H C_i^-1 y|^2 / (1 + p g^H C_i^-1 g) - log(1 + p g^H C_i^-1 g)``. C_i^-1 is applied
    through the P x P matrix of the other sources (Woodbury).
    """
    n_candidates, n_cells = ranges.shape[1:]
    directions = position[:, :, None, :2].expand(-1, -1, n_cells, -1)
    a = steering_vector(
        torch.cat([directions, ranges.unsqueeze(-1)], dim=-1),
        measurement.array,
        measurement.wavefront,
    )
    atoms = measurement.rows(a.flatten(1, 2)).unflatten(2, (n_candidates, n_cells))
    others = atoms[..., 0, :]  # (B, G, P, R)
    conjugate = others.conj().resolve_conj()
    weakest = _WEAKEST * powers.amax(-1, keepdim=True) + torch.finfo(powers.dtype).tiny
    load = (sigma2.unsqueeze(-1) / powers.maximum(weakest))[:, None]  # (B, 1, P)
    gram = conjugate @ others.mT
    # The load is capped so that a source without power removes no more than rounding.
    kind = torch.finfo(load.dtype)
    most = gram.diagonal(dim1=-2, dim2=-1).real.amax(-1, keepdim=True) / kind.eps
    most = most.clamp_min(kind.tiny)  # for a channel that is zero
    system = (gram + torch.diag_embed(load.minimum(most)).to(gram.dtype)).unsqueeze(2)
    # Leaving source i out: its row and column become those of the identity.
    eye = torch.eye(n_candidates, dtype=system.real.dtype, device=system.device)
    kept = 1.0 - eye  # (i, j)
    system = system * (kept.unsqueeze(-1) * kept.unsqueeze(-2))
    system = system + torch.diag_embed(eye).to(system.dtype)
    cholesky = torch.linalg.cholesky_ex(system)[0]  # (B, G, i, P, P)
    flat = atoms.flatten(2, 3)
    cross = (conjugate @ flat.mT).unflatten(-1, (n_candidates, n_cells)).transpose(2, 3)
    seen = (conjugate @ measurement.y.unsqueeze(-1)).unsqueeze(2)
    right = torch.cat([cross, seen.expand(*cross.shape[:-1], 1)], dim=-1) * kept.unsqueeze(-1)
    half = torch.linalg.solve_triangular(cholesky, right, upper=False)
    shared, of_y = half[..., :-1], half[..., -1:]
    # Powers relative to the noise: all 0 where there is neither power nor noise.
    relative = (powers / sigma2.unsqueeze(-1))[:, None, :, None]
    energy = (power(atoms).sum(-1) - power(shared).sum(-2)).clamp_min(0.0)
    direct = (flat.conj() @ measurement.y.unsqueeze(-1)).squeeze(-1)
    direct = direct.unflatten(-1, (n_candidates, n_cells))
    correlation = power(direct - (shared.conj() * of_y).sum(-2)) / sigma2[:, None, None, None]
    total = []
    for factor in _POWERS:
        p = factor * relative
        gain = p * energy
        total.append((p * correlation / (1.0 + gain) - torch.log1p(gain)).sum(1))
    evidence = torch.logsumexp(torch.stack(total), dim=0) - math.log(len(_POWERS))
    return (relative * energy)[..., 0].mean(1), evidence


def _nothing(search: Search, config: CandidateConfig) -> Candidates:
    """The candidates of an empty batch."""
    p, s, w = config.count, config.range_cells, len(config.waves)
    none = search.points.new_zeros
    return Candidates(
        coordinates=none(0, p, 3),
        covariance=none(0, p, 3, 3),
        power=none(0, p),
        received=none(0, p),
        likely=none(0, p) > 0,
        evidence=none(0, p),
        crowded=none(0, p),
        coherence=none(0, p, p),
        range_m=none(0, p, s),
        range_evidence=none(0, p, s),
        deviance=none(0, p + 1),
        misfit=none(0),
        other_coordinates=none(0, p, w, 3),
        other_evidence=none(0, p, w),
        other_range_evidence=none(0, p, w, s),
        wave_evidence=none(0, w),
    )
