from __future__ import annotations

import math

import pytest
import torch

from physics import PlanarArray, rician_channel, steering_vector

ARRAY = PlanarArray(4, 3)


def channel(
    k_factor_db: float, count: int = 4000, dtype: torch.dtype = torch.complex64
) -> torch.Tensor:
    station = torch.tensor([0.4, 0.1, 30.0], dtype=dtype.to_real()).expand(count, 3)
    return rician_channel(
        5,
        ARRAY,
        k_factor_db=k_factor_db,
        base_station=station,
        batch=(count,),
        generator=torch.Generator().manual_seed(0),
        dtype=dtype,
    )


@pytest.mark.parametrize("k_factor_db", [-20.0, 3.0, 20.0])
def test_entries_have_unit_mean_power(k_factor_db: float) -> None:
    power = channel(k_factor_db).abs().square().mean(0)
    # |h|^2 has a standard deviation of at most 1: five of its mean over 4000 draws.
    assert (power - 1).abs().max() < 5 / math.sqrt(4000)


@pytest.mark.parametrize("k_factor_db", [0.0, 3.0, 10.0])
def test_fourth_moment_follows_the_rice_factor(k_factor_db: float) -> None:
    kappa = 10 ** (k_factor_db / 10)
    fourth = float(channel(k_factor_db).abs().pow(4).mean())
    # E|h|^4 = (kappa^2 + 4 kappa + 2) / (kappa + 1)^2 for a line of sight of fixed modulus.
    assert fourth == pytest.approx((kappa**2 + 4 * kappa + 2) / (kappa + 1) ** 2, rel=0.03)


def test_line_of_sight_is_rank_one_along_the_surfaces_steering_vector() -> None:
    H = channel(150.0, count=10, dtype=torch.complex128)
    a = steering_vector(torch.tensor([0.4, 0.1, 30.0], dtype=torch.float64), ARRAY)
    assert torch.allclose(H.abs(), torch.ones(10, 5, 12, dtype=torch.float64), atol=1e-6)
    along = (H @ a.conj()).unsqueeze(-1) * a
    assert (H - along).abs().max() < 1e-6
    steps = (H[:, 1:] * H[:, :-1].conj())[..., 0].angle()
    assert (torch.exp(1j * (steps - steps[:, :1])) - 1).abs().max() < 1e-6


def test_phase_and_scattering_average_to_zero() -> None:
    for k_factor_db in (-40.0, 20.0):
        assert channel(k_factor_db).mean(0).abs().max() < 5 / math.sqrt(4000)


def test_one_channel_needs_no_batch() -> None:
    H = rician_channel(3, ARRAY, base_station=torch.tensor([0.0, 0.0, 20.0]))
    assert H.shape == (3, 12)
