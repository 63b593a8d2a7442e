from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch

from physics import PlanarArray, SceneConfig, Scenes, simulate, steering_vector
from physics.fit import Measurement, loaded_cholesky, normal_equations, position_of, refine
from tests.physics.helpers import complex_normal
from tests.reference import estimation as reference

ARRAY = PlanarArray(6, 5)
MODES: list[Any] = ["constant", "fluctuating"]
BOUNDS = torch.tensor([[-1.2, -0.7, 0.05], [1.2, 0.7, 2.5]], dtype=torch.float64)


def scenes(
    mode: Any, n: int = 4, *, snr_db: float = 15.0, n_sources: int = 2, wavefront: Any = "spherical"
) -> Scenes:
    config = SceneConfig(
        source_mode=mode,
        wavefront=wavefront,
        n_antennas=8,
        n_snapshots=6,
        min_sources=n_sources,
        max_sources=n_sources,
        snr_db=(snr_db, snr_db),
        range_m=(0.6, 3.0),
    )
    generator = torch.Generator().manual_seed(1)
    return simulate(n, config, ARRAY, generator=generator, dtype=torch.complex128)


def measured(S: Scenes, mode: Any, wavefront: Any = "spherical") -> Measurement:
    return Measurement.of(S.y, S.H, S.codes, ARRAY, wavefront, mode)


def steer(wavefront: Any = "spherical") -> reference.Steer:
    def function(point: reference.Real) -> reference.Complex:
        position = position_of(torch.from_numpy(point))
        return np.asarray(steering_vector(position, ARRAY, wavefront).numpy())

    return function


def cost_of(
    S: Scenes, item: int, steer: reference.Steer, flat: reference.Real, *, constant: bool
) -> float:
    y, H, codes = (t[item].numpy() for t in (S.y, S.H, S.codes))
    return reference.residual_energy(flat.reshape(-1, 3), y, H, codes, steer, constant=constant)


@pytest.mark.parametrize("wavefront", ["spherical", "fresnel", "paraxial", "planar"])
@pytest.mark.parametrize("mode", MODES)
def test_cost_and_gradient_match_dense_least_squares(mode: Any, wavefront: Any) -> None:
    S = scenes(mode, wavefront=wavefront)
    coordinates = position_of(S.position) + 0.02
    fit, matrix, gradient = normal_equations(measured(S, mode, wavefront), coordinates)
    for b in range(len(S)):
        cost = functools.partial(cost_of, S, b, steer(wavefront), constant=mode == "constant")
        start = coordinates[b].numpy().ravel()
        assert float(fit.cost[b]) == pytest.approx(cost(start), rel=1e-9)
        for i in range(start.size):
            shift = np.zeros_like(start)
            shift[i] = 1e-5
            slope = (cost(start + shift) - cost(start - shift)) / 2e-5
            # The gradient is that of -cost / 2; Kaufman's matrix does not enter it.
            scale = float(matrix[b].diagonal().sqrt().max() * fit.cost[b].sqrt())
            assert float(gradient[b, i]) == pytest.approx(-slope / 2, abs=1e-6 * scale)
    assert torch.allclose(matrix, matrix.mT)
    assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-9 * float(matrix.abs().max())


@pytest.mark.parametrize("mode", MODES)
def test_matrix_is_that_of_the_projected_jacobian(mode: Any) -> None:
    S = scenes(mode)
    coordinates = position_of(S.position)
    fit, matrix, _ = normal_equations(measured(S, mode), coordinates)
    for b in range(len(S)):
        F = reference.deterministic_information(
            coordinates[b].numpy(),
            fit.amplitude[b].numpy(),
            2.0,  # noise power: F = Re(J^H J)
            S.H[b].numpy(),
            S.codes[b].numpy(),
            steer(),
            constant=mode == "constant",
        )
        n = coordinates[b].numel()
        eliminated = F[:n, :n] - F[:n, n:] @ np.linalg.solve(F[n:, n:], F[n:, :n])
        assert torch.allclose(matrix[b], torch.from_numpy(eliminated), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_refinement_without_noise_reaches_the_truth(mode: Any) -> None:
    S = scenes(mode, 16, snr_db=200.0)
    truth = position_of(S.position)
    start = truth + 0.01 * torch.randn(
        truth.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    fit, _ = refine(measured(S, mode), start, BOUNDS, 60)
    assert float((fit.coordinates - truth).abs().max()) < 1e-6
    assert float((fit.cost / measured(S, mode).energy).max()) < 1e-12
    assert torch.allclose(fit.position, S.position, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_refinement_ends_where_no_small_step_helps(mode: Any) -> None:
    S = scenes(mode, 8, snr_db=5.0)
    m = measured(S, mode)
    fit, _ = refine(m, position_of(S.position), BOUNDS, 100)
    generator = torch.Generator().manual_seed(3)
    for scale in (1e-2, 1e-3):
        for _ in range(10):
            step = torch.randn(fit.coordinates.shape, generator=generator, dtype=torch.float64)
            moved = (fit.coordinates + scale * step).clamp(BOUNDS[0], BOUNDS[1])
            worse, _, _ = normal_equations(m, moved)
            assert (worse.cost >= fit.cost * (1 - 1e-6)).all()


def test_every_accepted_step_lowers_the_cost_and_stays_within_the_bounds() -> None:
    S = scenes("fluctuating", 12, snr_db=0.0, n_sources=3)
    m, start = measured(S, "fluctuating"), position_of(S.position) * 0.7
    before = normal_equations(m, start.clamp(BOUNDS[0], BOUNDS[1]))[0].cost
    for n_iterations in (0, 1, 3, 10):
        fit, _ = refine(m, start, BOUNDS, n_iterations)
        assert (fit.cost <= before).all()
        assert (fit.coordinates >= BOUNDS[0]).all()
        assert (fit.coordinates <= BOUNDS[1]).all()
        before = fit.cost


def test_a_source_beyond_the_bounds_is_held_at_the_border_and_the_others_are_not() -> None:
    S = scenes("constant", 4, snr_db=60.0)
    truth = position_of(S.position)
    narrow = BOUNDS.clone()
    narrow[1, 0] = float(truth[0, 0, 0]) - 0.05  # cuts off the first source of the first scene
    narrow[0, 0] = -3.0
    fit, _ = refine(measured(S, "constant")[:1], truth[:1], narrow, 100)
    assert float(fit.coordinates[0, 0, 0]) == pytest.approx(float(narrow[1, 0]))
    assert torch.isfinite(fit.coordinates).all()
    assert float(fit.cost) < float(measured(S, "constant")[:1].energy)


@pytest.mark.parametrize("mode", MODES)
def test_absent_sources_have_no_part_in_the_fit(mode: Any) -> None:
    S = scenes(mode)
    m, truth = measured(S, mode), position_of(S.position)
    extra = torch.cat([truth, truth[:, :1] * 0.5 + 0.1], dim=1)
    present = torch.tensor([True, True, False]).expand(len(S), 3)
    with_absent, _ = refine(m, extra, BOUNDS, 20, present)
    alone, _ = refine(m, truth, BOUNDS, 20)
    assert torch.allclose(with_absent.cost, alone.cost, rtol=1e-9)
    assert torch.allclose(with_absent.coordinates[:, :2], alone.coordinates, atol=1e-6)
    assert torch.equal(with_absent.coordinates[:, 2], extra[:, 2].clamp(BOUNDS[0], BOUNDS[1]))
    assert (with_absent.amplitude[..., 2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("mode", MODES)
def test_coincident_sources_share_their_amplitude(mode: Any, dtype: torch.dtype) -> None:
    S = scenes(mode, n_sources=1)
    m = Measurement.of(*(t.to(dtype) for t in (S.y, S.H, S.codes)), ARRAY, "spherical", mode)
    one = position_of(S.position).to(dtype.to_real())
    alone, _, _ = normal_equations(m, one)
    twice, matrix, gradient = normal_equations(m, one.expand(-1, 2, -1))
    assert torch.allclose(twice.cost, alone.cost, rtol=1e-3)
    assert torch.allclose(twice.amplitude.sum(-1), alone.amplitude[..., 0], rtol=1e-2, atol=1e-3)
    assert torch.isfinite(matrix).all()
    assert torch.isfinite(gradient).all()
    fit, _ = refine(m, one.expand(-1, 2, -1), BOUNDS.to(one), 5)
    assert torch.isfinite(fit.coordinates).all()


def test_zero_measurements_stay_where_they_start() -> None:
    S = scenes("constant")
    m = Measurement.of(0 * S.y, S.H, S.codes, ARRAY, "spherical", "constant")
    fit, _ = refine(m, position_of(S.position), BOUNDS, 5)
    assert torch.equal(fit.coordinates, position_of(S.position).clamp(BOUNDS[0], BOUNDS[1]))
    assert (fit.cost == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_back_projection_is_the_adjoint_of_the_rows(mode: Any) -> None:
    S = scenes(mode)
    m = measured(S, mode)
    v, r = complex_normal(len(S), 3, ARRAY.size), complex_normal(*m.y.shape, seed=2)
    left = (m.rows(v).conj() * r.unsqueeze(-2)).sum(-1)  # (B, G, P)
    right = m.back_projected(r) @ v.mH  # (B, G, P)
    assert torch.allclose(left, right)


def test_loaded_cholesky_reproduces_its_matrix_and_serves_singular_ones() -> None:
    a = complex_normal(4, 5, 3)
    gram = a.mH @ a
    factor = loaded_cholesky(gram)
    assert torch.allclose(factor @ factor.mH, gram, rtol=1e-12)
    singular = torch.zeros(2, 3, 3, dtype=torch.complex64)
    singular[0, 0, 0] = 1.0
    assert torch.isfinite(torch.view_as_real(loaded_cholesky(singular))).all()


def test_coordinates_and_positions_are_each_others_inverse() -> None:
    position = torch.tensor([[0.1, 0.2, 4.0], [0.0, 0.0, math.inf]])
    assert torch.equal(position_of(position)[:, 2], torch.tensor([0.25, 0.0]))
    assert torch.equal(position_of(position_of(position)), position)


@pytest.mark.parametrize("mode", MODES)
def test_a_dozen_steps_from_a_grid_point_away_are_enough(mode: Any) -> None:
    S = scenes(mode, 16, snr_db=30.0, n_sources=1)
    m, truth = measured(S, mode), position_of(S.position)
    start = truth + torch.tensor([0.05, 0.05, 0.1])
    few, many = (refine(m, start, BOUNDS, n)[0].cost for n in (12, 200))
    assert torch.allclose(few, many, rtol=1e-3)
