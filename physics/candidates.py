"""Candidate sources: the states of an overcomplete matching pursuit, and how likely each one is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from physics.config import FrozenModel
from physics.fit import Fit, Measurement, coordinate_covariance, position_of, refine
from physics.geometry import PlanarArray
from physics.order import conditional_deviance, symbol_powers
from physics.precision import in_full_precision
from physics.pursuit import PursuitConfig, Search
from physics.rows import Rows
from physics.scaling import power
from physics.scene import SceneConfig
from physics.steering import steering_vector

# Raised when candidates of the same scenes change, so that none from before are read.
VERSION = 3

# Powers at which a source's likelihood is averaged, relative to the fitted one: +-6 dB.
_POWERS = tuple(4.0 ** (step / 3.0) for step in range(-3, 4))
_SPREAD = 4.0  # standard deviations of inverse range that the cells of a candidate reach
_WEAKEST = 1e-9  # of the strongest candidate's power: what counts as no power


class CandidateConfig(FrozenModel):
    """How candidates are found."""

    count: int = Field(6, ge=1, description="sources that the pursuit takes, more than there are")
    range_cells: int = Field(24, ge=2, description="ranges that each is judged at")
    search: PursuitConfig = PursuitConfig()


@dataclass(frozen=True)
class Candidates(Rows):
    """Candidate sources of B scenes in the order in which the pursuit took them.

    Nothing here depends on the scale of y, H or codes: powers are relative to the noise.
    """

    coordinates: Tensor  # (B, P, 3) azimuth, elevation [rad], inverse range [1/m]
    covariance: Tensor  # (B, P, 3, 3) of their errors, as the fit predicts it
    power: Tensor  # (B, P) of the source, relative to the noise
    received: Tensor  # (B, P) energy over noise beyond the others, a snapshot or (constant) all
    likely: Tensor  # (B, P) bool: whether the criterion keeps it
    evidence: Tensor  # (B, P) log-likelihood ratio of the source against none, others kept
    crowded: Tensor  # (B, P) the same beside all candidates
    coherence: Tensor  # (B, P, P) |a_i^H a_j|
    range_m: Tensor  # (B, P, S) cells [m], evenly spaced from near to far
    range_evidence: Tensor  # (B, P, S) log-likelihood ratio with the source in the cell
    deviance: Tensor  # (B, P + 1) twice the negative log-likelihood of the first 0..P
    misfit: Tensor  # (B,) residual's power over the noise


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
    """Take a fixed number of sources by matching pursuit, and judge each beside the others.

    The sources that the criterion keeps are refined without the rest and judged beside one
    another; the rest are judged beside all candidates. The evidence of a source is the logarithm
    of the likelihood with it over that without it, its symbols integrated out as circular normal
    and its power averaged over +-6 dB around the fitted one, while the other sources stay where
    they are. The cells of range reach four standard deviations of inverse range to both sides of
    the fit, within the field of view; where the residual is stronger than the noise, as hardware
    errors leave it, standard deviations grow with its root (Birge's ratio).

    Args:
        y: (B, L, M) complex.
        H: (B, M, N) or (M, N) complex.
        codes: (B, L, N) or (L, N) complex.
        array: the surface; 12 x 12 at half a wavelength if left out.
        scene: field of view, wavefront and source mode.
        snr_db: (B,) or one for all [dB]; None where it is not known: the noise is then estimated.
        config: how many, and how they are searched.

    Raises:
        TypeError, ValueError: as :func:`physics.nomp`, or more candidates than the measurement can
            tell apart.

    Source: of the ratio, Birge, "The calculation of errors by the method of least squares",
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
    every = _state(search, measurement, fit, matrix, noise, config)
    # What the criterion keeps stands better without the others, which fit noise.
    likely = torch.arange(config.count, device=count.device) < count.unsqueeze(-1)
    start = torch.where(likely.unsqueeze(-1), kept, coordinates)
    fit, matrix = refine(measurement, start, search.bounds, search.config.joint_iterations, likely)
    alone = _state(search, measurement, fit, matrix, noise, config)

    def pick(name: str) -> Tensor:
        one, two = alone[name], every[name]
        return torch.where(likely.view(*likely.shape, *(1,) * (one.ndim - 2)), one, two)

    coordinates = pick("coordinates")
    a = steering_vector(position_of(coordinates), search.array, search.scene.wavefront)
    return Candidates(
        **{name: pick(name) for name in every if name != "misfit"},
        likely=likely,
        crowded=every["evidence"],
        coherence=power(a.conj() @ a.mT).sqrt(),
        deviance=torch.stack(deviance, dim=-1),
        misfit=every["misfit"],
    )


def _state(
    search: Search,
    measurement: Measurement,
    fit: Fit,
    matrix: Tensor,
    noise: Tensor | None,
    config: CandidateConfig,
) -> dict[str, Tensor]:
    """What a fit says of its sources; absent ones have no power."""
    coordinates = fit.coordinates
    symbols = symbol_powers(measurement, fit, noise)
    sigma2 = symbols.noise_power
    covariance = coordinate_covariance(matrix, sigma2).unflatten(-1, (config.count, 3))
    own = covariance.unflatten(1, (config.count, 3)).diagonal(dim1=1, dim2=3).movedim(-1, 1)
    q, (low, high) = coordinates[..., 2], search.bounds[:, 2]
    misfit = fit.cost / search.n_rows / sigma2
    variance = own[..., 2, 2].clamp_min(0.0) * misfit.clamp_min(1.0).unsqueeze(-1)
    width = _SPREAD * variance.sqrt()
    far, near = ((q + side).clamp(low, high).reciprocal() for side in (-width, width))
    steps = torch.linspace(0.0, 1.0, config.range_cells, device=q.device, dtype=q.dtype)
    cells = torch.lerp(near.unsqueeze(-1), far.unsqueeze(-1), steps)
    ranges = torch.cat([q.reciprocal().unsqueeze(-1), cells], dim=-1)
    received, evidence = _evidence(search, measurement, fit.position, ranges, symbols.power, sigma2)
    return {
        "coordinates": coordinates,
        "covariance": own,
        "power": symbols.power / sigma2.unsqueeze(-1),
        "received": received,
        "evidence": evidence[..., 0],
        "range_m": cells,
        "range_evidence": evidence[..., 1:],
        "misfit": misfit,
    }


def _evidence(
    search: Search,
    measurement: Measurement,
    position: Tensor,  # (B, P, 3)
    ranges: Tensor,  # (B, P, S) [m], the candidate's own first
    powers: Tensor,  # (B, P)
    sigma2: Tensor,  # (B,)
) -> tuple[Tensor, Tensor]:
    """Energy over noise (B, P) at the first cell, and log-likelihood ratios (B, P, S).

    With C_i the covariance of a group without source i, a source of power p with signal g adds
    ``p |g^H C_i^-1 y|^2 / (1 + p g^H C_i^-1 g) - log(1 + p g^H C_i^-1 g)``. C_i^-1 is applied
    through the P x P matrix of the other sources (Woodbury).
    """
    n_candidates, n_cells = ranges.shape[1:]
    directions = position[:, :, None, :2].expand(-1, -1, n_cells, -1)
    a = steering_vector(
        torch.cat([directions, ranges.unsqueeze(-1)], dim=-1), search.array, search.scene.wavefront
    )
    atoms = measurement.rows(a.flatten(1, 2)).unflatten(2, (n_candidates, n_cells))
    others = atoms[..., 0, :]  # (B, G, P, R)
    conjugate = others.conj().resolve_conj()
    weakest = _WEAKEST * powers.amax(-1, keepdim=True) + torch.finfo(powers.dtype).tiny
    load = (sigma2.unsqueeze(-1) / powers.maximum(weakest))[:, None]  # (B, 1, P)
    gram = conjugate @ others.mT
    # No more than rounding takes away of a source that has no power.
    kind = torch.finfo(load.dtype)
    most = gram.diagonal(dim1=-2, dim2=-1).real.amax(-1, keepdim=True) / kind.eps
    most = most.clamp_min(kind.tiny)  # a channel that passes nothing
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
    # Powers relative to the noise: where there is neither, all of them are 0.
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
    """The candidates of no scenes."""
    p, s, none = config.count, config.range_cells, search.points.new_zeros
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
    )
