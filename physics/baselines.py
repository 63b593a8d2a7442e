"""Classical estimators of source positions from a covariance: MUSIC and MVDR."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from physics.checks import check_finite
from physics.covariance import LowRankCovariance
from physics.detections import Detections
from physics.fit import position_of
from physics.geometry import PlanarArray
from physics.precision import in_full_precision
from physics.scaling import power
from physics.search import SpectralForm, check_loading, climb, music_form, mvdr_form
from physics.spectrum import PolarGrid, check_covariance, find_peaks, highest_around
from physics.steering import Wavefront, steering_vector

Search = Literal["coarse-to-fine", "grid"]
Criterion = Literal["mdl", "aic"]

_COARSENESS = 0.35  # step of the coarse grid over the beam's width (Rayleigh)
_CANDIDATES = 4  # local maxima examined per requested source
_SAME_PEAK = 0.02  # 1 - |a^H b|^2 below which two candidates are the same peak
_BLOCK = 64  # scenes searched at once, which bounds the memory


def music(
    covariance: LowRankCovariance,
    array: PlanarArray,
    wavefront: Wavefront,
    grid: PolarGrid,
    n_sources: int | Tensor | None = None,
    *,
    search: Search = "coarse-to-fine",
    max_sources: int = 5,
) -> Detections:
    """Sources at the K highest peaks of the MUSIC spectrum.

    The signal subspace has min(K, rank of R) dimensions: with K above the rank, K peaks of the
    spectrum of the whole range are returned. Sources that coincide, and coherent ones, span fewer
    dimensions than K and make fewer peaks than K: the remaining detections are then side lobes. A
    source outside the grid shows up on its border, if at all. A covariance without a dominant
    subspace (zero, or a multiple of the identity) gives no detection, and so does K = 0. Plane
    waves have no range: the first range of the grid is returned.

    Args:
        covariance: R of B scenes, size N, such as :func:`physics.sample_covariance`.
        array: the surface, N elements.
        wavefront: model of the steering vectors.
        grid: where to search. ``grid`` evaluates every point and fits a parabola through the
            highest; ``coarse-to-fine`` uses only the grid's bounds (see :func:`coarse_grid`).
        n_sources: K, one for all or (B,) integer; None estimates it (:func:`estimate_n_sources`).
        search: "coarse-to-fine" or "grid".
        max_sources: P, at least every K.

    Returns:
        P slots per scene, the highest peak first. A range is ``inf`` where the peak is at an
        inverse range of 0.

    Raises:
        ValueError: a covariance that is not a batch (B,), not finite or not of the array's size;
            K negative, not an integer, above ``max_sources`` or leaving no noise subspace (K = N);
            an unknown search or wavefront.

    Source: Schmidt, "Multiple emitter location and signal parameter estimation", IEEE Trans.
    Antennas Propag. 34(3), 1986, eq. (6); in azimuth, elevation and range: Huang and Barkat,
    "Near-field multiple source localization by passive sensor array", IEEE Trans. Antennas
    Propag. 39(7), 1991.
    """
    if max_sources >= array.size:
        raise ValueError(
            f"max_sources is {max_sources} and the array has {array.size} elements; MUSIC needs a "
            f"noise subspace: at most {array.size - 1} sources"
        )
    counts = _checked(covariance, array, n_sources, max_sources, search)
    form = music_form(covariance, counts)
    return _detect(form, counts, array, wavefront, grid, search, max_sources)


def mvdr(
    covariance: LowRankCovariance,
    array: PlanarArray,
    wavefront: Wavefront,
    grid: PolarGrid,
    n_sources: int | Tensor | None = None,
    *,
    search: Search = "coarse-to-fine",
    max_sources: int = 5,
    loading: float = 1e-2,
) -> Detections:
    """Sources at the K highest peaks of the MVDR spectrum of the loaded covariance.

    The spectrum does not depend on K, which only sets how many peaks are returned; everything else
    is as for :func:`music`.

    Args:
        covariance: R of B scenes, size N.
        array: the surface, N elements.
        wavefront: model of the steering vectors.
        grid: where to search, see :func:`music`.
        n_sources: K, one for all or (B,) integer; None estimates it (:func:`estimate_n_sources`).
        search: "coarse-to-fine" or "grid".
        max_sources: P, at least every K.
        loading: diagonal loading relative to tr(R)/N, above 0.

    Returns:
        P slots per scene, the highest peak first.

    Raises:
        ValueError: as :func:`music`, but without its limit of K = N - 1; a loading not above 0.

    Source: Capon, "High-resolution frequency-wavenumber spectrum analysis", Proc. IEEE 57(8),
    1969.
    """
    check_loading(loading)
    counts = _checked(covariance, array, n_sources, max_sources, search)
    form = mvdr_form(covariance, loading)
    return _detect(form, counts, array, wavefront, grid, search, max_sources)


@in_full_precision
@torch.no_grad()
def estimate_n_sources(
    covariance: LowRankCovariance, max_sources: int = 5, criterion: Criterion = "mdl"
) -> Tensor:
    """Number of sources from the eigenvalues of R, by the MDL criterion or Akaike's.

    ``log-likelihood = n (p - k) log(geometric / arithmetic mean of the p - k smallest)`` with the
    penalty ``k (2p - k)`` for AIC and half of it times ``log n`` for MDL. N is replaced by the
    rank of the factor, p, which for a covariance of snapshots is their number n too: the other
    N - p eigenvalues were never observed.

    This assumes white noise on the surface and many independent snapshots of incoherent sources.
    A ridge estimate R_samp violates all of these assumptions: its noise is shaped by the channel
    and the codes, its few snapshots leave no plateau of equal eigenvalues, and constant symbols
    make the sources coherent. The criteria are of no use there: on simulated scenes of 1 to 5
    sources both nearly always return 0. Pass K where it is known.

    Args:
        covariance: R (…).
        max_sources: largest count returned; rank - 1 if that is less.
        criterion: "mdl" or "aic".

    Returns:
        (…) int64; 0 for a covariance that is zero or a multiple of the identity.

    Raises:
        ValueError: an unknown criterion, or a covariance that is not finite.

    Source: Wax and Kailath, "Detection of signals by information theoretic criteria", IEEE Trans.
    Acoust. Speech Signal Process. 33(2), 1985.
    """
    if criterion not in get_args(Criterion):
        raise ValueError(f"criterion {criterion!r} unknown; choose from {get_args(Criterion)}")
    check_finite("covariance factor", covariance.factor)
    check_finite("covariance loading", covariance.loading)
    values = covariance.normalized().eigenvalues().double()  # (…, p) descending
    p = values.shape[-1]
    # Zero eigenvalues are resolved only down to the rounding of the largest one.
    rounding = p * torch.finfo(covariance.dtype).eps
    values = values.clamp_min(rounding * values[..., :1])
    k = torch.arange(min(max_sources, p - 1) + 1, device=values.device)
    left = p - k
    tail = values.flip(-1)
    sums, logs = (t.cumsum(-1).flip(-1)[..., : len(k)] for t in (tail, tail.log()))
    ratio = logs / left - (sums / left).log()
    penalty = (k * (2 * p - k)).double()
    if criterion == "mdl":
        penalty = 0.5 * math.log(p) * penalty
    return (penalty - p * left * ratio).argmin(-1)


def _checked(
    covariance: LowRankCovariance,
    array: PlanarArray,
    n_sources: int | Tensor | None,
    max_sources: int,
    search: str,
) -> Tensor:
    """Validate the arguments and return the source counts (B,)."""
    if search not in get_args(Search):
        raise ValueError(f"search {search!r} unknown; choose from {get_args(Search)}")
    if max_sources < 1:
        raise ValueError(f"max_sources is {max_sources}; at least 1 needed")
    check_covariance(covariance, array)
    if len(covariance.batch_shape) != 1:
        raise ValueError(
            f"covariance has batch shape {tuple(covariance.batch_shape)}; expected scenes (B,): "
            "unsqueeze the factor of a single scene, flatten several leading dimensions"
        )
    batch = covariance.batch_shape
    if n_sources is None:
        return estimate_n_sources(covariance, max_sources).expand(batch)
    counts = torch.as_tensor(n_sources, device=covariance.device)
    if counts.dtype == torch.bool or counts.is_floating_point() or counts.is_complex():
        raise ValueError(f"n_sources is {counts.dtype}; expected an integer or a tensor of them")
    if counts.shape not in (torch.Size(), batch):
        raise ValueError(
            f"n_sources has shape {tuple(counts.shape)}; expected one number or ({batch[0]},)"
        )
    low, high = (int(x) for x in torch.aminmax(counts)) if counts.numel() else (0, 0)
    if low < 0 or high > max_sources:
        raise ValueError(
            f"n_sources is {low if low < 0 else high}; expected 0..{max_sources}: raise "
            "max_sources for more"
        )
    return counts.expand(batch)


@in_full_precision
@torch.no_grad()
def _detect(
    form: SpectralForm,
    counts: Tensor,
    array: PlanarArray,
    wavefront: Wavefront,
    grid: PolarGrid,
    search: Search,
    max_sources: int,
) -> Detections:
    """The highest peaks of each scene, as many as it has sources."""
    fine = search == "coarse-to-fine"
    if wavefront == "planar":  # blind to the range: every peak would repeat at each one
        grid = replace(grid, inverse_range=grid.inverse_range[:1])
    points = coarse_grid(grid, array) if fine else grid
    steering = points.steering(array, wavefront, device=form.rows.device, dtype=form.rows.dtype)
    parts = []
    for first in range(0, max(1, len(counts)), _BLOCK):
        some = form[first : first + _BLOCK]
        energy = some.energy(steering).unflatten(-1, points.shape)
        n_candidates = min(_CANDIDATES * max_sources, len(steering))
        if fine:
            coordinates, found = local_maxima(energy, points, n_candidates)
            bounds = bounds_of(grid).to(coordinates)
            coordinates, top = climb(some, coordinates, bounds, array, wavefront)
            position, height = position_of(coordinates), some.height(top)
        else:
            spectrum = some.height(energy.flatten(1)).unflatten(-1, points.shape)
            position, height = find_peaks(spectrum, points, n_candidates)
            found = height > 0
            position = torch.where(found.unsqueeze(-1), position, position.new_ones(3))
        found = found & _has_peaks(energy).unsqueeze(-1)
        parts.append(
            highest_peaks(
                position,
                torch.where(found, height, 0.0),
                counts[first : first + _BLOCK],
                array,
                wavefront,
                max_sources,
            )
        )
    return Detections.concatenate(parts)


def _has_peaks(energy: Tensor) -> Tensor:
    """Whether the grid's values (B,) differ by more than rounding; one alone is compared to 0."""
    flat = energy.flatten(1)
    lowest = flat.amin(-1) if flat.shape[-1] > 1 else 0.0
    return flat.amax(-1) > lowest + 16 * torch.finfo(flat.dtype).eps


def local_maxima(energy: Tensor, points: PolarGrid, n_candidates: int) -> tuple[Tensor, Tensor]:
    """Coordinates (B, C, 3) of the highest cells (B, A, E, Q), and which of them are maxima.

    A maximum is at least as high as the neighbours that share a face. On a slanted ridge, a test
    against all 26 neighbours can miss one of two peaks closer than the coarse cells; this one
    finds it.
    """
    highest = highest_around(energy, corners=False)
    top, index = torch.where(energy == highest, energy, -1.0).flatten(1).topk(n_candidates)
    cells = torch.unravel_index(index, points.shape)
    axes = (points.azimuth, points.elevation, points.inverse_range)
    coordinates = [energy.new_tensor(axis)[cell] for axis, cell in zip(axes, cells, strict=True)]
    return torch.stack(coordinates, dim=-1), top >= 0


def highest_peaks(
    position: Tensor,  # (B, C, 3)
    height: Tensor,  # (B, C), 0 where there is no candidate
    counts: Tensor,  # (B,)
    array: PlanarArray,
    wavefront: Wavefront,
    max_sources: int,
) -> Detections:
    """The highest candidates without duplicate peaks, as many as each scene has sources."""
    height, order = height.sort(dim=-1, descending=True, stable=True)
    position = position.gather(1, order.unsqueeze(-1).expand_as(position))
    apart = _apart(steering_vector(position, array, wavefront), height > 0)
    present = apart & (apart.cumsum(-1) <= counts.unsqueeze(-1))
    slots = present.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    missing = max(0, max_sources - slots.shape[-1])
    slots = slots[:, :max_sources]
    position = position.gather(1, slots.unsqueeze(-1).expand(-1, -1, 3))
    position = torch.nn.functional.pad(position, (0, 0, 0, missing), value=1.0)
    present = torch.nn.functional.pad(present.gather(1, slots), (0, missing))
    return Detections(torch.where(present.unsqueeze(-1), position, 1.0), present)


def bounds_of(grid: PolarGrid) -> Tensor:
    """Lowest and highest coordinates (2, 3) float64."""
    axes = (grid.azimuth, grid.elevation, grid.inverse_range)
    return torch.tensor(
        [[side(values) for values in axes] for side in (min, max)], dtype=torch.float64
    )


def _apart(steering: Tensor, found: Tensor) -> Tensor:
    """Which candidates (B, C), highest first, are not the same peak as an earlier one."""
    overlap = power(steering @ steering.mH)
    same = overlap > 1.0 - _SAME_PEAK
    kept = found.clone()
    for candidate in range(1, found.shape[-1]):
        twin = same[:, candidate, :candidate] & kept[:, :candidate]
        kept[:, candidate] &= ~twin.any(-1)
    return kept


def coarse_grid(grid: PolarGrid, array: PlanarArray) -> PolarGrid:
    """Grid within the bounds of another, just fine enough that every beam contains a point.

    Steps are a fixed fraction of the Rayleigh width, wavelength / aperture, in azimuth and
    elevation, and, in inverse range, of the change that turns the phase of a corner element by
    2 pi. Axes that are already as coarse stay unchanged.
    """
    width, height = (n * array.spacing for n in (array.n_horizontal, array.n_vertical))
    corner = float(array.elements.square().sum(-1).max())
    steps = (
        _COARSENESS * array.wavelength / width,
        _COARSENESS * array.wavelength / height,
        2.0 * _COARSENESS * array.wavelength / corner if corner > 0 else math.inf,
    )
    axes = [
        _coarser(values, step)
        for values, step in zip(
            (grid.azimuth, grid.elevation, grid.inverse_range), steps, strict=True
        )
    ]
    return PolarGrid(*axes)


def _coarser(values: tuple[float, ...], step: float) -> tuple[float, ...]:
    low, high = min(values), max(values)
    count = 1 + math.ceil((high - low) / step)
    if count >= len(values):
        return values
    if count == 1:
        return ((low + high) / 2,)
    return tuple(torch.linspace(low, high, count, dtype=torch.float64).tolist())
