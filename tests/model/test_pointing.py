"""Which source a slot speaks for, and how far off it is: against loops."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from model.decision import judge
from model.loss import LossConfig, ScenesLoss
from model.pointing import OwnCells, match_slots
from model.prediction import Prediction
from model.ranging import REACH
from physics import PlanarArray, PolarGrid, SceneConfig, Scenes, simulate
from tests.model.support import judged_slots

GATE = math.radians(5.0)
ARRAY = PlanarArray(3, 3)
SCENE = SceneConfig(n_antennas=4, n_snapshots=4, min_sources=0, max_sources=3)


def around(prediction: Prediction, n_sources: int, seed: int = 1) -> Tensor:
    """Sources (B, K, 3) near the directions of some slots, some within the gate."""
    assert prediction.cells is not None
    generator = torch.Generator().manual_seed(seed)
    size = (len(prediction.cells), n_sources)
    slot = torch.randint(prediction.cells.shape[1], size, generator=generator)
    direction = prediction.cells[:, :, 0, :2].gather(1, slot.unsqueeze(-1).expand(-1, -1, 2))
    off = torch.rand(*size, 2, generator=generator, dtype=torch.float64) * 3 - 1.5
    distance = 0.3 + 10 * torch.rand(*size, 1, generator=generator, dtype=torch.float64)
    return torch.cat([direction + off * GATE, distance], -1)


def own(prediction: Prediction, position: Tensor) -> OwnCells:
    assert prediction.cells is not None
    return OwnCells(prediction, prediction.cells, position)


def test_score_is_nearness_in_angle_and_likely_nearness_in_range() -> None:
    prediction = judged_slots(4, 5, 6)
    position = around(prediction, 4)
    score = own(prediction, position).score()
    assert prediction.cells is not None
    inside = 0
    for b, i, k in np.ndindex(*score.shape):
        cells, weight = prediction.cells[b, i].numpy(), prediction.log_pointer[b, i].exp().numpy()
        azimuth, elevation, r = position[b, k].tolist()
        off = abs(cells[0, 0] - azimuth), abs(cells[0, 1] - elevation)
        if max(off) > GATE:
            assert float(score[b, i, k]) == -math.inf
            continue
        inside += 1
        likely = sum(w * math.exp(-abs(c[2] - r)) for w, c in zip(weight, cells, strict=True))
        assert float(score[b, i, k]) == pytest.approx(1 - math.hypot(*off) / GATE + likely)
    assert inside >= 4, "the case must hold pairs within the gate"


@pytest.mark.parametrize(("step", "theirs"), [(0.999, True), (1.001, False)])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_source_five_degrees_off_in_either_angle_is_none_of_a_slots(
    axis: int, step: float, theirs: bool
) -> None:
    prediction = judged_slots(1, 1, 3)
    assert prediction.cells is not None
    position = prediction.cells[:, :, 0].clone()
    position[..., axis] += step * GATE
    assert bool(torch.isfinite(own(prediction, position).score()).item()) is theirs


def ellipse_loss(prediction: Prediction, position: Tensor, source: Tensor) -> Tensor:
    """Quantile loss (B, r) at 0.9 of the squared Mahalanobis distance, by a loop."""
    assert prediction.angle_covariance is not None
    loss = torch.zeros(source.shape, dtype=torch.float64)
    for b, i in np.ndindex(*source.shape):
        covariance = prediction.angle_covariance[b, i].numpy()
        off = (prediction.position[b, i] - position[b, source[b, i]])[:2].numpy()
        distance = off @ np.linalg.solve(covariance, off)
        excess = math.log(distance / float(chi2.ppf(0.9, df=2)))
        loss[b, i] = 0.9 * excess if excess > 0 else -0.1 * excess
    return loss


def distance_loss(prediction: Prediction, position: Tensor, source: Tensor) -> Tensor:
    """Four times the Huber distance (B, r) of directions in gates, by a loop."""
    loss = torch.zeros(source.shape, dtype=torch.float64)
    for b, i in np.ndindex(*source.shape):
        for axis in (0, 1):
            off = abs(float(prediction.position[b, i, axis] - position[b, source[b, i], axis]))
            gates = off / GATE
            loss[b, i] += 4 * (0.5 * gates**2 if gates < 0.5 else 0.5 * (gates - 0.25))
    return loss


def test_loss_is_the_cross_entropy_to_the_two_cells_around_the_source() -> None:
    prediction = judged_slots(6, 4, 5)
    position = around(prediction, 3)
    source = torch.randint(3, (6, 4), generator=torch.Generator().manual_seed(2))
    loss = own(prediction, position).loss(source)
    rest = ellipse_loss(prediction, position, source)
    rest += distance_loss(prediction, position, source)
    assert loss.shape == (6, 4)
    assert prediction.cells is not None
    outside = 0
    for b, i in np.ndindex(6, 4):
        ranges, logs = prediction.cells[b, i, :, 2].tolist(), prediction.log_pointer[b, i].tolist()
        r = float(position[b, source[b, i], 2])
        if r <= ranges[0] or r >= ranges[-1]:  # beyond the cells the last one is meant
            outside += 1
            expected = -logs[0 if r <= ranges[0] else -1]
        else:
            above = next(s for s in range(5) if ranges[s] > r)
            share = (r - ranges[above - 1]) / (ranges[above] - ranges[above - 1])
            expected = -(1 - share) * logs[above - 1] - share * logs[above]
        assert float(loss[b, i]) == pytest.approx(expected + float(rest[b, i]))
    assert 0 < outside < 24, "the case must hold sources within and beyond the cells"


def test_ellipses_learn_to_hold_nine_in_ten_directions() -> None:
    """Of errors far from normal, in two groups that their covariances do not tell apart."""
    prediction = judged_slots(4000, 2, 2)
    assert prediction.angle_covariance is not None
    root = torch.linalg.cholesky(prediction.angle_covariance)
    heavy = torch.distributions.StudentT(torch.tensor(3.0, dtype=torch.float64))
    torch.manual_seed(6)
    off = heavy.sample((4000, 2, 2)) * torch.tensor([0.2, 3.0], dtype=torch.float64)[:, None]
    direction = prediction.position[..., :2] + (root @ off.unsqueeze(-1)).squeeze(-1)
    position = torch.cat([direction, torch.ones(4000, 2, 1, dtype=torch.float64)], -1)
    source = torch.arange(2).expand(4000, 2)
    log_spread = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([log_spread], lr=0.05)
    for _ in range(200):
        wide = (2.0 * log_spread).exp()[:, None, None] * prediction.angle_covariance
        optimizer.zero_grad()
        own(replace(prediction, angle_covariance=wide), position).loss(source).mean().backward()
        optimizer.step()
    whitened = torch.linalg.solve_triangular(root, (root @ off.unsqueeze(-1)), upper=False)
    distance = whitened.square().sum((-2, -1)) / (2.0 * log_spread.detach()).exp()
    held = (distance <= float(chi2.ppf(0.9, df=2))).double().mean(0)
    assert bool(((held - 0.9).abs() < 0.015).all()), held
    assert float((log_spread[1] - log_spread[0]).detach()) == pytest.approx(math.log(15.0), abs=0.1)


def interval_loss(prediction: Prediction, position: Tensor, source: Tensor) -> Tensor:
    """Quantile loss (B, r) at 0.9 of the squared error of range over its variance, by a loop."""
    assert prediction.range_spread is not None
    judged = judge(replace(prediction, range_spread=None), "f1")
    loss = torch.zeros(source.shape, dtype=torch.float64)
    for b, i in np.ndindex(*source.shape):
        off = float(position[b, source[b, i], 2] - judged.position[b, i, 2])
        if abs(off) >= REACH["f1"]:
            continue
        variance = float(
            judged.covariance[b, i, 2, 2] * prediction.range_spread[b, i].detach() ** 2
        )
        excess = math.log(off**2 / variance / float(chi2.ppf(0.9, df=1)))
        loss[b, i] = 0.9 * excess if excess > 0 else -0.1 * excess
    return loss


def test_an_interval_pays_for_ranges_within_reach_by_the_quantile_loss() -> None:
    prediction = judged_slots(20, 4, 24)
    spread = 0.2 + 3.0 * torch.rand(20, 4, dtype=torch.float64)
    spread.requires_grad_()
    position = around(prediction, 3)
    source = torch.randint(3, (20, 4), generator=torch.Generator().manual_seed(2))
    wide = replace(prediction, range_spread=spread)
    less, more = own(prediction, position).loss(source), own(wide, position).loss(source)
    expected = interval_loss(wide, position, source)
    torch.testing.assert_close((more - less).detach(), expected.detach())
    (gradient,) = torch.autograd.grad(more.sum(), spread)
    assert torch.equal(gradient != 0, expected.detach() != 0)
    assert 5 < int((gradient != 0).sum()) < 75, "the case must hold ranges within and beyond reach"


def test_intervals_learn_to_hold_nine_in_ten_of_the_ranges_within_reach() -> None:
    """Of errors that are a fifth of what the posterior says in one slot, and twice in the other."""
    prediction = judged_slots(4000, 2, 24)
    assert prediction.cells is not None
    # All within a metre: nothing is beyond reach.
    prediction.cells[..., 2] = 3.0 + torch.linspace(0, 1, 24, dtype=torch.float64)
    judged = judge(prediction, "f1")
    torch.manual_seed(7)
    off = torch.randn(4000, 2, dtype=torch.float64) * torch.tensor([0.2, 1.0])
    off = off * judged.covariance[..., 2, 2].sqrt()
    assert float(off.abs().max()) < REACH["f1"]
    place = (judged.position[..., 2] + off).unsqueeze(-1)
    position = torch.cat([prediction.position[..., :2], place], -1)
    source = torch.arange(2).expand(4000, 2)
    log_spread = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([log_spread], lr=0.05)
    for _ in range(200):
        spread = log_spread.exp().expand(4000, 2)
        optimizer.zero_grad()
        own(replace(prediction, range_spread=spread), position).loss(source).mean().backward()
        optimizer.step()
    variance = judged.covariance[..., 2, 2] * (2.0 * log_spread.detach()).exp()
    held = (off.square() / variance <= float(chi2.ppf(0.9, df=1))).double().mean(0)
    assert bool(((held - 0.9).abs() < 0.015).all()), held
    assert float((log_spread[1] - log_spread[0]).detach()) == pytest.approx(math.log(5.0), abs=0.1)


def test_a_range_that_is_exact_has_a_finite_loss_and_gradient() -> None:
    """Also where all cells are one: the posterior then leaves no variance."""
    prediction = judged_slots(2, 3, 4)
    assert prediction.cells is not None
    prediction.cells[..., 2] = 2.0
    spread = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    wide = replace(prediction, range_spread=spread)
    loss = own(wide, prediction.cells[:, :, 0].clone()).loss(torch.arange(3).expand(2, 3))
    loss.sum().backward()
    assert bool(torch.isfinite(loss).all())
    assert spread.grad is not None
    assert bool(torch.isfinite(spread.grad).all())


def test_ellipsoids_are_fitted_to_what_is_pointed_at_and_do_not_move_it() -> None:
    """Directions follow the Huber distance alone, cells the cross-entropy alone."""
    prediction = judged_slots(6, 4, 24)
    position = around(prediction, 3)
    source = torch.randint(3, (6, 4), generator=torch.Generator().manual_seed(2))
    place = prediction.position.clone().requires_grad_()
    score = prediction.log_pointer.clone().requires_grad_()
    spread = torch.ones(6, 4, dtype=torch.float64)
    whole = own(
        replace(prediction, position=place, log_pointer=score, range_spread=spread), position
    )
    moved, weighed = torch.autograd.grad(whole.loss(source).sum(), (place, score))
    (expected,) = torch.autograd.grad(whole.cross_entropy(source).sum(), score)
    torch.testing.assert_close(weighed, expected)
    truth = position.gather(1, source.unsqueeze(-1).expand(-1, -1, 3))
    gates = ((place - truth)[..., :2] / GATE).detach()
    huber = 4.0 * gates.clamp(-0.5, 0.5) / GATE
    torch.testing.assert_close(moved[..., :2], huber)


def test_a_direction_that_is_exact_has_a_finite_loss_and_gradient() -> None:
    prediction = judged_slots(2, 3, 4)
    assert prediction.cells is not None
    assert prediction.angle_covariance is not None
    leaf = prediction.angle_covariance.clone().requires_grad_()
    position = torch.cat([prediction.position[..., :2], torch.full((2, 3, 1), 3.0)], -1)
    loss = own(replace(prediction, angle_covariance=leaf), position).loss(
        torch.arange(3).expand(2, 3)
    )
    loss.sum().backward()
    assert bool(torch.isfinite(loss).all())
    assert leaf.grad is not None
    assert bool(torch.isfinite(leaf.grad).all())


def test_loss_of_cells_at_one_range_is_finite_with_its_gradient() -> None:
    prediction = judged_slots(2, 3, 4)
    assert prediction.cells is not None
    prediction.cells[..., 2] = 3.0
    leaf = prediction.log_pointer.clone().requires_grad_()
    position = around(prediction, 2)
    position[0, 0, 2] = 3.0  # exactly there
    loss = own(replace(prediction, log_pointer=leaf), position).loss(torch.zeros(2, 3).long())
    loss.sum().backward()
    assert bool(torch.isfinite(loss).all())
    assert leaf.grad is not None
    assert bool(torch.isfinite(leaf.grad).all())
    assert float(leaf.grad.sum()) == pytest.approx(-6.0), "weights of one slot add to one"


def test_loss_is_least_where_the_pointer_is_the_source() -> None:
    prediction = judged_slots(1, 1, 5)
    assert prediction.cells is not None
    ranges = prediction.cells[0, 0, :, 2]
    position = torch.cat([prediction.cells[:, :, 0, :2], ranges[None, None, 3:4]], -1)
    losses = []
    for s in range(5):
        score = torch.zeros(1, 1, 5, dtype=torch.float64)
        score[..., s] = 5.0
        sharp = replace(prediction, log_pointer=torch.log_softmax(score, -1))
        losses.append(float(own(sharp, position).loss(torch.zeros(1, 1).long())))
    assert int(np.argmin(losses)) == 3


def test_barred_pairs_stay_unmatched_and_the_rest_is_the_best_assignment() -> None:
    """Against all assignments: as many pairs as may be, then the highest score."""
    generator = torch.Generator().manual_seed(3)
    score = torch.rand(40, 4, 3, generator=generator, dtype=torch.float64)
    score = score.masked_fill(torch.rand(40, 4, 3, generator=generator) < 0.5, -torch.inf)
    prediction = judged_slots(40, 4, 2)
    count = torch.randint(4, (40,), generator=generator)
    present = torch.arange(3) < count.unsqueeze(-1)
    matched, source = match_slots(prediction, score, present)
    assert matched.dtype == torch.bool
    assert source.dtype == torch.int64
    bonus = 0.5 * torch.sigmoid(prediction.existence)
    fewer = 0
    for b, n in enumerate(count.tolist()):
        best = (0, 0.0)
        for k in range(min(4, n) + 1):
            for slots in itertools.permutations(range(4), k):
                for sources in itertools.combinations(range(n), k):
                    worth = sum(
                        float(score[b, i, j] + bonus[b, i])
                        for i, j in zip(slots, sources, strict=True)
                    )
                    if math.isfinite(worth):
                        best = max(best, (k, worth))
        pairs = [(i, int(source[b, i])) for i in range(4) if matched[b, i]]
        assert len({j for _, j in pairs}) == len(pairs), "no source is of two slots"
        assert all(j < n for _, j in pairs)
        worth = sum(float(score[b, i, j] + bonus[b, i]) for i, j in pairs)
        assert (len(pairs), worth) == (best[0], pytest.approx(best[1]))
        assert not source[b][~matched[b]].any()
        fewer += best[0] < n
    assert fewer, "the case must hold sources that nobody may take"


def test_two_that_may_be_are_matched_rather_than_one_that_is_nearer() -> None:
    prediction = judged_slots(1, 2, 2)
    score = torch.tensor([[[2.0, 0.1], [0.1, -torch.inf]]], dtype=torch.float64)
    matched, source = match_slots(prediction, score, torch.ones(1, 2, dtype=torch.bool))
    assert matched.tolist() == [[True, True]]
    assert source.tolist() == [[1, 0]]


def test_slots_of_equal_score_are_matched_by_their_existence() -> None:
    prediction = judged_slots(1, 3, 2)
    existence = torch.tensor([[-1.0, 2.0, 0.5]], dtype=torch.float64)
    score = torch.ones(1, 3, 1, dtype=torch.float64)
    matched, _ = match_slots(
        replace(prediction, existence=existence), score, torch.ones(1, 1, dtype=torch.bool)
    )
    assert matched.tolist() == [[False, True, False]]


def case(existence: float | None = None) -> tuple[Scenes, Prediction, ScenesLoss]:
    generator = torch.Generator().manual_seed(5)
    scenes = simulate(12, SCENE, ARRAY, generator=generator, dtype=torch.complex128)
    prediction = judged_slots(12, 4, 5)
    assert prediction.cells is not None
    # Slot 0 looks at the first source and slot 2 near the second.
    prediction.cells[:, 0, :, :2] = scenes.position[:, :1, :2]
    prediction.cells[:, 2, :, :2] = scenes.position[:, 1:2, :2] + 0.5 * GATE
    if existence is not None:
        prediction = replace(prediction, existence=torch.full_like(prediction.existence, existence))
    dictionary = PolarGrid.covering(SCENE, 6, 4, 2).steering(ARRAY, dtype=torch.complex128)
    loss = ScenesLoss(LossConfig(), ARRAY, "spherical", dictionary, torch.ones(3).double())
    return scenes, prediction, loss


def test_existence_and_position_are_means_over_slots_and_over_those_that_hold_a_source() -> None:
    scenes, prediction, loss = case()
    terms = loss(prediction, prediction.covariance, scenes).terms
    pointing = own(prediction, scenes.position)
    matched, source = match_slots(prediction, pointing.score(), scenes.present)
    assert matched.any()
    p = torch.sigmoid(prediction.existence)
    entropy = -torch.where(matched, p.log(), (1 - p).log()).mean()
    assert float(terms["existence"]) == pytest.approx(float(entropy))
    mean = pointing.loss(source)[matched].mean()
    assert float(terms["position"]) == pytest.approx(float(mean))


@pytest.mark.parametrize("existence", [-200.0, 200.0, None])
def test_gradients_are_finite_also_where_existence_is_extreme(existence: float | None) -> None:
    scenes, prediction, loss = case(existence)
    leaves = {
        name: getattr(prediction, name).clone().requires_grad_()
        for name in ("factor", "existence", "log_pointer")
    }
    moved = replace(prediction, **leaves)
    value = loss(moved, moved.covariance, scenes)
    value.total.backward()
    assert bool(torch.isfinite(value.total))
    for leaf in leaves.values():
        assert leaf.grad is not None
        assert bool(torch.isfinite(torch.view_as_real(leaf.grad + 0j)).all())
        assert leaf.grad.abs().max() > 0


def test_scenes_without_sources_match_nothing_and_cost_only_their_existence() -> None:
    scenes, prediction, loss = case()
    index = (scenes.n_sources == 0).nonzero().squeeze(-1)
    assert len(index)
    tensors = {n: v for n, v in vars(prediction).items() if isinstance(v, Tensor)}
    empty, judged = scenes[index], Prediction(**{n: v[index] for n, v in tensors.items()})
    matched, _ = match_slots(judged, own(judged, empty.position).score(), empty.present)
    assert not matched.any()
    terms = loss(judged, judged.covariance, empty).terms
    assert float(terms["position"]) == 0.0
    expected = torch.nn.functional.softplus(judged.existence).mean()
    assert float(terms["existence"]) == pytest.approx(float(expected))
