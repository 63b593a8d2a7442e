from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from physics import (
    BlendConfig,
    LowRankCovariance,
    PlanarArray,
    blend,
    nmse,
    sample_covariance,
    simulate,
)
from tests.physics.helpers import assert_equals, complex_normal, covariance, dense
from tests.reference import covariance as reference

shapes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 8))
laws = settings(max_examples=30)


@laws
@given(shape=shapes, beta=st.floats(0, 1), seed=st.integers(0, 1000))
def test_lesson_2_blend_is_the_weighted_sum_of_the_normalised_matrices(
    shape: tuple[int, int, int], beta: float, seed: int
) -> None:
    B, N, r = shape
    predicted = covariance(*shape, loading=0.3, seed=seed)
    measured = covariance(B, N, 2, seed=seed + 1)
    blended = blend(predicted, measured, beta)
    expected = [
        reference.blend(p, m, beta) for p, m in zip(dense(predicted), dense(measured), strict=True)
    ]
    assert_equals(blended, expected, 1e-12)
    assert torch.allclose(blended.trace(), torch.full((B,), float(N), dtype=torch.float64))
    assert blended.rank == r + 2


def test_blend_admits_zero_one_and_a_weight_for_each_item() -> None:
    P, S = covariance(), covariance(r=2, seed=1)
    assert torch.allclose(blend(P, S, 0.0).dense(), P.normalized().dense())
    assert torch.allclose(blend(P, S, 1.0).dense(), S.normalized().dense())
    weights = torch.tensor([0.0, 0.4, 1.0])
    blended = blend(P, S, weights).dense()
    for b, beta in enumerate(weights.tolist()):
        alone = blend(LowRankCovariance(P.factor[b]), LowRankCovariance(S.factor[b]), beta)
        assert torch.allclose(blended[b], alone.dense(), atol=1e-6)


def test_blend_broadcasts_leading_dimensions() -> None:
    P, S = covariance(), LowRankCovariance(complex_normal(7, 2))
    assert torch.allclose(blend(P, S, 0.3).dense()[1], blend(
        LowRankCovariance(P.factor[1]), S, 0.3
    ).dense())  # fmt: skip
    assert blend(S, S, torch.tensor([0.1, 0.2])).dense().shape == (2, 7, 7)


@pytest.mark.parametrize("beta", [-0.1, 1.1, math.nan, torch.tensor([0.1, 0.2, 1.3])])
def test_weights_outside_zero_to_one_are_refused(beta: Any) -> None:
    with pytest.raises(ValueError, match="beta"):
        blend(covariance(), covariance(), beta)


def test_lesson_8_the_blend_is_jittered_by_default_about_three_tenths() -> None:
    assert BlendConfig() == BlendConfig(beta=0.30, jitter=0.05, shrinkage=0.0)
    assert BlendConfig(beta=0.0).beta == 0.0


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_trap_the_blend_puts_a_floor_of_beta_squared_under_a_perfect_prediction(
    beta: float,
) -> None:
    """With R_pred = R_true the blend misses by beta (R_samp - R_true): beta^2 NMSE(R_samp)."""
    array = PlanarArray()
    scenes = simulate(64, array=array, generator=torch.Generator().manual_seed(0))
    truth = scenes.covariance(array, "spherical")
    measured = sample_covariance(scenes.y, scenes.H, scenes.codes)
    floor = nmse(blend(truth, measured, beta), truth)
    # eps of the energies, which the factored difference cancels.
    assert torch.allclose(floor, beta**2 * nmse(measured, truth), atol=1e-5)
    if beta == 0.3:
        assert 0.05 < float(floor.mean()) < 0.15
