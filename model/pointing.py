"""Pointing of slots: which source each slot is matched to, and how large its error is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.stats import chi2
from torch import Tensor
from torch.nn import functional

from model.prediction import Prediction
from model.ranging import REACH, named_range
from physics.assignment import FEW, assign, assign_few

_SHARPNESS = 20.0  # of the target distribution over shared cells
_GATE = math.radians(5.0)  # a candidate farther from a source in either angle cannot match it
_LEVEL = 0.9  # nominal coverage of the ellipses of direction and the intervals of range
_REACH = REACH["f1"]  # error beyond which a range is a miss, whatever the decision's goal [m]
_BEYOND = 1e3  # cost above the total that all other pairs of a scene can have
Extent = tuple[float, float, float]  # of the field of view: two angles [rad], range [m]
_SLACK = 1e-5  # fraction of a range by which rounding may put a source beyond the cells
_SMALL = 1e-9  # floor of the squared error and the variance of a range [m^2]
# Their squared radii: chi-square quantiles of two degrees of freedom and of one.
_ELLIPSE, _INTERVAL = (float(chi2.ppf(_LEVEL, df=degrees)) for degrees in (2, 1))


@dataclass(frozen=True)
class SharedCells:
    """Slots that point at the cells of one dictionary."""

    prediction: Prediction
    overlap: Tensor  # (B, G, K) |a_g^H a_k|^2
    position: Tensor  # (B, K, 3) true azimuth, elevation [rad], range [m]
    cell_size: Tensor  # (3,) [rad, rad, 1/m]
    share: Tensor  # (G,) fraction of the field in each cell

    def score(self) -> Tensor:
        """The pointer's mean overlap (B, r, K) with each source's steering vector."""
        return self.prediction.log_pointer.exp() @ self.overlap

    def cross_entropy(self, source: Tensor) -> Tensor:
        """Cross-entropy (B, r) with the cells that overlap the sources (B, r) int64."""
        return -(self._wanted(source) * self.prediction.log_pointer).sum(-1)

    def _wanted(self, source: Tensor) -> Tensor:
        """Target distributions (B, r, G) over the cells for the sources (B, r) int64."""
        target = torch.softmax(_SHARPNESS * self.overlap.mT, dim=-1)  # (B, K, G)
        return target.gather(1, source.unsqueeze(-1).expand(-1, -1, target.shape[-1]))

    def log_density(self, source: Tensor, extent: Extent) -> Tensor:
        """Log density (B, r) at the sources (B, r) int64, relative to the uniform one [nat].

        Sources are uniform within a cell. It is only approximately a density: cells overlap, and a
        source's target weights do not follow their volumes.
        """
        relative = self.prediction.log_pointer - torch.log(self.share)
        return (self._wanted(source) * relative).sum(-1)

    def loss(self, source: Tensor) -> Tensor:
        """Loss (B, r) of the slots if they hold the sources (B, r) int64.

        It is the cross-entropy plus the Huber distance in units of cells.
        """
        truth = self.position.clone()
        truth[..., 2].reciprocal_()
        truth = truth.gather(1, source.unsqueeze(-1).expand(-1, -1, 3))
        distance = functional.huber_loss(
            self.prediction.position / self.cell_size, truth / self.cell_size, reduction="none"
        ).sum(-1)
        return self.cross_entropy(source) + 0.1 * distance


@dataclass(frozen=True)
class OwnCells:
    """Slots with a direction each, and cells along its range, from near to far."""

    prediction: Prediction
    cells: Tensor  # (B, r, G, 3) azimuth, elevation [rad], range [m]
    position: Tensor  # (B, K, 3)

    def score(self) -> Tensor:
        """Score (B, r, K) of the angular distance: 1 for equal directions, -inf beyond the gate.

        A likely range adds up to 1, which decides between several slots within the gate.
        """
        directions = self.cells[:, :, 0, :2]
        apart = (directions.unsqueeze(2) - self.position[:, None, :, :2]).abs()
        near = 1.0 - torch.linalg.vector_norm(apart / _GATE, dim=-1)
        ranges = self.cells[..., 2].unsqueeze(-1)  # (B, r, G, 1)
        off = (ranges - self.position[:, None, None, :, 2]).abs()
        likely = (self.prediction.log_pointer.exp().unsqueeze(-1) * torch.exp(-off)).sum(2)
        return (near + likely).masked_fill((apart > _GATE).any(-1), -torch.inf)

    def cross_entropy(self, source: Tensor) -> Tensor:
        """Cross-entropy (B, r) with the two cells around the range of the sources (B, r) int64."""
        truth = self.position[..., 2].gather(1, source).unsqueeze(-1)
        ranges, step = self.cells[..., 2], self._step()
        last = ranges.shape[-1] - 1
        place = ((truth - ranges[..., :1]) / step).clamp(0.0, last)
        lower = place.floor().clamp(max=last - 1)
        share = place - lower
        index = lower.long()
        log_pointer = self.prediction.log_pointer
        below, above = log_pointer.gather(-1, index), log_pointer.gather(-1, index + 1)
        return -((1.0 - share) * below + share * above).squeeze(-1)

    def _step(self) -> Tensor:
        """Spacing of the cells (B, r, 1) [m]."""
        ranges = self.cells[..., 2]
        return ((ranges[..., -1:] - ranges[..., :1]) / (ranges.shape[-1] - 1)).clamp_min(1e-6)

    def log_density(self, source: Tensor, extent: Extent) -> Tensor:
        """Log density (B, r) at the sources (B, r) int64, relative to the uniform one [nat].

        It is normal in direction. In range it follows the pointer's weights, log-linear between the
        cells and -inf beyond them. An angular field narrower than the gate counts as wide as the
        gate, a range field narrower than a cell as wide as a cell.
        """
        truth = self.position.gather(1, source.unsqueeze(-1).expand(-1, -1, 3))
        off = (self.prediction.position[..., :2] - truth[..., :2]).double()
        assert self.prediction.angle_covariance is not None
        form, determinant = _adjugate_form(self.prediction.angle_covariance.double(), off)
        normal = -0.5 * (form / determinant + torch.log(determinant)) - math.log(2.0 * math.pi)
        angles = math.prod(max(width, _GATE) for width in extent[:2])
        step = self._step().squeeze(-1).double()
        ranges, log_pointer = self.cells[..., 2], self.prediction.log_pointer.double()
        mass = _log_mean(log_pointer[..., :-1], log_pointer[..., 1:]).sum(-1)  # in steps
        n_cells = (extent[2] / step).clamp_min(1.0)
        there = torch.log(n_cells / mass) - self.cross_entropy(source)
        slack = _SLACK * ranges[..., -1]
        beyond = (truth[..., 2] < ranges[..., 0] - slack) | (
            truth[..., 2] > ranges[..., -1] + slack
        )
        return normal + math.log(angles) + there.masked_fill(beyond, -torch.inf)

    def loss(self, source: Tensor) -> Tensor:
        """Loss (B, r) of the slots if they hold the sources (B, r) int64.

        It is the sum of the cross-entropy of the range; the quantile losses that put 90 % of the
        directions inside their 90 % ellipse, and 90 % of the ranges within reach inside their 90 %
        interval; and the Huber distance of the directions, in units of the gate.

        Source: Koenker and Bassett, "Regression quantiles", Econometrica 46(1), 1978.
        """
        truth = self.position.gather(1, source.unsqueeze(-1).expand(-1, -1, 3))
        off = (self.prediction.position[..., :2] - truth[..., :2]) / _GATE
        distance = functional.huber_loss(off, torch.zeros_like(off), reduction="none", delta=0.5)
        return (
            self.cross_entropy(source)
            + self._off_ellipse(off.detach())
            + self._off_interval(truth[..., 2])
            + 4.0 * distance.sum(-1)
        )

    def _off_ellipse(self, off: Tensor) -> Tensor:
        """Quantile loss (B, r) of the Mahalanobis distance of errors (B, r, 2), in gate units."""
        assert self.prediction.angle_covariance is not None
        form, determinant = _adjugate_form(self.prediction.angle_covariance / _GATE**2, off)
        return _quantile_loss(torch.log(form) - torch.log(determinant), _ELLIPSE)

    def _off_interval(self, truth: Tensor) -> Tensor:
        """Quantile loss (B, r) of the range errors within reach, for true ranges (B, r) [m]."""
        spread = self.prediction.range_spread
        if spread is None:
            return torch.zeros_like(truth)
        named = named_range(self.prediction.log_pointer, self.cells[..., 2], _REACH)
        off = (truth - named.at).abs()
        distance = off.square().clamp_min(_SMALL) / named.variance.clamp_min(_SMALL)
        loss = _quantile_loss(torch.log(distance) - 2.0 * torch.log(spread), _INTERVAL)
        return torch.where(off < _REACH, loss, 0.0)


def _log_mean(a: Tensor, b: Tensor) -> Tensor:
    """Mean of a log-linear function from ``exp(a)`` to ``exp(b)``: ``(e^b - e^a) / (b - a)``."""
    apart = (b - a).abs().clamp_min(torch.finfo(a.dtype).tiny)
    return torch.maximum(a, b).exp() * -torch.expm1(-apart) / apart


def _adjugate_form(covariance: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
    """``x^T adj(C) x`` and ``det C`` (B, r), above zero, of C (B, r, 2, 2) and x (B, r, 2).

    Their ratio is the squared Mahalanobis distance.
    """
    (a, b), (_, c) = (row.unbind(-1) for row in covariance.unbind(-2))
    tiny = torch.finfo(a.dtype).tiny
    x, y = off.unbind(-1)
    form = c * x.square() - 2.0 * b * x * y + a * y.square()
    return form.clamp_min(tiny), (a * c - b.square()).clamp_min(tiny)


def _quantile_loss(log_distance: Tensor, squared_radius: float) -> Tensor:
    """Loss of squared distances that is least if 90 % are below a squared radius."""
    excess = log_distance - math.log(squared_radius)
    return torch.maximum(_LEVEL * excess, (_LEVEL - 1.0) * excess)


def heat_loss(
    heat: Tensor,
    directions: Tensor,
    position: Tensor,
    present: Tensor,
    n_sources: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of a map over directions, per source.

    The target is the cell nearest to a source; its neighbours are excluded, since either answer is
    acceptable there.

    Args:
        heat: (B, A, E) logits.
        directions: (A, E, 2) azimuth, elevation [rad].
        position: (B, K, 3) of the sources.
        present: (B, K) bool.
        n_sources: number that the sum is divided by; None: the number of sources present.
    """
    apart = directions[:, :, None] - position[:, None, None, :, :2]  # (B, A, E, K, 2)
    distance = torch.linalg.vector_norm(apart, dim=-1).flatten(1, 2)  # (B, A E, K)
    nearest = distance.argmin(1)
    hit = torch.zeros_like(heat.flatten(1))
    hit.scatter_reduce_(1, nearest, present.to(hit.dtype), "amax")
    hit = hit.view_as(heat)
    around = functional.max_pool2d(hit.unsqueeze(1), 3, stride=1, padding=1).squeeze(1)
    counts = (hit > 0) | (around == 0)
    loss = functional.binary_cross_entropy_with_logits(heat, hit, reduction="none")
    n_sources = present.sum() if n_sources is None else n_sources
    return (loss * counts).sum() / n_sources.clamp_min(1)


@torch.no_grad()
def match_slots(prediction: Prediction, score: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Pair slots with sources, one to one, by an optimal assignment.

    The cost of a pair is minus its score minus half the probability that the slot holds a source.
    Sources stay unmatched if there are more of them than slots, or if no slot may match them.

    Args:
        prediction: r slots.
        score: (B, r, K); -inf where a slot cannot match a source.
        present: (B, K) bool.

    Returns:
        matched (B, r) bool and the source (B, r) int64 of each slot, 0 where unmatched.
    """
    cost = -score - 0.5 * torch.sigmoid(prediction.existence).unsqueeze(-1)
    allowed = ~torch.isinf(score) & present.unsqueeze(-2)
    costs = torch.nan_to_num(cost, nan=0.0, posinf=_BEYOND, neginf=0.0)
    on_host = costs.device.type == "cpu" or costs.shape[-1] > FEW
    pair = assign if on_host else assign_few
    source = pair(costs, allowed, _BEYOND)
    return source >= 0, source.clamp_min(0)
