"""How far off the sources that were found are: errors, bounds, subspaces and ellipsoids."""

from __future__ import annotations

import math
from dataclasses import replace

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
    coverage,
    crb_gated,
    errors,
    gated_recall,
    match,
    median_normalized_error,
    normalized_errors,
    squared_mahalanobis,
    subspace_error,
)
from tests.physics.helpers import complex_normal, eps, found, three_scenes, truth
from tests.reference import losses

DTYPES = [torch.float64, torch.float32]


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


@settings(max_examples=100)
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
