"""From rated candidates to sources: the position of each, and which of them are reported."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from scipy.stats import chi2
from torch import Tensor

from model.prediction import Prediction
from model.ranging import REACH, Goal, named_range
from physics.config import FrozenModel
from physics.detections import Detections
from physics.metrics import Matching, Tolerance, gospa, match, squared_mahalanobis
from physics.rows import Rows
from physics.scene import Scenes

_LEVEL = 0.9  # of the ellipsoids that are calibrated
_GRID = torch.arange(0.05, 0.96, 0.025, dtype=torch.float64)  # thresholds to try


class DecisionConfig(FrozenModel):
    """The measure that the reported sources are optimised for."""

    goal: Goal = Field(
        "f1",
        description="measure for which the threshold and the ranges are chosen; count: the "
        "number of sources",
    )


@dataclass(frozen=True)
class Decision:
    """Threshold and calibration, chosen on validation scenes.

    Attributes:
        goal: the metric that they optimise.
        threshold: candidates with a score above it are reported.
        spread: factor on the predicted covariances of positions.
    """

    goal: Goal = "f1"
    threshold: float = 0.5
    spread: float = 1.0


@dataclass(frozen=True)
class Judged(Rows):
    """Rated candidates of B scenes, the input of a decision."""

    position: Tensor  # (B, r, 3) azimuth, elevation [rad], range [m]
    covariance: Tensor  # (B, r, 3, 3) of its errors
    score: Tensor  # (B, r) in [0, 1]
    probability: Tensor  # (B, r) that there is a source in its direction

    def named(self, decision: Decision) -> Detections:
        """The candidates above the threshold."""
        present = self.score > decision.threshold
        position = torch.where(present.unsqueeze(-1), self.position, 1.0)
        return Detections(position, present, decision.spread * self.covariance)


@torch.no_grad()
def judge(prediction: Prediction, goal: Goal) -> Judged:
    """Range, ellipsoid and score of slots that have cells of their own.

    The range maximises the posterior expectation of a utility that falls with the square of the
    error and is 0 beyond the goal's reach. The score is the existence probability times that
    expected utility; for ``count`` it is the existence probability alone.

    Args:
        prediction: of B scenes, with cells.
        goal: see :class:`DecisionConfig`.
    """
    assert prediction.cells is not None
    assert prediction.angle_covariance is not None
    named = named_range(prediction.log_pointer, prediction.cells[..., 2], REACH[goal])
    probability = torch.sigmoid(prediction.existence)
    score = probability if goal == "count" else probability * named.worth
    variance = named.variance
    if prediction.range_spread is not None:
        variance = variance * prediction.range_spread.square()
    covariance = torch.nn.functional.pad(prediction.angle_covariance, (0, 1, 0, 1))
    covariance = covariance + torch.diag_embed(torch.nn.functional.pad(variance[..., None], (2, 0)))
    directions = prediction.cells[:, :, 0, :2]
    position = torch.cat([directions, named.at.unsqueeze(-1)], dim=-1)
    return Judged(position, covariance, score, probability)


def choose(judged: Judged, scenes: Scenes, goal: Goal) -> Decision:
    """Choose the threshold that is best for the goal, and calibrate the ellipsoids.

    Args:
        judged: candidates of S scenes, rated for the same goal.
        scenes: their truth.
        goal: see :class:`DecisionConfig`.
    """
    threshold = _CHOICES[goal](judged, scenes)
    found = judged.named(Decision(goal, threshold))
    matching = match(found, scenes.position, scenes.present)
    return Decision(goal, threshold, _spread(found, matching, scenes.position))


def _spread(found: Detections, matching: Matching, position: Tensor) -> float:
    """Factor on the covariances with which 90 % of the hits lie in their 90 % ellipsoid."""
    distance = squared_mahalanobis(found, matching, position)
    distance = distance[torch.isfinite(distance)]
    if not len(distance):
        return 1.0
    return max(float(distance.quantile(_LEVEL)) / float(chi2.ppf(_LEVEL, df=3)), 1e-6)


def _best_for_f1(judged: Judged, scenes: Scenes) -> float:
    """Threshold of the best F1: candidates are taken in order of falling score, and each is tried.

    Every threshold corresponds to a prefix of that order.
    """
    order = judged.score.argsort(dim=-1, descending=True)
    score = judged.score.gather(-1, order)
    position = judged.position.gather(1, order.unsqueeze(-1).expand(-1, -1, 3))
    limits = Tolerance().limits(position.device)
    off = (position.unsqueeze(2) - scenes.position.unsqueeze(1)).double().abs() / limits
    distance = torch.where((off <= 1.0).all(-1), off.square().sum(-1), torch.inf)  # (S, r, K)
    free, hits = scenes.present.clone(), []
    for column in distance.unbind(1):
        nearest, source = column.masked_fill(~free, torch.inf).min(-1)
        hit = torch.isfinite(nearest)
        hits.append(hit)
        free[hit, source[hit]] = False
    ranked = score.flatten().argsort(descending=True)
    hit = torch.stack(hits, dim=-1).flatten()[ranked].double().cumsum(0)
    found = torch.arange(1, len(ranked) + 1, device=hit.device)
    levels = torch.cat([score.flatten()[ranked], score.new_zeros(1)])
    # Candidates of equal score are reported together or not at all.
    f1 = 2.0 * hit / (found + scenes.n_sources.sum()) * (levels[:-1] > levels[1:])
    best = int(f1.argmax())
    if not f1[best] > 0:
        return 1.0  # no score is above it: reporting nothing is no worse
    return float(levels[best : best + 2].mean())


def _best_for_count(judged: Judged, scenes: Scenes) -> float:
    right = [
        ((judged.score > level).sum(-1) == scenes.n_sources).double().mean() for level in _GRID
    ]
    return float(_GRID[int(torch.stack(right).argmax())])


def _best_for_gospa(judged: Judged, scenes: Scenes) -> float:
    costs = [
        gospa(judged.named(Decision(threshold=float(level))), scenes.position, scenes.present)
        for level in _GRID
    ]
    means = torch.stack([cost.total.double().mean() for cost in costs])
    return float(_GRID[int(means.argmin())])


_CHOICES = {"f1": _best_for_f1, "gospa": _best_for_gospa, "count": _best_for_count}
