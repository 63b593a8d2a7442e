"""Losses: against dense references, their gradients, their laws and their schedule."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from model.loss import MISSED, LossConfig, ScenesLoss
from model.pointing import match_slots
from model.prediction import Prediction
from physics import LowRankCovariance, PlanarArray, PolarGrid, SceneConfig, Scenes, simulate
from physics.blend import blend
from tests.reference import losses as reference

ARRAY = PlanarArray(6, 6)
SCENE = SceneConfig(n_antennas=4, n_snapshots=4, min_sources=0, max_sources=3)
GRID = PolarGrid.covering(SCENE, 6, 4, 2)


def tensors(prediction: Prediction) -> list[Tensor]:
    found = (getattr(prediction, f.name) for f in fields(prediction))
    return [tensor for tensor in found if tensor is not None]


def _case(dtype: torch.dtype = torch.complex128, n_slots: int = 4, n_scenes: int = 6):
    generator = torch.Generator().manual_seed(3)
    scenes = simulate(n_scenes, SCENE, ARRAY, generator=generator, dtype=dtype)
    real = dtype.to_real()
    n_cells = int(np.prod(GRID.shape))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=real)

    factor = torch.complex(
        normal(n_scenes, ARRAY.size, n_slots), normal(n_scenes, ARRAY.size, n_slots)
    )
    prediction = Prediction(
        factor=factor,
        existence=normal(n_scenes, n_slots),
        log_pointer=torch.log_softmax(normal(n_scenes, n_slots, n_cells), -1),
        position=normal(n_scenes, n_slots, 3),
    )
    measured = LowRankCovariance(
        torch.complex(normal(n_scenes, ARRAY.size, 4), normal(n_scenes, ARRAY.size, 4))
    )
    dictionary = GRID.steering(ARRAY, dtype=dtype)
    loss = ScenesLoss(LossConfig(), ARRAY, "spherical", dictionary, torch.ones(3, dtype=real))
    return scenes, prediction, blend(prediction.covariance, measured, 0.3), loss, dictionary


def test_every_covariance_term_equals_its_dense_reference() -> None:
    scenes, prediction, blended, loss, dictionary = _case()
    terms = loss(prediction, blended, scenes).terms
    truth = scenes.covariance(ARRAY, "spherical")
    from physics import steering_vector

    a = steering_vector(scenes.position, ARRAY).numpy()
    dense, dense_truth = blended.dense().numpy(), truth.dense().numpy()
    dense_pred = prediction.covariance.dense().numpy()
    counts = scenes.n_sources.tolist()
    assert min(counts) == 0 < 1 < max(counts), "the case must hold empty and crowded scenes"
    held = [i for i, k in enumerate(counts) if k]  # an empty scene's R_true has another trace
    nmse = np.mean([reference.nmse(dense[i], dense_truth[i]) for i in held])
    pred = np.mean([reference.nmse(dense_pred[i], dense_truth[i]) for i in held])
    align = np.mean(
        [reference.subspace_align(dense[i], a[i, :k].T) for i, k in enumerate(counts) if k]
    )
    contrast = np.concatenate(
        [
            reference.peak_contrast(dense[i], a[i, :k].T, dictionary.numpy().T, loss.temperature)
            for i, k in enumerate(counts)
            if k
        ]
    ).mean()
    assert float(terms["nmse"]) == pytest.approx(nmse, rel=1e-10)
    assert float(terms["cov_pred"]) == pytest.approx(pred, rel=1e-10)
    assert float(terms["subspace_align"]) == pytest.approx(align, rel=1e-8)
    assert float(terms["peak_contrast"]) == pytest.approx(contrast, rel=1e-8)


def test_single_precision_agrees_with_double() -> None:
    double = _case(torch.complex128)
    scenes, prediction, blended, _, dictionary = double
    exact = double[3](prediction, blended, scenes)

    def narrow(t: Tensor) -> Tensor:
        return t.to(torch.complex64 if t.is_complex() else torch.float32)

    single = ScenesLoss(LossConfig(), ARRAY, "spherical", narrow(dictionary), torch.ones(3))
    small = single(
        Prediction(*(narrow(t) for t in tensors(prediction))),
        blended.to(torch.complex64),
        scenes._map(lambda t: narrow(t) if t.is_floating_point() or t.is_complex() else t),
    )
    # Sums of a few hundred products in float32: 1e-4 is 1000 roundings.
    assert float(small.total) == pytest.approx(float(exact.total), rel=1e-4)


def test_gradients_of_the_whole_loss_match_finite_differences() -> None:
    scenes, prediction, _, loss, _ = _case(n_scenes=3)
    measured = LowRankCovariance(torch.randn(3, ARRAY.size, 4, dtype=torch.complex128))

    def total(factor: Tensor, existence: Tensor, score: Tensor, position: Tensor) -> Tensor:
        p = Prediction(factor, existence, torch.log_softmax(score, -1), position)
        return loss(p, blend(p.covariance, measured, 0.3), scenes).total

    inputs = [
        t.clone().requires_grad_()
        for t in (
            prediction.factor,
            prediction.existence,
            prediction.log_pointer,
            prediction.position,
        )
    ]
    assert torch.autograd.gradcheck(total, inputs, atol=1e-6, rtol=1e-4, fast_mode=True)


@pytest.mark.parametrize(
    "term", ["cov_pred", "subspace_align", "peak_contrast", "existence", "position"]
)
def test_every_term_is_on_by_default_and_contributes_to_the_gradient(term: str) -> None:
    scenes, prediction, _, _, dictionary = _case()
    assert LossConfig().weights("main")[term] > 0

    def gradients(weights: dict[str, float]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors(prediction)]
        p = Prediction(*leaves)
        value = ScenesLoss(LossConfig(**weights), ARRAY, "spherical", dictionary, torch.ones(3))(
            p, p.covariance, scenes
        )
        return [
            torch.zeros_like(t) if g is None else g
            for t, g in zip(
                leaves, torch.autograd.grad(value.total, leaves, allow_unused=True), strict=True
            )
        ]

    with_term = gradients({})
    without = gradients({term: 0.0})
    change = sum(float((a - b).abs().sum()) for a, b in zip(with_term, without, strict=True))
    assert change > 1e-6


def test_lesson_4_weights_follow_the_schedule() -> None:
    config = LossConfig()
    phases = [config.weights(p) for p in ("warmup", "main", "final")]
    assert [w["subspace_align"] for w in phases] == pytest.approx([0.02, 0.05, 0.07])
    assert [w["peak_contrast"] for w in phases] == pytest.approx([0.05, 0.10, 0.12])
    steps = [config.phase(s, 100, 10) for s in range(100)]
    assert [(p, len(list(g))) for p, g in itertools.groupby(steps)] == [
        ("warmup", 10), ("main", 70), ("final", 20)
    ]  # fmt: skip
    assert LossConfig(schedule=False).weights("warmup")["peak_contrast"] == 0.1


def test_lesson_7_auxiliary_nmse_sees_r_pred_alone() -> None:
    scenes, prediction, _, loss, _ = _case()
    truth = scenes.covariance(ARRAY, "spherical")
    value = loss(prediction, truth, scenes)
    assert float(value.terms["nmse"]) < 1e-12, "a perfect R_blend"
    assert float(value.terms["cov_pred"]) > 0.1, "does not excuse a lazy R_pred"
    assert LossConfig().cov_pred == 0.03


def test_matching_is_the_cheapest_assignment_whatever_the_order_of_slots_and_sources() -> None:
    scenes, prediction, _, _, dictionary = _case(n_slots=4)
    from physics import steering_vector

    a = steering_vector(scenes.position, ARRAY)
    overlap = (dictionary @ a.mH).abs().square()
    score = prediction.log_pointer.exp() @ overlap
    matched, source = match_slots(prediction, score, scenes.present)
    cost = -(prediction.log_pointer.exp() @ overlap) - 0.5 * torch.sigmoid(
        prediction.existence
    ).unsqueeze(-1)
    for i, count in enumerate(scenes.n_sources.tolist()):
        best = min(
            sum(float(cost[i, s, k]) for k, s in enumerate(slots))
            for slots in itertools.permutations(range(4), count)
        )
        got = sum(float(cost[i, s, source[i, s]]) for s in range(4) if matched[i, s])
        assert int(matched[i].sum()) == count
        assert sorted(source[i][matched[i]].tolist()) == list(range(count))
        assert got == pytest.approx(best)


def test_trap_loss_is_invariant_to_the_order_of_slots_and_sources() -> None:
    scenes, prediction, blended, loss, _ = _case()
    order = torch.tensor([2, 0, 3, 1])
    shuffled = Prediction(
        prediction.factor[..., order],
        prediction.existence[:, order],
        prediction.log_pointer[:, order],
        prediction.position[:, order],
    )
    two = scenes[(scenes.n_sources == 3).nonzero().squeeze(-1)]
    assert len(two), "needs a scene with three sources"
    index = (scenes.n_sources == 3).nonzero().squeeze(-1)
    swapped = type(two)(
        two.y, two.H, two.codes, two.position.flip(1), two.power.flip(1), two.n_sources, two.snr_db
    )
    pick = LowRankCovariance(blended.factor[index], blended.loading[index])
    first = loss(Prediction(*(t[index] for t in tensors(prediction))), pick, two)
    second = loss(Prediction(*(t[index] for t in tensors(shuffled))), pick, swapped)
    assert float(first.total) == pytest.approx(float(second.total), rel=1e-10)


def test_more_sources_than_slots_leave_some_sources_unmatched() -> None:
    scenes, prediction, blended, loss, dictionary = _case(n_slots=1)
    from physics import steering_vector

    overlap = (dictionary @ steering_vector(scenes.position, ARRAY).mH).abs().square()
    score = prediction.log_pointer.exp() @ overlap
    matched, _ = match_slots(prediction, score, scenes.present)
    assert matched.sum(-1).tolist() == scenes.n_sources.clamp_max(1).tolist()
    assert torch.isfinite(loss(prediction, blended, scenes).total)


def test_scenes_without_any_source_give_a_finite_loss_and_gradient() -> None:
    scenes, prediction, _, loss, _ = _case()
    empty = scenes[(scenes.n_sources == 0).nonzero().squeeze(-1)]
    index = (scenes.n_sources == 0).nonzero().squeeze(-1)
    leaves = [t[index].clone().requires_grad_() for t in tensors(prediction)]
    p = Prediction(*leaves)
    value = loss(p, p.covariance, empty)
    value.total.backward()
    assert torch.isfinite(value.total)
    assert float(value.terms["subspace_align"]) == float(value.terms["peak_contrast"]) == 0.0
    assert all(t.grad is None or bool(torch.isfinite(t.grad).all()) for t in leaves)


def test_lesson_3_equal_columns_give_a_finite_gradient() -> None:
    scenes, prediction, _, loss, _ = _case()
    factor = prediction.factor[..., :1].expand(-1, -1, 4).clone().requires_grad_()
    p = Prediction(factor, prediction.existence, prediction.log_pointer, prediction.position)
    loss(p, p.covariance, scenes).total.backward()
    assert factor.grad is not None
    assert bool(torch.isfinite(torch.view_as_real(factor.grad)).all())


def test_nothing_in_the_loss_is_n_by_n() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        square = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, Tensor) and t.shape[-2:] == (ARRAY.size, ARRAY.size):
                    type(self).square += 1
            return out

    scenes, prediction, _, loss, _ = _case()
    leaves = [t.clone().requires_grad_() for t in tensors(prediction)]
    with Largest():
        p = Prediction(*leaves)
        loss(p, p.covariance, scenes).total.backward()
    assert Largest.square == 0
    with Largest():
        prediction.covariance.dense()
    assert Largest.square > 0, "the detector must see a dense matrix"


def test_a_drawn_share_of_the_decoys_stands_for_all_of_them() -> None:
    scenes, prediction, blended, _, dictionary = _case()
    loss = ScenesLoss(
        LossConfig(decoys=len(dictionary) // 4), ARRAY, "spherical", dictionary, torch.ones(3)
    )
    full = float(loss(prediction, blended, scenes).terms["peak_contrast"])
    drawn = [
        float(
            loss(
                prediction,
                blended,
                scenes,
                decoys=loss.draw_decoys("main", torch.Generator().manual_seed(i)),
            ).terms["peak_contrast"]
        )
        for i in range(100)
    ]  # fmt: skip
    assert len(set(drawn)) == 100, "every step draws others"
    # The logarithm of a mean over 12 cells falls a little short; a wrong scale would err by log 4.
    assert np.mean(drawn) == pytest.approx(full, abs=0.4)


def test_position_counts_the_cells_between_a_slot_and_its_source() -> None:
    scenes, prediction, blended, _, dictionary = _case()
    cell = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    loss = ScenesLoss(LossConfig(), ARRAY, "spherical", dictionary, cell)
    from physics import steering_vector

    overlap = (dictionary @ steering_vector(scenes.position, ARRAY).mH).abs().square()
    score = prediction.log_pointer.exp() @ overlap
    _, source = match_slots(prediction, score, scenes.present)
    truth = scenes.position.gather(1, source.unsqueeze(-1).expand(-1, -1, 3)).clone()
    truth[..., 2] = 1 / truth[..., 2]

    def term(position: Tensor) -> float:
        moved = Prediction(
            prediction.factor, prediction.existence, prediction.log_pointer, position
        )
        return float(loss(moved, blended, scenes).terms["position"])

    exact = term(truth)
    for axis in range(3):
        off = truth.clone()
        off[..., axis] += 3 * cell[axis]
        # Huber with a knee at one cell, 3 - 1/2, weighted by 0.1
        assert term(off) - exact == pytest.approx(0.25)


def naming(scenes: Scenes, logit: float, spread_deg: float, off_deg: float = 0.0) -> Prediction:
    """A slot a source, so far off, as sure of it as the logit, and cells of ranges around it."""
    at = scenes.position.clone()
    at[..., 0] += math.radians(off_deg)
    steps = torch.linspace(-1.0, 1.0, 5, dtype=at.dtype)
    cells = at.unsqueeze(2).repeat(1, 1, 5, 1)
    cells[..., 2] += steps
    sure = torch.log_softmax(-(steps**2) / 0.1, -1).expand(*at.shape[:2], 5)
    covariance = math.radians(spread_deg) ** 2 * torch.eye(2, dtype=at.dtype)
    return Prediction(
        factor=torch.ones(len(scenes), ARRAY.size, at.shape[1], dtype=torch.complex128),
        existence=torch.where(scenes.present, logit, -logit).to(at.dtype),
        log_pointer=sure,
        position=at,
        cells=cells,
        angle_covariance=covariance.expand(*at.shape[:2], 2, 2),
    )


def test_the_likelihood_is_best_of_who_finds_all_and_knows_how_well() -> None:
    scenes, _, _, loss, _ = _case(n_scenes=40)

    def of(prediction: Prediction) -> float:
        return float(loss.nll(prediction, scenes, SCENE).mean())

    good = of(naming(scenes, 4.0, 0.5))
    far = naming(scenes, 4.0, 0.5, off_deg=20.0)  # no source within any slot's gate
    silent = of(naming(scenes, -4.0, 0.5, off_deg=20.0))
    assert good < of(naming(scenes, 4.0, 2.0)), "less sure of where than it could be"
    assert good < of(naming(scenes, 1.0, 0.5)), "less sure of that than it could be"
    assert of(naming(scenes, 4.0, 0.5, off_deg=3.0)) > of(naming(scenes, 4.0, 2.0, off_deg=3.0))
    assert good < of(far)
    assert of(naming(scenes, 4.0, 2.0, off_deg=3.0)) < silent
    # Nothing found and nothing claimed: every source costs what one anywhere does.
    quiet = naming(scenes, 30.0, 0.5, off_deg=20.0)
    quiet = replace(quiet, existence=torch.full_like(quiet.existence, -30.0))
    wanted = -scenes.n_sources.double() * math.log(MISSED) + MISSED
    assert torch.allclose(loss.nll(quiet, scenes, SCENE), wanted)


def test_the_likelihood_pays_no_more_for_a_bad_place_than_for_none() -> None:
    scenes, _, _, loss, _ = _case(n_scenes=40)
    wrong = naming(scenes, 4.0, 1e-3, off_deg=4.0)  # thousands of its own deviations off
    cost = loss.nll(wrong, scenes, SCENE)
    sure = math.log1p(math.exp(4.0)) - math.log(MISSED)  # of an empty slot, and of the source
    small = math.log1p(math.exp(-4.0))
    n_left = scenes.present.shape[1] - scenes.n_sources
    assert torch.allclose(cost, scenes.n_sources.double() * sure + n_left * small + MISSED)


def test_more_sources_than_slots_are_charged_for() -> None:
    scenes, prediction, _, loss, _ = _case(n_slots=1, n_scenes=40)
    few = scenes.n_sources == 1
    many = scenes.n_sources == 3
    cost = loss.nll(prediction, scenes, SCENE)
    assert float(cost[many].mean() - cost[few].mean()) > -1.9 * math.log(MISSED)
