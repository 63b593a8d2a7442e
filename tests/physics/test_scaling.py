from __future__ import annotations

import math

import pytest
import torch

from physics.scaling import column_energy, divide, divisor, energy, multiply, peak, power
from tests.physics.helpers import complex_normal


def test_power_energy_and_scaling_are_what_complex_arithmetic_gives() -> None:
    for value in (complex_normal(2, 3, 4), complex_normal(2, 4, 3).mH):
        real = torch.tensor([2.0, 0.5], dtype=torch.float64)[:, None, None]
        assert torch.allclose(power(value), value.abs().square())
        assert torch.allclose(energy(value), value.abs().square().sum((-2, -1)))
        assert torch.allclose(column_energy(value), value.abs().square().sum(-2))
        assert torch.allclose(divide(value, real), value / real)
        assert torch.allclose(multiply(value, real), value * real)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_peak_lies_within_the_root_of_two_of_the_largest_modulus(scale: float) -> None:
    value = complex_normal(3, 4, 5, dtype=torch.complex64) * scale
    for dims, axes in ((1, (-1,)), (2, (-2, -1))):
        largest = value.abs().amax(axes)
        assert (peak(value, dims) <= largest).all()
        assert (peak(value, dims) * math.sqrt(2) >= largest * (1 - 1e-6)).all()
    assert not peak(value.requires_grad_()).requires_grad


def test_a_divisor_is_never_zero_subnormal_or_infinite() -> None:
    tiny = torch.finfo(torch.float32).tiny
    scale = torch.tensor([0.0, 1e-42, 1e-30, 3.0, math.inf, math.nan])
    expected = torch.tensor([1.0, tiny, 1e-30, 3.0, 1.0, 1.0])
    assert torch.equal(divisor(scale), expected)


def test_gradients_match_finite_differences() -> None:
    value = complex_normal(2, 3).requires_grad_()
    real = torch.tensor([[0.5], [2.0]], dtype=torch.float64, requires_grad=True)
    for operation in (divide, multiply):
        assert torch.autograd.gradcheck(operation, (value, real))
    assert torch.autograd.gradcheck(lambda v: multiply(v, real.detach()), (value,))
    for norm in (energy, column_energy, power):
        assert torch.autograd.gradcheck(norm, (value,))
