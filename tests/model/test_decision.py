"""From judged candidates to named sources: against loops and scans of everything."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from model.decision import Decision, Judged, choose, judge
from model.prediction import Prediction
from physics.metrics import coverage, gospa, match
from physics.scene import Scenes
from tests.model.support import judged_slots

GOALS: list[Any] = ["f1", "gospa", "count"]
REACH = {"f1": 1.25, "gospa": 2.0, "count": 2.0}


def worth(prediction: Prediction, b: int, i: int, at: Any, reach: float) -> Any:
    """Expected ``max(0, 1 - (d / reach)^2)`` of ranges, by a loop over cells."""
    assert prediction.cells is not None
    total = np.zeros_like(np.asarray(at, dtype=float))
    weights = prediction.log_pointer[b, i].exp().tolist()
    for w, r in zip(weights, prediction.cells[b, i, :, 2].tolist(), strict=True):
        total += w * np.maximum(0.0, 1.0 - ((r - at) / reach) ** 2)
    return total


@pytest.mark.parametrize("sharpness", [0.3, 3.0])
@pytest.mark.parametrize("goal", GOALS)
def test_the_range_is_where_the_most_worth_is_expected(goal: Any, sharpness: float) -> None:
    prediction = judged_slots(10, 4, 24, sharpness=sharpness)
    judged = judge(prediction, goal)
    assert prediction.cells is not None
    for b, i in np.ndindex(10, 4):
        ranges = prediction.cells[b, i, :, 2]
        grid = np.linspace(float(ranges[0]), float(ranges[-1]), 2001)
        best = float(worth(prediction, b, i, grid, REACH[goal]).max())
        chosen = float(judged.position[b, i, 2])
        here = float(worth(prediction, b, i, chosen, REACH[goal]))
        # Steps from the best cell may end on another top that is hardly lower.
        assert here == pytest.approx(best, abs=5e-3)
        probability = 1 / (1 + math.exp(-float(prediction.existence[b, i])))
        assert float(judged.probability[b, i]) == pytest.approx(probability)
        expected = probability if goal == "count" else probability * here
        assert float(judged.score[b, i]) == pytest.approx(expected)
        torch.testing.assert_close(judged.position[b, i, :2], prediction.cells[b, i, 0, :2])


@pytest.mark.parametrize("goal", GOALS)
def test_one_hump_is_judged_exactly_at_its_top(goal: Any) -> None:
    prediction = judged_slots(10, 4, 24)
    assert prediction.cells is not None
    assert prediction.angle_covariance is not None
    ranges = prediction.cells[..., 2]
    # All ranges within reach of each other: the worth is one parabola, its top the mean.
    prediction.cells[..., 2] = 3.0 + (ranges - ranges.mean(-1, keepdim=True)) / 12.0
    judged = judge(prediction, goal)
    ranges, weight = prediction.cells[..., 2], prediction.log_pointer.exp()
    mean = (weight * ranges).sum(-1)
    torch.testing.assert_close(judged.position[..., 2], mean)
    variance = (weight * (ranges - mean.unsqueeze(-1)).square()).sum(-1)
    cell = ranges[..., 1] - ranges[..., 0]  # a source is anywhere in its cell
    torch.testing.assert_close(judged.covariance[..., 2, 2], variance + cell.square() / 12)
    assert torch.equal(judged.covariance[..., :2, :2], prediction.angle_covariance)
    assert not judged.covariance[..., :2, 2].any()
    assert not judged.covariance[..., 2, :2].any()


@pytest.mark.parametrize("goal", GOALS)
def test_the_variance_of_range_is_that_of_what_lies_within_reach(goal: Any) -> None:
    prediction = judged_slots(20, 4, 24, sharpness=2.0)
    judged = judge(prediction, goal)
    assert prediction.cells is not None
    narrower = 0
    for b, i in np.ndindex(20, 4):
        ranges = prediction.cells[b, i, :, 2].numpy()
        weight = prediction.log_pointer[b, i].exp().numpy()
        chosen = float(judged.position[b, i, 2])
        near = weight * (abs(ranges - chosen) < REACH[goal])
        variance = (near * (ranges - chosen) ** 2).sum() / near.sum()
        variance += (ranges[1] - ranges[0]) ** 2 / 12
        # The last step to the mean may leave a cell or take one in.
        assert float(judged.covariance[b, i, 2, 2]) == pytest.approx(variance, rel=0.1, abs=0.02)
        narrower += bool(variance < 0.8 * (weight * (ranges - chosen) ** 2).sum())
    assert narrower > 5, "the case must hold ranges beyond reach"


@pytest.mark.parametrize("goal", GOALS)
def test_the_spread_of_range_widens_its_variance_alone(goal: Any) -> None:
    prediction = judged_slots(10, 4, 24)
    spread = 0.2 + 3.0 * torch.rand(10, 4, dtype=torch.float64)
    plain, wide = judge(prediction, goal), judge(replace(prediction, range_spread=spread), goal)
    torch.testing.assert_close(
        wide.covariance[..., 2, 2], spread.square() * plain.covariance[..., 2, 2]
    )
    assert torch.equal(wide.covariance[..., :2, :2], plain.covariance[..., :2, :2])
    for name in ("position", "score", "probability"):
        assert torch.equal(getattr(wide, name), getattr(plain, name))


def test_a_score_is_a_probability_and_of_the_reach_of_its_goal() -> None:
    prediction = judged_slots(30, 5, 12, sharpness=2.0)
    scores = {goal: judge(prediction, goal).score for goal in GOALS}
    for score in scores.values():
        assert bool(((score >= 0) & (score <= 1)).all())
    assert bool((scores["f1"] <= scores["gospa"] + 1e-12).all())
    assert bool((scores["gospa"] <= scores["count"]).all())
    assert bool((scores["f1"] < scores["gospa"] - 0.05).any())


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("existence", [-200.0, 200.0])
def test_extreme_judgements_are_finite(goal: Any, existence: float) -> None:
    prediction = judged_slots(3, 2, 4, dtype=torch.float32, sharpness=500.0)
    assert prediction.cells is not None
    prediction.cells[0, ..., 2] = 2.0  # plane waves have one range
    prediction = replace(prediction, existence=torch.full((3, 2), existence))
    judged = judge(prediction, goal)
    for value in (judged.position, judged.covariance, judged.score, judged.probability):
        assert bool(torch.isfinite(value).all())
    assert bool((judged.position[0, :, 2] == 2.0).all())
    assert int(judged.named(Decision(goal)).count.sum()) == (6 if existence > 0 else 0)


def test_no_scenes_are_judged_and_named() -> None:
    judged = judge(judged_slots(0, 3, 4), "f1")
    assert judged.position.shape == (0, 3, 3)
    assert len(judged.named(Decision())) == 0


def test_only_scores_above_the_threshold_are_named() -> None:
    judged = judge(judged_slots(8, 4, 6), "f1")
    level = float(judged.score[3, 2])
    found = judged.named(Decision("f1", level, 2.5))
    assert torch.equal(found.present, judged.score > level)
    assert not found.present[3, 2], "at the threshold is not above it"
    assert torch.equal(found.position[found.present], judged.position[found.present])
    assert bool((found.position[~found.present] == 1.0).all())
    assert found.covariance is not None
    torch.testing.assert_close(found.covariance, 2.5 * judged.covariance)


def test_batches_are_joined_in_order() -> None:
    whole = judge(judged_slots(5, 3, 4), "f1")
    parts = [
        Judged(*(value[index] for value in vars(whole).values()))
        for index in (slice(0, 2), slice(2, 5))
    ]
    joined = Judged.concatenate(parts)
    for name, value in vars(whole).items():
        assert torch.equal(getattr(joined, name), value)


def drawn(n: int, seed: int, *, n_slots: int = 5, levels: int | None = None) -> Any:
    """Judged candidates and their truth: most hits score high, some do not; scores may tie."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    # Sources of a scene are 20 degrees apart, so that a candidate is near one at most.
    azimuth = torch.deg2rad(20.0 * torch.arange(n_slots, dtype=torch.float64) - 40.0)
    place = torch.stack([azimuth, 0 * azimuth, 3 + 0 * azimuth], -1).expand(n, -1, -1)
    n_sources = torch.randint(0, 4, (n,), generator=generator)
    order = torch.stack([torch.randperm(n_slots, generator=generator) for _ in range(n)])
    position = place.gather(1, order[:, :3].unsqueeze(-1).expand(-1, -1, 3)).clone()
    scenes = Scenes(
        *(torch.zeros(n, 1, 1, dtype=torch.complex128),) * 3,
        position,
        torch.ones(n, 3),
        n_sources,
        torch.zeros(n),
    )
    off = torch.randn(n, n_slots, 3, generator=generator, dtype=torch.float64)
    off = off * torch.tensor([0.02, 0.02, 0.5], dtype=torch.float64)
    real = (place.unsqueeze(2) == position.unsqueeze(1)).all(-1) & scenes.present.unsqueeze(1)
    score = (0.35 * real.any(-1) + 0.65 * uniform(n, n_slots)).clamp(0, 1)
    if levels is not None:
        score = (score * levels).round() / levels
    covariance = torch.diag_embed(0.5 * (0.1 + uniform(n, n_slots, 3)) * off.square().mean((0, 1)))
    return Judged(place + off, covariance, score, score), scenes


def f1_at(judged: Judged, scenes: Scenes, threshold: float) -> float:
    found = judged.named(Decision("f1", threshold))
    return match(found, scenes.position, scenes.present).f1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("seed", range(4))
def test_no_threshold_has_a_better_f1_than_the_chosen_one(seed: int, dtype: torch.dtype) -> None:
    judged, scenes = drawn(25, seed)
    judged = Judged(*(value.to(dtype) for value in vars(judged).values()))
    scenes = replace(scenes, position=scenes.position.to(dtype))
    every = [-1.0, *judged.score.flatten().tolist()]
    best = max(f1_at(judged, scenes, level) for level in every)
    decision = choose(judged, scenes, "f1")
    assert decision.goal == "f1"
    assert f1_at(judged, scenes, decision.threshold) == pytest.approx(best)
    assert best > max(f1_at(judged, scenes, -1.0), 0.0) + 0.05, "some are better left unnamed"


@pytest.mark.parametrize("levels", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_scores_that_tie_are_named_together_or_not_at_all(seed: int, levels: int) -> None:
    judged, scenes = drawn(12, seed, levels=levels)
    best = max(f1_at(judged, scenes, k / levels - 1e-3) for k in range(1, levels + 2))
    decision = choose(judged, scenes, "f1")
    assert f1_at(judged, scenes, decision.threshold) == pytest.approx(best)


def test_where_nothing_is_a_source_nothing_is_named_for_f1() -> None:
    judged, scenes = drawn(10, 0)
    silent = replace(scenes, n_sources=0 * scenes.n_sources)
    decision = choose(judged, silent, "f1")
    assert f1_at(judged, silent, decision.threshold) == 1.0
    assert decision.spread == 1.0


def test_of_two_candidates_at_one_source_one_is_a_hit() -> None:
    judged, scenes = drawn(1, 0, n_slots=3)
    scenes = replace(scenes, n_sources=torch.tensor([1]))
    judged = replace(
        judged,
        position=scenes.position[:, :1].expand(-1, 3, -1).clone(),
        score=torch.tensor([[0.9, 0.8, 0.7]], dtype=torch.float64),
    )
    decision = choose(judged, scenes, "f1")
    assert decision.threshold == pytest.approx(0.85), "half way between the last in and the next"


@pytest.mark.parametrize("seed", range(3))
def test_thresholds_for_count_and_gospa_are_the_best_of_a_grid(seed: int) -> None:
    judged, scenes = drawn(40, seed)
    grid = np.arange(0.05, 0.96, 0.025)
    right, cost = [], []
    for level in grid:
        found = judged.named(Decision(threshold=float(level)))
        right.append(match(found, scenes.position, scenes.present).count_accuracy)
        cost.append(float(gospa(found, scenes.position, scenes.present).total.mean()))
    for goal, values in (("count", -np.array(right)), ("gospa", np.array(cost))):
        decision = choose(judged, scenes, goal)  # type: ignore[arg-type]
        assert decision.goal == goal
        at = int(np.abs(grid - decision.threshold).argmin())
        assert decision.threshold == pytest.approx(grid[at], abs=1e-9)
        assert values[at] == pytest.approx(values.min())
        assert values.max() > values.min()


def test_goals_choose_thresholds_of_their_own() -> None:
    judged, scenes = drawn(60, 1)
    chosen = {goal: choose(judged, scenes, goal).threshold for goal in GOALS}
    assert len(set(chosen.values())) > 1


@pytest.mark.parametrize("goal", GOALS)
def test_nine_in_ten_hits_lie_in_their_ellipsoid_after_calibration(goal: Any) -> None:
    judged, scenes = drawn(300, 2)
    decision = choose(judged, scenes, goal)
    found = judged.named(decision)
    matching = match(found, scenes.position, scenes.present)
    share = float(coverage(found, matching, scenes.position, [0.9]))
    assert int(matching.n_hits.sum()) > 200
    assert share == pytest.approx(0.9, abs=0.005)
    plain = judged.named(replace(decision, spread=1.0))
    assert float(coverage(plain, matching, scenes.position, [0.9])) < 0.85
    # Twice the errors predicted ask for a quarter of the factor.
    wide = choose(replace(judged, covariance=4 * judged.covariance), scenes, goal)
    assert wide.spread == pytest.approx(decision.spread / 4)


def test_exact_hits_keep_an_ellipsoid_and_no_hit_leaves_it_as_it_is() -> None:
    judged, scenes = drawn(4, 0, n_slots=3)
    scenes = replace(scenes, n_sources=torch.full((4,), 3))
    exact = replace(judged, position=scenes.position.clone())
    assert choose(exact, scenes, "f1").spread == pytest.approx(1e-6)
    far = replace(judged, position=judged.position + 3.0)
    assert choose(far, scenes, "f1").spread == 1.0
    useless = replace(exact, covariance=0 * exact.covariance)
    assert choose(useless, scenes, "f1").spread == 1.0
    one_off = exact.position.clone()
    one_off[..., 2] += 0.5
    diagonal = torch.eye(3).double().expand(4, 3, 3, 3)
    spread = choose(replace(exact, position=one_off, covariance=diagonal), scenes, "f1").spread
    assert spread == pytest.approx(0.25 / chi2.ppf(0.9, 3))
