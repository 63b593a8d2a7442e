from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from physics.fit import Measurement, normal_equations, position_of
from physics.order import (
    conditional_deviance,
    marginal_deviance,
    parameters_per_source,
    penalty,
    symbol_powers,
)
from tests.physics.test_fit import ARRAY, measured, scenes, steer
from tests.reference import estimation as reference


def test_penalties_are_those_of_the_criteria() -> None:
    assert penalty("aic", 256, 16) == 2.0
    assert penalty("bic", 256, 16) == pytest.approx(math.log(512))
    assert penalty("mdl", 256, 16) == pytest.approx(math.log(16))
    assert penalty("mdl", 16, 1) == pytest.approx(math.log(2))  # one snapshot is not free
    assert parameters_per_source("constant", "spherical") == 5  # coordinates, complex amplitude
    assert parameters_per_source("fluctuating", "paraxial") == 4  # coordinates, power
    assert parameters_per_source("constant", "planar") == 4  # no range
    with pytest.raises(ValueError, match="criterion 'hqc' unknown"):
        penalty("hqc", 256, 16)  # type: ignore[arg-type]


def test_conditional_deviance_is_the_gaussian_likelihood() -> None:
    m = measured(scenes("constant"), "constant")
    cost = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    known = conditional_deviance(m, cost, torch.full((4,), 0.5, dtype=torch.float64))
    assert torch.allclose(known, 4.0 * cost)
    unknown = conditional_deviance(m, cost, None)
    assert torch.allclose(unknown, 2 * 48 * torch.log(cost / 48))


@pytest.mark.parametrize("noise", [None, 0.0, 1e-30])
def test_data_without_noise_have_a_finite_deviance(noise: float | None) -> None:
    m = measured(scenes("constant"), "constant")
    power = None if noise is None else torch.full((4,), noise, dtype=torch.float64)
    assert torch.isfinite(conditional_deviance(m, torch.zeros(4, dtype=torch.float64), power)).all()


def dense_deviance(S: Any, b: int, powers: Any, sigma2: float) -> float:
    covariances = reference.stochastic_covariances(
        position_of(S.position[b]).numpy(),
        powers,
        sigma2,
        S.H[b].numpy(),
        S.codes[b].numpy(),
        steer(),
        constant=False,
    )
    return reference.stochastic_deviance(S.y[b].numpy(), covariances, constant=False)


def test_marginal_deviance_is_the_least_over_powers() -> None:
    """Against a dense likelihood minimised by scipy over the powers."""
    from scipy.optimize import minimize

    S = scenes("fluctuating", 3, snr_db=10.0)
    m = measured(S, "fluctuating")
    fit, _, _ = normal_equations(m, position_of(S.position))
    sigma2 = m.energy / m.n_rows / 11.0
    value = marginal_deviance(m, fit, sigma2)
    for b in range(len(S)):
        noise = float(sigma2[b])

        def dense(log_power: Any, b: int = b, noise: float = noise) -> float:
            return dense_deviance(S, b, np.exp(log_power), noise)

        start = np.log(fit.amplitude[b].abs().square().mean(0).numpy())
        best = minimize(dense, start, method="Nelder-Mead", options={"xatol": 1e-6}).fun
        constant = 2 * m.n_rows * math.log(noise)
        assert float(value[b]) + constant == pytest.approx(best, abs=0.05)


def test_marginal_deviance_fits_the_noise_where_it_is_not_known() -> None:
    from scipy.optimize import minimize

    S = scenes("fluctuating", 3, snr_db=10.0)
    m = measured(S, "fluctuating")
    fit, _, _ = normal_equations(m, position_of(S.position))
    value = marginal_deviance(m, fit, None)
    for b in range(len(S)):

        def dense(log: Any, b: int = b) -> float:
            return dense_deviance(S, b, np.exp(log[:-1]), float(np.exp(log[-1])))

        power = fit.amplitude[b].abs().square().mean(0).numpy()
        start = np.log([*power, float(fit.cost[b]) / m.n_rows])
        options = {"xatol": 1e-6, "maxiter": 2000}
        best = minimize(dense, start, method="Nelder-Mead", options=options).fun
        assert float(value[b]) + 2 * m.n_rows == pytest.approx(best, abs=0.1)


def test_marginal_deviance_without_sources_is_the_conditional_one() -> None:
    """A source of no power changes nothing: the two scales are the same."""
    S = scenes("fluctuating", 3)
    m = measured(S, "fluctuating")
    silent = Measurement.of(S.y, 0 * S.H, S.codes, ARRAY, "spherical", "fluctuating")
    fit, _, _ = normal_equations(silent, position_of(S.position))
    for noise in (m.energy / m.n_rows / 2.0, None):
        without = conditional_deviance(m, m.energy, noise)
        assert torch.allclose(marginal_deviance(silent, fit, noise), without)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_marginal_deviance_is_finite_without_noise(dtype: torch.dtype) -> None:
    S = scenes("fluctuating", 3, snr_db=200.0)
    m = Measurement.of(
        *(t.to(dtype) for t in (S.y, S.H, S.codes)), ARRAY, "spherical", "fluctuating"
    )
    fit, _, _ = normal_equations(m, position_of(S.position).to(dtype.to_real()))
    for noise in (torch.zeros(3, dtype=dtype.to_real()), None):
        assert torch.isfinite(marginal_deviance(m, fit, noise)).all()


def test_marginal_deviance_hardly_depends_on_where_the_powers_start() -> None:
    S = scenes("fluctuating", 3, snr_db=10.0)
    m = measured(S, "fluctuating")
    fit, _, _ = normal_equations(m, position_of(S.position))
    noise = m.energy / m.n_rows / 11.0
    value = marginal_deviance(m, fit, noise)
    for factor in (0.3, 3.0):
        started = replace(fit, amplitude=fit.amplitude * factor)
        # A tenth to ten times the power: what is left after the steps is small beside a penalty.
        assert torch.allclose(marginal_deviance(m, started, noise), value, atol=0.5)


def dense_log_likelihood(S: Any, b: int, powers: Any, sigma2: float, mode: str) -> float:
    covariances = reference.stochastic_covariances(
        position_of(S.position[b]).numpy(),
        powers,
        sigma2,
        S.H[b].numpy(),
        S.codes[b].numpy(),
        steer(),
        constant=mode == "constant",
    )
    y = S.y[b].numpy()
    return -0.5 * reference.stochastic_deviance(y, covariances, constant=mode == "constant")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("mode", ["constant", "fluctuating"])
def test_symbols_hold_the_likelihood_of_their_own_powers(mode: Any, known: bool) -> None:
    S = scenes(mode, 3, snr_db=10.0)
    m = measured(S, mode)
    fit, _, _ = normal_equations(m, position_of(S.position))
    told = m.energy / m.n_rows / 11.0
    symbols = symbol_powers(m, fit, told if known else None)
    if known:
        assert torch.equal(symbols.noise_power, told)
    for b in range(len(S)):
        sigma2 = float(symbols.noise_power[b])
        own = float(symbols.logdet[b] + symbols.unexplained[b] / sigma2)
        own += m.n_rows * math.log(sigma2)
        dense = -dense_log_likelihood(S, b, symbols.power[b].numpy(), sigma2, mode)
        assert own == pytest.approx(dense, rel=1e-9)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("mode", ["constant", "fluctuating"])
def test_no_powers_nearby_are_more_likely_than_those_of_symbols(mode: Any, known: bool) -> None:
    S = scenes(mode, 3, snr_db=10.0)
    m = measured(S, mode)
    fit, _, _ = normal_equations(m, position_of(S.position))
    symbols = symbol_powers(m, fit, m.energy / m.n_rows / 11.0 if known else None)
    for b in range(len(S)):
        best = [*symbols.power[b].tolist(), float(symbols.noise_power[b])]
        value = dense_log_likelihood(S, b, np.array(best[:-1]), best[-1], mode)
        for i in range(2 if known else 3):
            for factor in (0.8, 1.25):
                other = np.array(best)
                other[i] *= factor
                worse = dense_log_likelihood(S, b, other[:-1], other[-1], mode)
                # Expectation maximisation stops a little short of the top.
                assert worse < value + 1e-3, (b, i, factor)


def test_symbols_find_the_noise_and_follow_the_scale_of_the_measurement() -> None:
    S = scenes("fluctuating", 40, snr_db=10.0)
    m = measured(S, "fluctuating")
    fit, _, _ = normal_equations(m, position_of(S.position))
    symbols = symbol_powers(m, fit, None)
    ratio = symbols.noise_power / (m.energy / m.n_rows / 11.0)
    # 1,920 observations, less 10 a scene that were fitted.
    assert float(ratio.mean()) == pytest.approx(1.0, abs=0.1)
    # Fitted amplitudes hold noise; powers do not.
    assert float(symbols.power.sum()) < float(fit.amplitude.abs().square().mean(1).sum())
    larger = Measurement.of(3 * S.y, S.H, S.codes, ARRAY, "spherical", "fluctuating")
    fit, _, _ = normal_equations(larger, position_of(S.position))
    scaled = symbol_powers(larger, fit, None)
    torch.testing.assert_close(scaled.power, 9 * symbols.power)
    torch.testing.assert_close(scaled.noise_power, 9 * symbols.noise_power)
    torch.testing.assert_close(scaled.logdet, symbols.logdet)
    torch.testing.assert_close(scaled.unexplained, 9 * symbols.unexplained)


@pytest.mark.parametrize("noise", [None, 0.0])
@pytest.mark.parametrize("mode", ["constant", "fluctuating"])
def test_symbols_of_zero_measurements_are_finite_and_have_no_power(
    mode: Any, noise: float | None
) -> None:
    S = scenes(mode, 2)
    m = Measurement.of(0 * S.y, S.H, S.codes, ARRAY, "spherical", mode)
    fit, _, _ = normal_equations(m, position_of(S.position))
    told = None if noise is None else torch.full((2,), noise, dtype=torch.float64)
    symbols = symbol_powers(m, fit, told)
    assert not symbols.power.any()
    assert (symbols.noise_power > 0).all()
    assert not symbols.logdet.any()
    assert not symbols.unexplained.any()
