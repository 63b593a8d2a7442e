"""Localisation metrics: assignment, GOSPA, errors relative to bounds, coverage.

Positions are azimuth, elevation [rad] and range [m]; slots whose ``present`` is False may hold
any value. They are compared in float64; results have the dtype and device of the true positions.
All functions raise ValueError for tensors whose shapes do not match.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from scipy.stats import chi2
from torch import Tensor

from physics.assignment import assign
from physics.checks import check_finite
from physics.covariance import LowRankCovariance
from physics.detections import Detections
from physics.geometry import to_cartesian
from physics.precision import in_full_precision


@dataclass(frozen=True)
class Tolerance:
    """Largest difference in azimuth, elevation and range, inclusive; inf ignores a coordinate."""

    azimuth_deg: float = 5.0
    elevation_deg: float = 5.0
    range_m: float = 1.0

    def __post_init__(self) -> None:
        for f in fields(self):
            if not (value := getattr(self, f.name)) > 0:
                raise ValueError(f"{f.name} is {value}; expected a number above 0")

    def limits(self, device: torch.device | str | None = None) -> Tensor:
        """(3,) float64 [rad, rad, m]."""
        angles = math.radians(self.azimuth_deg), math.radians(self.elevation_deg)
        return torch.tensor([*angles, self.range_m], dtype=torch.float64, device=device)


@dataclass(frozen=True)
class Matching:
    """Which detection hit which true source, in B scenes.

    The rates are pooled: counts are added over the scenes before they are divided. A ratio with
    denominator 0 is 1: precision without detections, recall without sources, and F1 with neither,
    since no detection is the right answer for an empty scene. F1 stays the harmonic mean of the
    two, and is 0 where only one of detections and sources is empty. Without scenes every rate is
    NaN.
    """

    detection: Tensor  # (B, K) int64, index of the detection that hit each true source, or -1
    n_hits: Tensor  # (B,) int64
    n_found: Tensor  # (B,) int64
    n_true: Tensor  # (B,) int64

    def __len__(self) -> int:
        return self.detection.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Matching:
        """A subset of the scenes, by slice, indices or mask."""
        return Matching(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @property
    def hit(self) -> Tensor:
        """(B, K) bool: which true sources were found."""
        return self.detection >= 0

    @property
    def precision(self) -> float:
        """Share of the detections that hit a source."""
        return self._share(self.n_hits, self.n_found)

    @property
    def recall(self) -> float:
        """Share of the true sources that were hit."""
        return self._share(self.n_hits, self.n_true)

    @property
    def f1(self) -> float:
        """``2 hits / (found + true)``."""
        return self._share(2 * self.n_hits, self.n_found + self.n_true)

    @property
    def all_found(self) -> float:
        """Share of the scenes in which every true source was hit, regardless of false alarms."""
        return float((self.n_hits == self.n_true).double().mean())

    @property
    def count_accuracy(self) -> float:
        """Share of the scenes with as many detections as true sources."""
        return float((self.n_found == self.n_true).double().mean())

    def _share(self, part: Tensor, whole: Tensor) -> float:
        return float(_ratio(part.sum(), whole.sum())) if len(self) else math.nan


@dataclass(frozen=True)
class Gospa:
    """GOSPA of B scenes; ``total ** p = localisation + missed + false``."""

    total: Tensor  # (B,) [m]
    localisation: Tensor  # (B,) [m^p], sum of d^p over the assigned pairs
    missed: Tensor  # (B,) [m^p], c^p / 2 for each true source without a detection
    false: Tensor  # (B,) [m^p], c^p / 2 for each detection without a true source


def match(
    found: Detections, position: Tensor, present: Tensor, tolerance: Tolerance | None = None
) -> Matching:
    """Pair detections with true sources one to one, by an optimal assignment.

    A pair counts where azimuth (modulo 2 pi), elevation and range all lie within the tolerance.
    The matching has the most such pairs and, among those, the smallest sum of normalised distances
    ``sqrt((d az / t_az)^2 + (d el / t_el)^2 + (d r / t_r)^2)``.

    Args:
        found: of B scenes.
        position: (B, K, 3) true positions [rad, rad, m].
        present: (B, K) bool, which slots hold a source.
        tolerance: 5 degrees, 5 degrees and 1 m by default.

    Raises:
        ValueError: shapes that do not match; a non-finite position in a slot that is present.
    """
    together = _check(found, position, present)
    limits = (tolerance or Tolerance()).limits(position.device)
    difference = _difference(found.position.unsqueeze(1), position.unsqueeze(2)).abs()
    close = (difference <= limits).all(-1) & together
    distance = torch.linalg.vector_norm(difference / limits, dim=-1)
    # Losing one pair costs more than the largest distances, sqrt(3), of all others together.
    detection = assign(distance, close, math.sqrt(3.0) * (1 + min(close.shape[1:])))
    return Matching(detection, (detection >= 0).sum(-1), found.count, present.sum(-1))


@torch.no_grad()
def gospa(
    found: Detections, position: Tensor, present: Tensor, c: float = 2.0, p: float = 2.0
) -> Gospa:
    """Generalised optimal sub-pattern assignment metric with alpha = 2, of Cartesian points.

    ``(min_pi sum_i min(d(x_i, y_pi(i)), c)^p + c^p / 2 (|Y| - |X|))^(1/p)`` for ``|X| <= |Y|``,
    which is the least ``sum d^p + c^p / 2 (n_missed + n_false)`` over all sets of pairs. Points as
    far apart as the cutoff count as one missed and one false. The arguments are those of
    :func:`match`, a cutoff c [m] above 0 and an order p of at least 1, both finite; ValueError for
    others.

    Source: Rahmathullah, Garcia-Fernandez and Svensson, "Generalized optimal sub-pattern
    assignment metric", FUSION 2017, eq. (1) and, for the decomposition, Proposition 1.
    """
    if not (0 < c < math.inf and 1 <= p < math.inf):
        raise ValueError(f"c is {c} and p is {p}; expected a finite c above 0 and p of at least 1")
    together = _check(found, position, present)
    points, truth = to_cartesian(found.position.double()), to_cartesian(position.double())
    distance = torch.linalg.vector_norm(points.unsqueeze(1) - truth.unsqueeze(2), dim=-1)
    cost = distance.pow(p)
    detection = assign(cost, (distance < c) & together, c**p)
    slots = torch.arange(cost.shape[-1], device=cost.device)
    localisation = torch.where(detection.unsqueeze(-1) == slots, cost, 0.0).sum((1, 2))
    n_pairs = (detection >= 0).sum(-1)
    missed, false = (c**p * (n - n_pairs).double() / 2 for n in (present.sum(-1), found.count))
    total = (localisation + missed + false).pow(1.0 / p)
    return Gospa(*(value.to(position.dtype) for value in (total, localisation, missed, false)))


def errors(found: Detections, matching: Matching, position: Tensor) -> Tensor:
    """Signed errors (B, K, 3) of the hits, found minus true [rad, rad, m]; NaN elsewhere.

    Azimuth errors lie within -pi..pi. Raises ValueError unless the arguments fit as in
    :func:`match`.
    """
    _expect("position", position, (len(found), *matching.detection.shape[1:], 3))
    return _difference(_of_hits(found.position, matching), position).to(position.dtype)


def normalized_errors(errors: Tensor, crb_std: Tensor) -> Tensor:
    """``|error| / std`` (B, K, 3); NaN where the bound is not positive and finite.

    ``crb_std`` (B, K, 3) [rad, rad, m] is the square root of the Cramer-Rao bound of
    :func:`errors`.
    """
    _expect("errors", errors, (*errors.shape[:2], 3))
    _expect("crb_std", crb_std, errors.shape)
    usable = (crb_std > 0) & torch.isfinite(crb_std)
    return errors.abs() / torch.where(usable, crb_std, torch.nan)


def median_normalized_error(errors: Tensor, crb_std: Tensor, mask: Tensor | None = None) -> Tensor:
    """Median of ``|error| / std`` (3,) for azimuth, elevation and range; NaN without any.

    An efficient estimator has 0.674, the median of a standard normal's modulus. ``mask`` (B, K)
    bool selects the sources that count, all by default; otherwise see :func:`normalized_errors`.
    """
    normalized = normalized_errors(errors, crb_std)
    if mask is not None:
        _expect("mask", mask, normalized.shape[:-1], torch.bool)
        normalized = normalized[mask]
    rows = torch.cat([normalized.flatten(0, -2), normalized.new_full((1, 3), torch.nan)])
    # For an even count torch's median is the lower one; that of -x is minus the upper one.
    return 0.5 * (rows.nanmedian(0).values - (-rows).nanmedian(0).values)


def crb_gated(crb_std: Tensor, gate: Tolerance | None = None) -> Tensor:
    """Which sources can be located (B, K) bool: ``crb_std`` (B, K, 3) [rad, rad, m] in the gate.

    The gate is 2.5 degrees, 2.5 degrees and 0.5 m wide by default; NaN is outside any gate.
    """
    _expect("crb_std", crb_std, (*crb_std.shape[:2], 3))
    gate = gate or Tolerance(2.5, 2.5, 0.5)
    return (crb_std.double() <= gate.limits(crb_std.device)).all(-1)


def gated_recall(matching: Matching, gated: Tensor, present: Tensor) -> float:
    """Share of the gated true sources that were hit, pooled over scenes; NaN without any.

    ``gated`` (B, K) bool comes from :func:`crb_gated`; ``present`` (B, K) bool marks the sources.
    """
    _expect("gated", gated, matching.detection.shape, torch.bool)
    _expect("present", present, matching.detection.shape, torch.bool)
    return float(matching.hit[gated & present].double().mean())


@torch.no_grad()
@in_full_precision
def subspace_error(estimate: LowRankCovariance, steering: Tensor, present: Tensor) -> Tensor:
    """``1 - ||U_K^H Q||_F^2 / K`` (B,) in [0, 1]: the part of the sources outside the subspace.

    Q is an orthonormal basis of the steering vectors of the sources, K its dimension (coincident
    sources count once) and U_K the dominant subspace of the estimate. A scene without sources gives
    0; an estimate of lower rank than K misses the rest. Raises ValueError unless ``steering``
    (B, K, N) complex is finite where ``present`` (B, K) bool is True.
    """
    _expect("steering", steering, (*estimate.batch_shape, *steering.shape[-2:-1], estimate.size))
    _expect("present", present, steering.shape[:-1], torch.bool)
    sources = torch.where(present.unsqueeze(-1), steering, 0.0)
    check_finite("steering", sources)
    _, values, basis = torch.linalg.svd(sources, full_matrices=False)
    floor = steering.shape[-1] * torch.finfo(values.dtype).eps * values[..., :1]
    apart = values > floor
    n_sources = apart.sum(-1)
    energy = estimate.subspace_energy(basis.to(estimate.dtype), n_sources)
    error = 1.0 - (energy * apart).sum(-1) / n_sources
    return torch.where(n_sources > 0, error.clamp(0.0, 1.0), 0.0)


def coverage(
    found: Detections, matching: Matching, position: Tensor, levels: Sequence[float] | Tensor
) -> Tensor:
    """Share of the hits (n_levels,) whose true position lies in the predicted ellipsoid.

    The ellipsoid of a level holds ``e^T C^-1 e <= q`` with q the level's quantile of chi-square
    with 3 degrees of freedom and e the error of (azimuth, elevation, range). A covariance that is
    not finite or not positive definite, such as zero, covers nothing. Without hits it is NaN.
    Raises ValueError without any covariances, for a level outside [0, 1], and as :func:`errors`.
    """
    nominal = torch.as_tensor(levels, dtype=torch.float64, device="cpu")
    if nominal.ndim != 1 or not bool(((nominal >= 0) & (nominal <= 1)).all()):
        raise ValueError(f"levels are {levels}; expected a sequence of numbers in [0, 1]")
    quantile = torch.as_tensor(chi2.ppf(nominal.numpy(), df=3), device=position.device)
    distance = squared_mahalanobis(found, matching, position).unsqueeze(-1)
    inside = (distance <= quantile) & torch.isfinite(distance)
    return inside.double().mean(0).to(position.dtype)


def squared_mahalanobis(found: Detections, matching: Matching, position: Tensor) -> Tensor:
    """``e^T C^-1 e`` (n_hits,) float64 of the hits' errors, with the covariance C of each hit.

    Infinite where C is not finite or not positive definite. Raises as :func:`coverage`.
    """
    if found.covariance is None:
        raise ValueError("found has no covariance; coverage needs an estimator that predicts one")
    error = errors(found, matching, position)[matching.hit].double()
    covariance = _of_hits(found.covariance, matching)[matching.hit].double()
    # In units of the standard deviations: rad and m differ by orders of magnitude.
    std = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    correlation = covariance / std.unsqueeze(-1) / std.unsqueeze(-2)
    finite = torch.isfinite(correlation).all(-1).all(-1)
    cholesky, info = torch.linalg.cholesky_ex(torch.where(finite[:, None, None], correlation, 0.0))
    white = torch.linalg.solve_triangular(cholesky, (error / std).unsqueeze(-1), upper=False)
    return torch.where(finite & (info == 0), white.square().sum((-2, -1)), torch.inf)


def count_confusion(n_true: Tensor, n_found: Tensor, largest: int) -> Tensor:
    """Scenes by true (row) and found (column) number of sources (largest + 1, largest + 1) int64.

    Raises ValueError unless both are (B,) int64 and every count lies within 0..largest.
    """
    for name, count in (("n_true", n_true), ("n_found", n_found)):
        _expect(name, count, (n_true.numel(),), torch.int64)
        if bool(((count < 0) | (count > largest)).any()):
            got = f"{int(count.min())}..{int(count.max())}"
            raise ValueError(f"{name} is {got}, expected 0..{largest}: raise largest, or clamp it")
    side = largest + 1
    return torch.bincount(n_true * side + n_found, minlength=side**2).reshape(side, side)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole in float64; 1 where the whole is 0."""
    return torch.where(whole > 0, part.double() / whole.clamp_min(1), 1.0)


def _difference(found: Tensor, true: Tensor) -> Tensor:
    """found - true (…, 3) in float64, azimuth wrapped to -pi..pi."""
    difference = found.double() - true.double()
    turns = torch.round(difference[..., :1] / (2.0 * torch.pi))
    return torch.cat([difference[..., :1] - 2.0 * torch.pi * turns, difference[..., 1:]], dim=-1)


def _of_hits(values: Tensor, matching: Matching) -> Tensor:
    """(B, K, …) of values (B, P, …) at the detections that hit; NaN elsewhere."""
    n_scenes, n_slots, *rest = values.shape
    if bool((matching.detection >= n_slots).any()):
        raise ValueError(f"matching names detections beyond the {n_slots} of found: match it first")
    padded = torch.cat([values, values.new_full((n_scenes, 1, *rest), torch.nan)], dim=1)
    slot = torch.where(matching.hit, matching.detection, n_slots)
    return padded[torch.arange(n_scenes, device=values.device).unsqueeze(-1), slot]


def _expect(name: str, value: Tensor, shape: Sequence[int], dtype: Any = None) -> None:
    """Raise ValueError unless the tensor has the expected shape."""
    if value.shape != torch.Size(shape) or (dtype is not None and value.dtype != dtype):
        got, wanted = f"{tuple(value.shape)} {value.dtype}", f"{tuple(shape)} {dtype or ''}"
        raise ValueError(f"{name} is {got}; the other arguments ask for {wanted.rstrip()}")


def _check(found: Detections, position: Tensor, present: Tensor) -> Tensor:
    """Check the arguments; pairs (B, K, P) bool in which source and detection are both present."""
    _expect("present", present, (len(found), *present.shape[-1:]), torch.bool)
    _expect("position", position, (*present.shape, 3))
    check_finite("found", torch.where(found.present.unsqueeze(-1), found.position, 0.0))
    check_finite("position", torch.where(present.unsqueeze(-1), position, 0.0))
    return present.unsqueeze(-1) & found.present.unsqueeze(-2)
