from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from physics.detections import Detections
from physics.metrics import Tolerance, count_confusion, errors, gospa, match
from tests.physics.helpers import eps, found, three_scenes, truth
from tests.reference import metrics as reference

DTYPES = [torch.float64, torch.float32]


def drawn(
    B: int, n: int, seed: int, spread: float = 1.0, empty: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Positions around (0, 0, 3 m) within some tolerances of each other, some slots absent."""
    generator = torch.Generator().manual_seed(seed)
    unit = torch.rand(B, n, 3, generator=generator, dtype=torch.float64) - 0.5
    scale = spread * torch.tensor([math.radians(20), math.radians(20), 4.0], dtype=torch.float64)
    middle = torch.tensor([0.0, 0.0, 3.0], dtype=torch.float64)
    return middle + unit * scale, torch.rand(B, n, generator=generator) >= empty


sizes = st.tuples(st.integers(1, 3), st.integers(0, 4), st.integers(0, 4))  # B, K, P
many = settings(max_examples=100)


# Matching


def test_a_source_is_hit_within_all_three_tolerances_at_once() -> None:
    # Defaults 5 deg, 5 deg, 1 m; the box has corners that a ball would cut off.
    nearby = [
        ((4.9, -4.9, 2.01), True),
        ((5.1, 0.0, 3.0), False),
        ((0.0, -5.1, 3.0), False),
        ((0.0, 0.0, 4.1), False),
        ((0.0, 0.0, 4.0), True),  # exactly on the limit, and exact in binary
    ]
    position, present = truth(*[[(0.0, 0.0, 3.0)] for _ in nearby])
    matching = match(found(*[[place] for place, _ in nearby]), position, present)
    assert matching.hit[:, 0].tolist() == [hit for _, hit in nearby]
    assert matching.n_hits.tolist() == [int(hit) for _, hit in nearby]


def test_the_callers_tolerance_decides() -> None:
    position, present = truth([(0.0, 0.0, 3.0)])
    detections = found([(7.0, 0.5, 3.2)])
    for tolerance, hit in (
        (Tolerance(8, 1, 0.5), True),
        (Tolerance(6, 1, 0.5), False),
        (Tolerance(8, 0.4, 0.5), False),
        (Tolerance(8, 1, 0.1), False),
        (Tolerance(math.inf, math.inf, 0.3), True),
    ):
        assert bool(match(detections, position, present, tolerance).hit) is hit


def test_the_most_pairs_come_before_the_nearest_pair() -> None:
    # Sources at 0 and 4 deg, detections at 3.9 and 8.9 deg. The nearest pair (4, 3.9) would leave
    # 8.9 with 0 deg, 8.9 deg apart; (0, 3.9) and (4, 8.9) are 3.9 and 4.9 deg apart: two hits.
    position, present = truth([(0, 0, 3), (4, 0, 3)])
    matching = match(found([(3.9, 0, 3), (8.9, 0, 3)]), position, present)
    assert matching.detection.tolist() == [[0, 1]]
    # The same along a chain of four, where any pair at distance 0.1 breaks the chain.
    position, present = truth([(4.0 * k, 0, 3) for k in range(4)])
    matching = match(found([(4.0 * k + 3.9, 0, 3) for k in range(4)]), position, present)
    assert matching.detection.tolist() == [[0, 1, 2, 3]]


def test_among_as_many_pairs_the_nearest_in_units_of_the_tolerance_win() -> None:
    # 4 deg off is 0.8 of the tolerance, 0.5 m off is 0.5 of it, though 0.07 rad < 0.5 m.
    position, present = truth([(0, 0, 3)])
    assert match(found([(4, 0, 3), (0, 0, 3.5)]), position, present).detection.tolist() == [[1]]
    # Crossed: 0.1 + 0.1 deg against 1.9 + 1.9 deg.
    position, present = truth([(0, 0, 3), (2, 0, 3)])
    assert match(found([(1.9, 0, 3), (0.1, 0, 3)]), position, present).detection.tolist() == [
        [1, 0]
    ]


def test_azimuth_is_on_a_circle_and_elevation_is_not() -> None:
    position, present = truth([(179, 0, 3)], [(-179.5, 0, 3)], [(0, 89, 3)], [(360, 0, 3)])
    detections = found([(-179, 0, 3)], [(178.5, 0, 3)], [(0, -89, 3)], [(-361, 0, 3)])
    matching = match(detections, position, present)
    assert matching.hit[:, 0].tolist() == [True, True, False, True]
    azimuth = errors(detections, matching, position)[:, 0, 0].rad2deg()
    assert torch.allclose(azimuth[[0, 1, 3]], torch.tensor([2.0, -2.0, -1.0]).double())


def test_a_detection_serves_one_source_and_a_source_one_detection() -> None:
    here = (10.0, 5.0, 2.0)
    position, present = truth([here], [here, here], [here, here], [here])
    matching = match(
        found([here, here], [here], [here, here], [here, here, here]), position, present
    )
    assert matching.n_hits.tolist() == [1, 1, 2, 1]
    assert matching.n_found.tolist() == [2, 1, 2, 3]
    assert matching.n_true.tolist() == [1, 2, 2, 1]
    assert sorted(matching.detection[2].tolist()) == [0, 1]


@many
@given(size=sizes, seed=st.integers(0, 10_000), spread=st.sampled_from([0.2, 0.6, 1.5]))
def test_matching_is_the_best_of_all_that_there_are(
    size: tuple[int, int, int], seed: int, spread: float
) -> None:
    B, K, P = size
    position, present = drawn(B, K, seed, spread)
    detections = Detections(*drawn(B, P, seed + 1, spread))
    tolerance = Tolerance(4.0, 6.0, 0.8)
    limits = tolerance.limits()
    matching = match(detections, position, present, tolerance)
    for b in range(B):
        rows = [k for k in range(K) if matching.hit[b, k]]
        chosen = matching.detection[b, rows].tolist()
        assert len(set(chosen)) == len(chosen) == int(matching.n_hits[b])
        assert bool(present[b, rows].all())
        assert bool(detections.present[b, chosen].all())
        apart = (detections.position[b, chosen] - position[b, rows]).abs()
        assert bool((apart <= limits).all())
        most, least = reference.best_matching(
            detections.position[b, detections.present[b]].numpy(),
            position[b, present[b]].numpy(),
            limits.numpy(),
        )
        assert len(chosen) == most
        assert float((apart / limits).square().sum(-1).sqrt().sum()) == pytest.approx(least)


# Rates


@pytest.mark.parametrize("dtype", DTYPES)
def test_rates_pool_the_counts_of_the_scenes(dtype: torch.dtype, device: torch.device) -> None:
    detections, position, present = three_scenes()
    detections = Detections(detections.position.to(device, dtype), detections.present.to(device))
    matching = match(detections, position.to(device, dtype), present.to(device))
    assert matching.detection.tolist() == [[0, -1], [1, -1], [-1, -1]]
    assert matching.detection.dtype == matching.n_hits.dtype == torch.int64
    assert matching.detection.device.type == device.type
    assert matching.precision == pytest.approx(2 / 5)  # (1 + 1 + 0) / (2 + 3 + 0)
    assert matching.recall == pytest.approx(2 / 3)  # (1 + 1 + 0) / (2 + 1 + 0)
    assert matching.f1 == pytest.approx(4 / 8)  # 2 * 2 / (5 + 3)
    assert matching.all_found == pytest.approx(2 / 3)  # the second and, having none, the third
    assert matching.count_accuracy == pytest.approx(2 / 3)  # 2 = 2, 1 != 3, 0 = 0


def test_some_scenes_are_taken_by_slice_mask_or_indices() -> None:
    matching = match(*three_scenes())
    first = matching[:1]
    assert (len(first), first.precision, first.recall) == (1, 0.5, 0.5)
    for index in (torch.tensor([False, True, True]), torch.tensor([1, 2]), slice(1, None)):
        rest = matching[index]
        assert len(rest) == 2
        assert rest.precision == pytest.approx(1 / 3)
        assert rest.recall == 1.0
        assert rest.detection.tolist() == [[1, -1], [-1, -1]]
    assert matching[torch.tensor([1, 1])].n_found.tolist() == [3, 3]


def test_f1_is_one_of_nothing_in_nothing_and_zero_where_one_side_is_empty() -> None:
    here = [(0.0, 0.0, 3.0)]
    nothing, alone, missed = (
        match(found(a), *truth(b)) for a, b in (([], []), (here, []), ([], here))
    )
    assert (nothing.precision, nothing.recall, nothing.f1) == (1.0, 1.0, 1.0)
    assert (nothing.all_found, nothing.count_accuracy) == (1.0, 1.0)
    assert (alone.precision, alone.recall, alone.f1) == (0.0, 1.0, 0.0)
    assert (alone.all_found, alone.count_accuracy) == (1.0, 0.0)
    assert (missed.precision, missed.recall, missed.f1) == (1.0, 0.0, 0.0)
    assert (missed.all_found, missed.count_accuracy) == (0.0, 0.0)


def test_no_scenes_have_no_rate() -> None:
    matching = match(*three_scenes())[:0]
    for rate in ("precision", "recall", "f1", "all_found", "count_accuracy"):
        assert math.isnan(getattr(matching, rate))


@pytest.mark.parametrize("metric", [match, gospa])
def test_misfits_and_non_finite_positions_are_refused_with_their_place(metric: Any) -> None:
    detections, position, present = three_scenes()
    with pytest.raises(ValueError, match=r"present is \(2, 2\).*ask for \(3, 2\)"):
        metric(detections, position[:2], present[:2])
    with pytest.raises(ValueError, match=r"present is \(3,\)"):
        metric(detections, position[:, 0], present[:, 0])
    with pytest.raises(ValueError, match=r"present is \(3, 2\) torch.int64.*torch.bool"):
        metric(detections, position, present.long())
    with pytest.raises(ValueError, match=r"position is \(3, 1, 3\).*ask for \(3, 2, 3\)"):
        metric(detections, position[:, :1], present)
    with pytest.raises(ValueError, match=r"position holds .* index \(1, 1, 0\)"):
        metric(detections, position, torch.tensor([[1, 1], [1, 1], [0, 0]]).bool())
    detections.position[1, 2, 1] = math.inf
    with pytest.raises(ValueError, match=r"found holds .* index \(1, 2, 1\)"):
        metric(detections, position, present)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_tolerance_is_positive(value: float) -> None:
    for field in ("azimuth_deg", "elevation_deg", "range_m"):
        with pytest.raises(ValueError, match=f"{field} is {value}"):
            replace(Tolerance(), **{field: value})


# GOSPA


@pytest.mark.parametrize("dtype", DTYPES)
def test_gospa_adds_localisation_missed_and_false(dtype: torch.dtype, device: torch.device) -> None:
    # c = 2, p = 2, so c^p / 2 = 2. Scene 0: one pair 0.5 m apart (0.25), one source missed (2) and
    # two detections false (4): sqrt(6.25) = 2.5. Scene 1: 3 m apart is missed and false: sqrt(4).
    # Scene 2: 90 degrees apart at 0.6 and 0.8 m is 1 m in space. Scene 3: nothing.
    position, present = truth([(0, 0, 3), (0, 0, 9)], [(0, 0, 3)], [(0, 0, 0.6)], [], dtype=dtype)
    detections = found(
        [(60, 0, 9), (0, 0, 3.5), (-60, 0, 9)], [(0, 0, 6)], [(90, 0, 0.8)], [], dtype=dtype
    )
    detections = Detections(detections.position.to(device), detections.present.to(device))
    result = gospa(detections, position.to(device), present.to(device))
    for value, expected in (
        (result.total, [2.5, 2.0, 1.0, 0.0]),
        (result.localisation, [0.25, 0.0, 1.0, 0.0]),
        (result.missed, [2.0, 2.0, 0.0, 0.0]),
        (result.false, [4.0, 2.0, 0.0, 0.0]),
    ):
        assert value.dtype == dtype
        assert value.device.type == device.type
        # Positions of at most 9 m, squared, in the dtype of the input.
        assert value.tolist() == pytest.approx(expected, abs=100 * eps(dtype))


def test_cutoff_and_order_of_gospa() -> None:
    position, present = truth([(0, 0, 3), (0, 0, 9)])
    detections = found([(0, 0, 3.5)])
    # p = 1, c = 3: 0.5 + 3 / 2. p = 1, c = 0.4: 0.2 for the false, 0.4 for two missed.
    assert float(gospa(detections, position, present, c=3, p=1).total) == pytest.approx(2.0)
    far = gospa(detections, position, present, c=0.4, p=1)
    assert [float(v) for v in (far.total, far.localisation, far.missed, far.false)] == (
        pytest.approx([0.6, 0.0, 0.4, 0.2])
    )
    # Just within the cutoff a pair costs its distance, just beyond it c and no more.
    near = gospa(found([(0, 0, 4.9)]), *truth([(0, 0, 3)]))
    assert float(near.total) == pytest.approx(1.9)
    beyond = gospa(found([(0, 0, 5.1)]), *truth([(0, 0, 3)]))
    assert float(beyond.total) == pytest.approx(2.0)
    # Exactly as far apart as the cutoff is no pair: nothing localised, 2^2 / 2 on either side.
    at = gospa(found([(0, 0, 5)]), *truth([(0, 0, 3)]))
    assert [float(v) for v in (at.total, at.localisation, at.missed, at.false)] == [2, 0, 2, 2]
    for c, p in ((0.0, 2.0), (-1.0, 2.0), (math.inf, 2.0), (2.0, 0.5), (2.0, math.nan)):
        with pytest.raises(ValueError, match="expected a finite c above 0"):
            gospa(detections, position, present, c=c, p=p)


@many
@given(
    size=sizes,
    seed=st.integers(0, 10_000),
    c=st.sampled_from([0.5, 1.0, 2.0, 10.0]),
    p=st.sampled_from([1.0, 2.0, 3.0]),
)
def test_gospa_is_the_least_over_all_permutations(
    size: tuple[int, int, int], seed: int, c: float, p: float
) -> None:
    B, K, P = size
    position, present = drawn(B, K, seed)
    detections = Detections(*drawn(B, P, seed + 1))
    result = gospa(detections, position, present, c=c, p=p)
    for b in range(B):
        sets = (
            detections.position[b, detections.present[b]].numpy(),
            position[b, present[b]].numpy(),
        )
        assert float(result.total[b]) == pytest.approx(reference.gospa(*sets, c, p), abs=1e-9)
        parts = [float(v[b]) for v in (result.localisation, result.missed, result.false)]
        assert parts == pytest.approx(reference.gospa_parts(*sets, c, p), abs=1e-9)
        assert float(result.total[b]) ** p == pytest.approx(sum(parts), abs=1e-9)


@settings(max_examples=30)
@given(
    n=st.tuples(*(st.integers(0, 4),) * 3),
    seed=st.integers(0, 10_000),
    c=st.sampled_from([0.5, 2.0]),
    p=st.sampled_from([1.0, 2.0]),
)
def test_gospa_is_a_metric(n: tuple[int, int, int], seed: int, c: float, p: float) -> None:
    x, y, z = (drawn(20, size, 3 * seed + i) for i, size in enumerate(n))
    xy, yx = gospa(Detections(*x), *y, c=c, p=p), gospa(Detections(*y), *x, c=c, p=p)
    assert torch.allclose(xy.total, yx.total, rtol=1e-12)
    assert torch.allclose(xy.missed, yx.false)
    assert torch.allclose(xy.localisation, yx.localisation)
    assert not gospa(Detections(*x), *x, c=c, p=p).total.any()
    flipped = Detections(x[0].flip(1), x[1].flip(1))
    assert not gospa(flipped, *x, c=c, p=p).total.any()
    apart = x[1].sum(-1) != y[1].sum(-1)
    assert bool((xy.total[apart] > 0).all())
    xz, yz = (gospa(Detections(*s), *z, c=c, p=p).total for s in (x, y))
    assert bool((xz <= xy.total + yz + 1e-12).all())


# Counts and intervals


def test_confusion_has_true_counts_in_rows_and_found_counts_in_columns() -> None:
    n_true, n_found = torch.tensor([0, 1, 1, 2, 1]), torch.tensor([0, 2, 1, 0, 2])
    expected = [[1, 0, 0, 0], [0, 1, 2, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    confusion = count_confusion(n_true, n_found, 3)
    assert confusion.tolist() == expected
    assert confusion.dtype == torch.int64
    matching = match(*three_scenes())
    table = count_confusion(matching.n_true, matching.n_found, 3)
    assert float(table.diagonal().sum() / table.sum()) == pytest.approx(matching.count_accuracy)
    assert count_confusion(n_true[:0], n_found[:0], 1).tolist() == [[0, 0], [0, 0]]
    with pytest.raises(ValueError, match=r"n_found is 0..2, expected 0..1"):
        count_confusion(torch.zeros_like(n_found), n_found, 1)
    with pytest.raises(ValueError, match=r"n_true is -1..1"):
        count_confusion(n_true.clamp_max(1) - (n_true == 0).long(), n_found, 3)
    with pytest.raises(ValueError, match=r"n_found is \(4,\)"):
        count_confusion(n_true, n_found[:4], 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_metrics_take_positions_that_carry_a_gradient_and_give_none(dtype: torch.dtype) -> None:
    detections, position, present = three_scenes()
    leaf = detections.position.to(dtype).requires_grad_()
    tracked = Detections(leaf, detections.present)
    assert match(tracked, position.to(dtype), present).n_hits.tolist() == [1, 1, 0]
    assert not gospa(tracked, position.to(dtype), present).total.requires_grad


def test_scenes_do_not_mix() -> None:
    position, present = drawn(6, 3, seed=5)
    detections = Detections(*drawn(6, 4, seed=6))
    together, distance = match(detections, position, present), gospa(detections, position, present)
    for b in range(6):
        one = slice(b, b + 1)
        alone = match(detections[one], position[one], present[one])
        assert torch.equal(alone.detection, together.detection[one])
        total = gospa(detections[one], position[one], present[one]).total
        assert np.allclose(total, distance.total[one], rtol=1e-14)
