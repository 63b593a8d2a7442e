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

from physics import LowRankCovariance
from physics.detections import Detections
from physics.metrics import (
    Tolerance,
    count_confusion,
    coverage,
    crb_gated,
    errors,
    gated_recall,
    gospa,
    match,
    median_normalized_error,
    normalized_errors,
    squared_mahalanobis,
    subspace_error,
)
from tests.physics.helpers import complex_normal, eps
from tests.reference import losses
from tests.reference import metrics as reference

DTYPES = [torch.float64, torch.float32]
Places = list[
    list[tuple[float, float, float]]
]  # a list of (az deg, el deg, range m) for each scene


def padded(scenes: Places, filler: float, dtype: torch.dtype, n_slots: int | None = None) -> Any:
    """Positions (B, n, 3) [rad, rad, m] and presence; the slots left over hold ``filler``."""
    width = max([len(s) for s in scenes], default=0) if n_slots is None else n_slots
    position = torch.full((len(scenes), width, 3), filler, dtype=dtype)
    present = torch.zeros(len(scenes), width, dtype=torch.bool)
    for b, scene in enumerate(scenes):
        for k, (azimuth, elevation, r) in enumerate(scene):
            place = [math.radians(azimuth), math.radians(elevation), r]
            position[b, k] = torch.tensor(place, dtype=torch.float64).to(dtype)
            present[b, k] = True
    return position, present


def truth(*scenes: list[tuple[float, float, float]], dtype: torch.dtype = torch.float64) -> Any:
    """Position and presence; an absent slot's NaN must not matter."""
    return padded(list(scenes), math.nan, dtype)


def found(
    *scenes: list[tuple[float, float, float]], dtype: torch.dtype = torch.float64
) -> Detections:
    """Detections; absent slots lie on (0, 0, 0)."""
    return Detections(*padded(list(scenes), 0.0, dtype))


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


def three_scenes() -> tuple[Detections, Tensor, Tensor]:
    """2 true, 2 found, 1 hit; 1 true, 3 found, 1 hit; nothing and nothing."""
    position, present = truth([(0, 0, 3), (30, 0, 3)], [(0, 0, 3)], [])
    detections = found([(1, 0, 3), (60, 0, 3)], [(-50, 0, 3), (0, 1, 3), (50, 0, 3)], [])
    return detections, position, present


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


# Errors against the bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_found_minus_true_at_hits_alone(dtype: torch.dtype) -> None:
    position, present = truth([(10, 0, 3), (40, 5, 2)], [(0, 0, 3)], dtype=dtype)
    detections = found([(38, 6, 1.5), (0, 50, 5)], [(0, 0, 8)], dtype=dtype)
    matching = match(detections, position, present)
    error = errors(detections, matching, position)
    assert error.dtype == dtype
    assert error.shape == (2, 2, 3)
    expected = torch.tensor([math.radians(-2), math.radians(1), -0.5], dtype=dtype)
    assert torch.allclose(error[0, 1], expected, atol=4 * eps(dtype))
    assert bool(error[0, 0].isnan().all())
    assert bool(error[1].isnan().all())


def test_errors_of_no_detections_or_no_sources_are_empty_or_nan() -> None:
    for scene, shape in (([(0.0, 0.0, 3.0)], (1, 1, 3)), ([], (1, 0, 3))):
        position, present = truth(scene)
        detections = found([])
        error = errors(detections, match(detections, position, present), position)
        assert error.shape == shape
        assert bool(error.isnan().all())


def test_a_matching_of_other_detections_or_sources_is_refused() -> None:
    detections, position, present = three_scenes()
    matching = match(detections, position, present)
    with pytest.raises(ValueError, match="beyond the 1 of found"):
        errors(
            Detections(detections.position[:, :1], detections.present[:, :1]), matching, position
        )
    with pytest.raises(ValueError, match=r"position is \(2, 2, 3\).*ask for \(3, 2, 3\)"):
        errors(detections, matching, position[:2])
    with pytest.raises(ValueError, match="position is"):
        errors(detections[:2], matching, position[:2, :1])


def test_normalized_errors_are_in_standard_deviations_of_a_usable_bound() -> None:
    nan = math.nan
    error = torch.tensor([[[-0.02, 0.03, 1.0], [nan, 0.0, 1.0], [1.0, 1.0, 1.0]]])
    std = torch.tensor([[[0.01, 0.02, 0.5], [1.0, 0.0, math.inf], [0.0, -1.0, nan]]])
    normalized = normalized_errors(error, std)
    assert normalized[0, 0].tolist() == pytest.approx([2.0, 1.5, 2.0])
    assert bool(normalized[0, 1:].isnan().all())
    with pytest.raises(ValueError, match=r"crb_std is \(1, 1, 3\)"):
        normalized_errors(error, std[:, :1])
    with pytest.raises(ValueError, match=r"errors is \(1, 3, 2\)"):
        normalized_errors(error[..., :2], std[..., :2])


def test_median_error_skips_nan_and_masked_sources() -> None:
    nan = math.nan
    error = torch.tensor([[[1.0, -4.0, nan], [-3.0, 2.0, nan]], [[8.0, nan, nan], [2.0, 7.0, nan]]])
    std = torch.tensor([1.0, 2.0, 1.0]).expand(2, 2, 3)
    # Azimuth 1, 2, 3, 8: (2 + 3) / 2. Elevation 2, 1, 3.5 of (4, 2, 7) / 2: 2. Range: none.
    median = median_normalized_error(error, std)
    assert median[:2].tolist() == pytest.approx([2.5, 2.0])
    assert bool(median[2].isnan())
    mask = torch.tensor([[True, False], [True, False]])
    # Azimuth 1, 8: 4.5. Elevation 2.
    assert median_normalized_error(error, std, mask)[:2].tolist() == pytest.approx([4.5, 2.0])
    assert bool(median_normalized_error(error, std, torch.zeros(2, 2).bool()).isnan().all())
    with pytest.raises(ValueError, match=r"mask is \(2,\)"):
        median_normalized_error(error, std, mask[0])


def test_an_efficient_estimator_has_a_median_error_of_0674() -> None:
    generator = torch.Generator().manual_seed(0)
    std = torch.tensor([0.01, 0.02, 0.3]).expand(100, 100, 3)
    error = std * torch.randn(100, 100, 3, generator=generator)
    # Standard error of the median: 1 / (2 f sqrt(n)), f = 2 phi(0.674) = 0.636, n = 1e4: 0.008.
    assert median_normalized_error(error, std).tolist() == pytest.approx([0.6745] * 3, abs=0.032)


def test_gate_asks_for_all_three_bounds_and_counts_hits_among_them() -> None:
    degree = math.radians(1)
    std = torch.tensor(
        [
            [2.4 * degree, 2.4 * degree, 0.5],
            [2.6 * degree, 0.1 * degree, 0.1],
            [0.1 * degree, 2.6 * degree, 0.1],
            [0.1 * degree, 0.1 * degree, 0.51],
            [0.1 * degree, math.nan, 0.1],
        ]
    ).unsqueeze(0)
    assert crb_gated(std).tolist() == [[True, False, False, False, False]]
    assert crb_gated(std, Tolerance(3, 3, 1)).tolist() == [[True, True, True, True, False]]

    here = [(20.0 * k, 0.0, 3.0) for k in range(3)]
    position, present = truth(here, here[:1])
    matching = match(found([here[0], here[2]], [here[2]]), position, present)
    gated = torch.tensor([[True, True, False], [True, True, True]])
    # Gated and there: (0, 0) hit, (0, 1) missed, (1, 0) missed.
    assert gated_recall(matching, gated, present) == pytest.approx(1 / 3)
    assert math.isnan(gated_recall(matching, torch.zeros_like(gated), present))
    with pytest.raises(ValueError, match=r"gated is \(1, 3\)"):
        gated_recall(matching, gated[:1], present)


# Subspace


@many
@given(size=st.tuples(st.integers(1, 3), st.integers(1, 4)), seed=st.integers(0, 1000))
def test_subspace_error_matches_dense_eigenvectors(size: tuple[int, int], seed: int) -> None:
    B, K = size
    estimate = LowRankCovariance(complex_normal(B, 7, 5, seed=seed))
    steering = complex_normal(B, K, 7, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(B, K, generator=generator) < 0.7
    steering[~present] = complex("nan")
    error = subspace_error(estimate, steering, present)
    assert error.shape == (B,)
    for b, R in enumerate(estimate.dense()):
        sources = steering[b, present[b]].numpy().T
        expected = losses.subspace_align(R.numpy(), sources) if sources.size else 0.0
        # Energies are accurate to eps over the smallest relative eigenvalue, 1e-4 at the worst.
        assert float(error[b]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64])
def test_subspace_error_is_zero_of_the_truth_and_one_of_its_complement(
    dtype: torch.dtype, device: torch.device
) -> None:
    steering = complex_normal(2, 3, 8, dtype=dtype).to(device)
    present = torch.tensor([[True, True, True], [True, False, True]], device=device)
    own = LowRankCovariance((steering * present.unsqueeze(-1)).mT)
    error = subspace_error(own, steering, present)
    assert error.dtype == dtype.to_real()
    # eps over the relative eigenvalues of three random vectors in eight dimensions, about 0.1.
    assert error.tolist() == pytest.approx([0.0, 0.0], abs=100 * eps(dtype))
    q, _ = torch.linalg.qr(
        torch.cat([steering.mT, complex_normal(2, 8, 3, dtype=dtype).to(device)], -1)
    )
    other = subspace_error(LowRankCovariance(q[..., 3:]), steering, present)
    assert other.tolist() == pytest.approx([1.0, 1.0], abs=100 * eps(dtype))


def test_rounding_takes_no_subspace_error_out_of_zero_to_one() -> None:
    steering = complex_normal(200, 4, 8, dtype=torch.complex64)
    error = subspace_error(LowRankCovariance(steering.mT), steering, torch.ones(200, 4).bool())
    assert bool(((error >= 0) & (error <= 1)).all())


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64])
def test_coincident_sources_count_once_in_the_subspace(dtype: torch.dtype) -> None:
    e = torch.eye(5, dtype=dtype)
    # Sources along e0 (twice) and e1; eigenvalues 9, 4, 1 along e0, e2, e1. K = 2 of the distinct
    # sources: U_2 = (e0, e2) holds e0 and not e1: 1 - 1/2. U_3 would hold both.
    estimate = LowRankCovariance(torch.stack([3 * e[0], 2 * e[2], e[1]], -1).unsqueeze(0))
    steering = torch.stack([e[0], e[0], e[1]]).unsqueeze(0)
    error = subspace_error(estimate, steering, torch.ones(1, 3, dtype=torch.bool))
    assert float(error) == pytest.approx(0.5, abs=10 * eps(dtype))


def test_an_estimate_of_too_low_a_rank_misses_the_rest() -> None:
    e = torch.eye(4, dtype=torch.complex128)
    steering = torch.stack([e[0], e[1], e[2]]).expand(3, 3, 4)
    factor = torch.zeros(3, 4, 2, dtype=torch.complex128)
    factor[0, 0, 0] = factor[1, 0, 0] = factor[1, 1, 1] = 1.0
    present = torch.ones(3, 3, dtype=torch.bool)
    error = subspace_error(LowRankCovariance(factor), steering, present)
    assert error.tolist() == pytest.approx([2 / 3, 1 / 3, 1.0])


def test_subspace_error_without_sources_is_zero_and_misfits_are_refused() -> None:
    estimate = LowRankCovariance(complex_normal(2, 6, 2))
    steering = complex_normal(2, 3, 6)
    present = torch.ones(2, 3, dtype=torch.bool)
    assert subspace_error(estimate, steering, ~present).tolist() == [0.0, 0.0]
    assert subspace_error(estimate, steering[:, :0], present[:, :0]).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"steering is \(2, 3, 5\).*ask for \(2, 3, 6\)"):
        subspace_error(estimate, steering[..., :5], present)
    with pytest.raises(ValueError, match="steering is"):
        subspace_error(estimate, steering[:1], present[:1])
    with pytest.raises(ValueError, match="present is"):
        subspace_error(estimate, steering, present[:, :2])
    steering[1, 2, 4] = complex("nan")
    with pytest.raises(ValueError, match=r"steering holds .* index \(1, 2, 4\)"):
        subspace_error(estimate, steering, present)


# Coverage


def gaussian_hits(n: int, seed: int = 0) -> tuple[Detections, Tensor, Tensor]:
    """n scenes of two sources, found with errors drawn from their own covariance."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, 2, 3, 3, generator=generator, dtype=torch.float64)
    # Standard deviations about 0.2 deg, 0.2 deg and 5 cm: no error leaves the tolerance.
    root = torch.tensor([0.002, 0.002, 0.03], dtype=torch.float64).unsqueeze(-1) * mix
    noise = torch.randn(n, 2, 3, 1, generator=generator, dtype=torch.float64)
    position = torch.tensor([[0.0, 0.0, 3.0], [0.6, 0.1, 5.0]], dtype=torch.float64)
    position = position.expand(n, 2, 3).clone()
    place = position + (root @ noise).squeeze(-1)
    present = torch.ones(n, 2, dtype=torch.bool)
    return Detections(place.flip(1), present, (root @ root.mT).flip(1)), position, present


def test_errors_drawn_from_their_covariance_are_covered_at_the_nominal_level() -> None:
    detections, position, present = gaussian_hits(2000)
    matching = match(detections, position, present)
    assert matching.recall == 1.0
    levels = [0.05, 0.5, 0.9, 0.99]
    share = coverage(detections, matching, position, levels)
    for level, value in zip(levels, share.tolist(), strict=True):
        # Four standard errors of a share of 4000.
        assert value == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / 4000))
    assert coverage(detections, matching, position, [0.0, 1.0]).tolist() == [0.0, 1.0]
    doubled = replace(detections, covariance=4.0 * detections.covariance)
    wide = coverage(doubled, matching, position, torch.tensor(levels))
    assert bool((wide > share).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ellipsoid_ends_at_the_quantile_of_chi_square(dtype: torch.dtype) -> None:
    # The median of chi-square with 3 degrees of freedom is 2.366; errors of (1, 1, s) standard
    # deviations have 2 + s^2, so s = sqrt(0.366) = 0.605 is where the level 0.5 ends.
    position, present = truth([(0, 0, 3), (30, 0, 3)], [(0, 0, 3)], dtype=dtype)
    std = torch.tensor([0.01, 0.02, 0.1], dtype=dtype)
    place = position.clone()
    place[0, 0] += std * torch.tensor([1.0, -1.0, 0.595], dtype=dtype)
    place[0, 1] += std * torch.tensor([-1.0, 1.0, -0.615], dtype=dtype)
    place[1, 0, 0] += 1.0  # no hit
    detections = Detections(
        torch.nan_to_num(place), present, torch.diag(std.square()).expand(2, 2, 3, 3)
    )
    share = coverage(detections, match(detections, position, present), position, [0.5, 0.6])
    assert share.dtype == dtype
    assert share.tolist() == [0.5, 1.0]


def test_a_covariance_that_is_no_covariance_covers_nothing() -> None:
    detections, position, present = gaussian_hits(8)
    matching = match(detections, position, present)
    good = detections.covariance
    assert good is not None
    singular = good.clone()
    singular[..., 2, :] = singular[..., :, 2] = 0.0
    for bad in (
        torch.zeros_like(good),
        singular,
        -good,
        torch.full_like(good, math.nan),
        torch.ones_like(good),  # of rank one
        good * torch.tensor([1.0, 1.0, math.inf]).double(),
    ):
        share = coverage(replace(detections, covariance=bad), matching, position, [0.5, 1.0])
        assert share.tolist() == [0.0, 0.0]
    half = good.clone()
    half[::2] = 0.0
    one = coverage(replace(detections, covariance=half), matching, position, [1.0])
    assert one.tolist() == [0.5]


def test_coverage_needs_hits_covariances_and_levels() -> None:
    detections, position, present = gaussian_hits(3)
    matching = match(detections, position, present)
    none = match(found([], [], []), position, present)
    assert bool(coverage(detections, none, position, [0.5, 0.9]).isnan().all())
    with pytest.raises(ValueError, match="found has no covariance"):
        coverage(replace(detections, covariance=None), matching, position, [0.5])
    for levels in ([0.5, 1.1], [-0.1], [math.nan], torch.tensor(0.5)):
        with pytest.raises(ValueError, match=r"expected a sequence of numbers in \[0, 1\]"):
            coverage(detections, matching, position, levels)


def test_squared_distances_are_those_of_the_inverse_covariance_hit_by_hit() -> None:
    detections, position, present = gaussian_hits(6)
    # One scene is found one source short and another far off; the order of hits is the scenes'.
    here, place = present.clone(), detections.position.clone()
    here[1, 0] = False
    place[3] += 1.0
    detections = replace(detections, position=place, present=here)
    matching = match(detections, position, present)
    distance = squared_mahalanobis(detections, matching, position)
    assert detections.covariance is not None
    expected = []
    for b, k in matching.hit.nonzero().tolist():
        slot = int(matching.detection[b, k])
        error = (detections.position[b, slot] - position[b, k]).numpy()
        expected.append(error @ np.linalg.inv(detections.covariance[b, slot].numpy()) @ error)
    assert len(expected) == 9
    assert distance.dtype == torch.float64
    np.testing.assert_allclose(distance.numpy(), expected, rtol=1e-8)
    wide = replace(detections, covariance=4.0 * detections.covariance)
    torch.testing.assert_close(squared_mahalanobis(wide, matching, position), distance / 4)
    broken = replace(detections, covariance=-detections.covariance)
    assert bool(squared_mahalanobis(broken, matching, position).isinf().all())
    none = match(found([], []), position[:2], present[:2])
    assert squared_mahalanobis(detections[:2], none, position[:2]).shape == (0,)
    with pytest.raises(ValueError, match="found has no covariance"):
        squared_mahalanobis(replace(detections, covariance=None), matching, position)


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
