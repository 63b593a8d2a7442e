from __future__ import annotations

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from physics import TikhonovConfig, sample_covariance, simulate, tikhonov_solve
from physics.tikhonov import solve_unchecked
from tests.physics.helpers import LargestTensor, complex_normal, eps, relative_error, unit_codes
from tests.reference import tikhonov as reference

SOLVERS = ["auto", "dual", "lstsq", "gram", "svd"]


def problem(
    B: int = 3,
    L: int = 4,
    M: int = 5,
    N: int = 9,
    *,
    unit: bool = True,
    dtype: torch.dtype = torch.complex128,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    codes = unit_codes(B, L, N, seed=seed) if unit else complex_normal(B, L, N, seed=seed + 3)
    y, H = complex_normal(B, L, M, seed=seed + 1), complex_normal(B, M, N, seed=seed + 2)
    return y.to(dtype), H.to(dtype), codes.to(dtype)


def oracle(y: Tensor, H: Tensor, codes: Tensor, regularization: float) -> Tensor:
    arrays = (t.cpu().to(torch.complex128).numpy() for t in (y, H, codes))
    return torch.from_numpy(reference.solve_batch(*arrays, regularization))


@pytest.mark.parametrize("unit", [True, False], ids=["unit-modulus", "general"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("regularization", [1e-1, 1e-3])
def test_every_solver_gives_the_ridge_solution(
    solver: str, unit: bool, regularization: float, device: torch.device
) -> None:
    for dtype in (torch.complex128, torch.complex64):
        y, H, codes = problem(unit=unit, dtype=dtype)
        a, report = tikhonov_solve(
            y.to(device),
            H.to(device),
            codes.to(device),
            regularization,
            solver,  # type: ignore[arg-type]
        )
        # The normal equations have condition number ~ N / lambda times a spread of about 10.
        assert relative_error(a, oracle(y, H, codes, regularization)) < (
            eps(dtype) * 100 * 9 / regularization
        )
        assert a.dtype == dtype
        assert report.solver == ("dual" if solver == "auto" else solver)
        assert report.unit_modulus == unit
        assert report.n_fallbacks == 0
        assert report.fell_back.shape == (3,)


@pytest.mark.parametrize("unit", [True, False], ids=["unit-modulus", "general"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("sizes", [(5, 9), (9, 5), (6, 6)], ids=["wide", "tall", "square"])
def test_lambda_of_zero_gives_the_pseudo_inverse(
    solver: str, unit: bool, sizes: tuple[int, int]
) -> None:
    y, H, codes = problem(M=sizes[0], N=sizes[1], unit=unit)
    a, _ = tikhonov_solve(y, H, codes, 0.0, solver)  # type: ignore[arg-type]
    # Square random matrices of order 6 stay below a condition number of 1e4, squared by the dual.
    assert relative_error(a, oracle(y, H, codes, 0.0)) < eps(y.dtype) * 1e8


@settings(max_examples=25)
@given(
    B=st.integers(1, 3),
    L=st.integers(1, 4),
    M=st.integers(1, 5),
    N=st.integers(1, 8),
    unit=st.booleans(),
    log_regularization=st.floats(-4, 1),
    solver=st.sampled_from(SOLVERS),
    seed=st.integers(0, 10**6),
)
def test_every_size_down_to_one_is_solved(
    B: int, L: int, M: int, N: int, unit: bool, log_regularization: float, solver: str, seed: int
) -> None:
    regularization = 10**log_regularization
    y, H, codes = problem(B, L, M, N, unit=unit, seed=seed)
    a, report = tikhonov_solve(y, H, codes, regularization, solver)  # type: ignore[arg-type]
    tolerance = eps(y.dtype) * 1e3 * (1 + N / regularization)
    assert relative_error(a, oracle(y, H, codes, regularization)) < tolerance
    assert report.n_fallbacks == 0


def test_the_solution_is_the_minimum_of_the_cost_that_is_documented() -> None:
    y, H, codes = problem(B=1, L=2, unit=False)
    a, _ = tikhonov_solve(y, H, codes, 0.2)
    for snapshot in range(2):
        phi = H[0] * codes[0, snapshot]
        alpha = 0.2 * float(phi.abs().square().sum()) / 9
        gradient = phi.mH @ (phi @ a[0, snapshot] - y[0, snapshot]) + alpha * a[0, snapshot]
        assert float(gradient.abs().max()) < 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
def test_leading_dimensions_broadcast(solver: str) -> None:
    y, H, codes = problem(B=6)
    y = y.reshape(2, 3, 4, 5)
    a, report = tikhonov_solve(y, H[:3], codes[0], solver=solver)  # type: ignore[arg-type]
    assert a.shape == (2, 3, 4, 9)
    assert report.fell_back.shape == (2, 3)
    for i, j in itertools.product(range(2), range(3)):
        alone, alone_report = tikhonov_solve(y[i, j], H[j], codes[0], solver=solver)  # type: ignore[arg-type]
        assert alone.shape == (4, 9)
        assert alone_report.fell_back.shape == ()
        assert relative_error(a[i, j], alone) < 1e-12


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("unit", [True, False])
def test_an_empty_batch_stays_empty(solver: str, unit: bool) -> None:
    y, H, codes = (t[:0] for t in problem(unit=unit))
    a, report = tikhonov_solve(y, H, codes, solver=solver)  # type: ignore[arg-type]
    assert a.shape == (0, 4, 9)
    assert report.n_fallbacks == 0
    a, report = tikhonov_solve(y.reshape(2, 0, 4, 5), H, codes, solver=solver)  # type: ignore[arg-type]
    assert a.shape == (2, 0, 4, 9)
    assert report.fell_back.shape == (2, 0)


@pytest.mark.parametrize("regularization", [0.0, 1e-3])
@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_channel_zero_code_and_zero_snapshots_give_zeros(
    solver: str, regularization: float
) -> None:
    y, H, codes = problem(unit=False, dtype=torch.complex64)
    H, codes, y = H.clone(), codes.clone(), y.clone()
    H[0], codes[1, 2], y[2, 1] = 0, 0, 0
    a, _ = tikhonov_solve(y, H, codes, regularization, solver)  # type: ignore[arg-type]
    assert torch.isfinite(a).all()
    assert not a[0].any()
    assert not a[1, 2].any()
    assert not a[2, 1].any()
    expected = oracle(y[1:], H[1:], codes[1:], regularization)
    assert relative_error(a[1:], expected) < eps(y.dtype) * 1e6
    for unit in (True, False):
        y, H, codes = problem(unit=unit, dtype=torch.complex64)
        for zeroed in ((y, 0 * H, codes), (0 * y, H, codes), (0 * y, 0 * H, codes)):
            a, report = tikhonov_solve(*zeroed, regularization, solver)  # type: ignore[arg-type]
            assert not a.any()
            assert solver in ("lstsq", "gram") or report.n_fallbacks == 0


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("solver", SOLVERS)
def test_scaling_changes_nothing_but_scale(solver: str, unit: bool) -> None:
    y, H, codes = problem(unit=unit, dtype=torch.complex64)
    a, _ = tikhonov_solve(y, H, codes, solver=solver)  # type: ignore[arg-type]
    # Rounding of the scaled inputs, seen through a condition number of about N / lambda.
    tolerance = eps(y.dtype) * 100 * 9 / 1e-3
    for y_scale, H_scale in itertools.product((1e-15, 1.0, 1e15), repeat=2):
        scaled, report = tikhonov_solve(y * y_scale, H * H_scale, codes, solver=solver)  # type: ignore[arg-type]
        assert relative_error(scaled.to(torch.complex128) * (H_scale / y_scale), a) < tolerance
        assert report.n_fallbacks == 0
        R = sample_covariance(y * y_scale, H * H_scale, codes, solver=solver)  # type: ignore[arg-type]
        assert relative_error(R.dense(), sample_covariance(y, H, codes).dense()) < 2 * tolerance


def test_general_codes_of_any_size_change_nothing_but_scale() -> None:
    y, H, codes = problem(unit=False, dtype=torch.complex64)
    a, _ = tikhonov_solve(y, H, codes)
    for scale in (1e-25, 1e-15, 1e15, 1e25):
        scaled, report = tikhonov_solve(y, H, codes * scale)
        assert relative_error(scaled.to(torch.complex128) * scale, a) < 1e-4
        assert report.n_fallbacks == 0


@pytest.mark.parametrize(
    "scales", [(1e20, 1e-30, 1e30), (1e-20, 1e30, 1e-30), (1e-20, 1e-25, 1e-15)]
)
def test_scales_that_cancel_take_no_general_code_out_of_range(
    scales: tuple[float, float, float],
) -> None:
    y, H, codes = problem(unit=False, dtype=torch.complex64)
    a, _ = tikhonov_solve(y, H, codes)
    scaled, report = tikhonov_solve(y * scales[0], H * scales[1], codes * scales[2])
    back = scales[1] * scales[2] / scales[0]
    assert relative_error(scaled.to(torch.complex128) * back, a) < 1e-4
    assert report.n_fallbacks == 0


@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e38])
def test_subnormal_and_largest_numbers_stay_finite(scale: float) -> None:
    y, H, codes = problem(dtype=torch.complex64)
    for scaled in ((y * scale, H, codes), (y, H * scale, codes), (y * scale, H * scale, codes)):
        R = sample_covariance(*scaled)
        if bool(torch.isfinite(torch.view_as_real(scaled[0] / scaled[1].abs().max())).all()):
            assert torch.isfinite(R.dense()).all()


def rank_one(
    B: int, unit: bool, N: int = 144, M: int = 16
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """A rank-one channel in complex64, and the solution (lambda -> 0) of the exact one."""
    left, right = complex_normal(B, M, 1, seed=5), complex_normal(B, 1, N, seed=6)
    codes = unit_codes(B, 3, N) if unit else complex_normal(B, 3, N)
    H, y = left @ right, complex_normal(B, 3, M, seed=7)
    phi = H.unsqueeze(1) * codes.unsqueeze(2)
    exact = torch.linalg.pinv(phi, rtol=1e-8) @ y.unsqueeze(-1)
    problem64 = tuple(t.to(torch.complex64) for t in (y, H, codes))
    return problem64, exact.squeeze(-1)  # type: ignore[return-value]


@pytest.mark.parametrize("unit", [True, False], ids=["unit-modulus", "general"])
@pytest.mark.parametrize("solver", ["auto", "gram", "svd"])
@pytest.mark.parametrize("regularization", [0.0, 1e-12, 1e-7])
def test_lesson_9_a_rank_one_channel_with_little_loading_falls_to_svd(
    solver: str, unit: bool, regularization: float
) -> None:
    (y, H, codes), exact = rank_one(2, unit)
    a, report = tikhonov_solve(y, H, codes, regularization, solver)  # type: ignore[arg-type]
    # Rounding of H (eps) moves its singular vectors by as much.
    assert relative_error(a, exact) < eps(y.dtype) * 1e3
    assert report.n_fallbacks == (0 if solver == "svd" else 2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_rank_one_channel_with_the_usual_loading_is_solved_in_float32(solver: str) -> None:
    (y, H, codes), _ = rank_one(1, unit=True)
    a, _ = tikhonov_solve(y, H, codes, 1e-3, solver)  # type: ignore[arg-type]
    exact = oracle(y, H, codes, 1e-3)
    # kappa^2 = N / lambda = 1.4e5 amplifies rounding of the residual, 4 times the signal here;
    # the SVD keeps the two apart.
    amplified = 1 if solver == "svd" else 10
    assert relative_error(a, exact) < eps(y.dtype) * 144 / 1e-3 * amplified


def test_lesson_9_only_the_scenes_that_failed_are_solved_again() -> None:
    for unit in (True, False):
        y, H, codes = problem(B=5, M=16, N=144, unit=unit, dtype=torch.complex64)
        ill = H.clone()
        ill[2] = (H[2, :, :1] @ H[2, :1, :]).expand(16, 144)
        healthy, _ = tikhonov_solve(y, H, codes, 1e-8)
        a, report = tikhonov_solve(y, ill, codes, 1e-8)
        assert report.fell_back.tolist() == [False, False, True, False, False]
        assert report.n_fallbacks == 1
        others = torch.tensor([0, 1, 3, 4])
        assert torch.equal(a[others], healthy[others])
        again, _ = tikhonov_solve(y[2], ill[2], codes[2], 1e-8, "svd")
        assert relative_error(a[2], again.to(torch.complex128)) < 1e-5


def test_lesson_9_a_forced_failure_of_the_factorisation_is_counted_per_scene(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    genuine = torch.linalg.cholesky_ex

    def failing(matrix: Tensor) -> tuple[Tensor, Tensor]:
        factor, info = genuine(matrix)
        info = info.clone()
        info.reshape(info.shape[0], -1)[1, 0] = 3
        factor = factor.clone()
        factor[1] = math.nan
        return factor, info

    for unit in (True, False):
        y, H, codes = problem(B=4, unit=unit)
        expected = oracle(y, H, codes, 1e-3)
        monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
        a, report = tikhonov_solve(y, H, codes)
        monkeypatch.setattr(torch.linalg, "cholesky_ex", genuine)
        assert report.fell_back.tolist() == [False, True, False, False]
        assert relative_error(a, expected) < 1e-10


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_lesson_9_the_unchecked_form_never_raises_and_contains_the_damage(
    solver: str, bad: float
) -> None:
    for unit, target in itertools.product((True, False), range(3)):
        scenes = list(problem(B=3, unit=unit, dtype=torch.complex64))
        expected = oracle(*scenes, 1e-3)
        scenes[target] = scenes[target].clone()
        scenes[target][1, 0, 0] = bad
        a, report = solve_unchecked(*scenes, 1e-3, solver)  # type: ignore[arg-type]
        assert torch.isfinite(a).all()
        assert bool(report.fell_back[1])
        assert relative_error(a[[0, 2]], expected[[0, 2]]) < 1e-2


def test_lesson_1_the_sample_covariance_never_builds_n_by_n_per_snapshot() -> None:
    B, L, M, N = 8, 16, 16, 144
    for unit in (True, False):
        y, H, codes = problem(B, L, M, N, unit=unit, dtype=torch.complex64)
        with LargestTensor() as seen:
            sample_covariance(y, H, codes)
        # No more than the outer products of a chunk, and far from N x N of even one snapshot each.
        assert seen.elements <= max(B * L * N, B * M * N, M * M * N * B)
        assert seen.elements < B * L * N * N / 8
        with LargestTensor() as seen:
            sample_covariance(y, H, codes, solver="gram")
        assert seen.elements >= B * L * N * N  # the measure sees what it is to forbid


def test_lesson_1_workspace_stays_bounded_as_the_batch_grows() -> None:
    for unit in (True, False):
        y, H, codes = problem(96, 16, 16, 144, unit=unit, dtype=torch.complex64)
        with LargestTensor() as seen:
            sample_covariance(y, H, codes)
        assert seen.elements * 8 < 6e6  # bytes; y, H and codes alone hold 3.7e6


def test_trap_tf32_and_autocast_stay_out_of_linear_algebra(device: torch.device) -> None:
    scenes = simulate(4, device=device, generator=torch.Generator(device).manual_seed(0))
    for codes in (scenes.codes, scenes.codes * 1.5):
        exact = oracle(scenes.y, scenes.H, codes, 1e-3)
        plain, _ = tikhonov_solve(scenes.y, scenes.H, codes)
        with torch.autocast(device.type, torch.bfloat16):
            cast, _ = tikhonov_solve(scenes.y, scenes.H, codes)
            R = sample_covariance(scenes.y, scenes.H, codes)
        assert torch.equal(cast, plain)
        assert relative_error(cast, exact) < 1e-4
        assert R.factor.dtype == torch.complex64
        torch.set_float32_matmul_precision("medium")
        try:
            reduced, _ = tikhonov_solve(scenes.y, scenes.H, codes)
        finally:
            torch.set_float32_matmul_precision("highest")
        assert torch.equal(reduced, plain)


@pytest.mark.parametrize("unit", [True, False])
def test_default_scenes_in_complex64_match_complex128(unit: bool) -> None:
    scenes = simulate(16, generator=torch.Generator().manual_seed(0))
    codes = scenes.codes if unit else scenes.codes * (1 + torch.rand(scenes.codes.shape))
    exact = oracle(scenes.y, scenes.H, codes, 1e-3)
    a, report = tikhonov_solve(scenes.y, scenes.H, codes)
    assert report.n_fallbacks == 0
    worst = ((a - exact).abs().amax((1, 2)) / exact.abs().amax((1, 2))).max()
    assert float(worst) < 1e-4


def test_gradient_passes_through_the_solver() -> None:
    y, H, codes = problem(B=2, L=2, M=2, N=3)
    y.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: tikhonov_solve(v, H, codes)[0], (y,))


def test_conjugate_views_are_taken_as_they_are() -> None:
    for unit in (True, False):
        y, H, codes = problem(unit=unit)
        lazy, _ = tikhonov_solve(y.conj(), H.conj(), codes.conj())
        plain, _ = tikhonov_solve(*(t.conj().resolve_conj() for t in (y, H, codes)))
        assert relative_error(lazy, plain) < 1e-12


@pytest.mark.parametrize("door", [tikhonov_solve, sample_covariance])
def test_lesson_10_bad_measurements_are_refused_at_the_door(door) -> None:  # type: ignore[no-untyped-def]
    y, H, codes = problem()
    for i, name in enumerate(("y", "H", "codes")):
        for bad in (math.nan, math.inf, complex(0, math.nan)):
            scenes = [t.clone() for t in (y, H, codes)]
            scenes[i][1, 0, 1] = bad
            with pytest.raises(ValueError, match=rf"{name} holds 1 non-finite.*\(1, 0, 1\)"):
                door(*scenes)
        real = [t.real if j == i else t for j, t in enumerate((y, H, codes))]
        with pytest.raises(ValueError, match=f"{name} has dtype torch.float64.*complex64"):
            door(*real)
        mixed = [t.to(torch.complex64) if j == i else t for j, t in enumerate((y, H, codes))]
        with pytest.raises(ValueError, match="expected one dtype"):
            door(*mixed)
        flat = [t[0, 0] if j == i else t for j, t in enumerate((y, H, codes))]
        with pytest.raises(ValueError, match=rf"{name} has shape"):
            door(*flat)
        arrays = [t.numpy() if j == i else t for j, t in enumerate((y, H, codes))]
        with pytest.raises(TypeError, match=f"{name} is ndarray"):
            door(*arrays)
    for shapes in (
        (y[:, :3], H, codes),
        (y[..., :3], H, codes),
        (y, H[..., :4], codes),
        (y, H, codes[..., :4]),
        (y, H.mT, codes),
    ):
        with pytest.raises(ValueError, match=r"shapes do not fit.*expected"):
            door(*shapes)
    with pytest.raises(ValueError, match="do not broadcast"):
        door(y[:2], H, codes)
    for empty in ((y[:, :0], H, codes[:, :0]), (y[..., :0], H[:, :0], codes)):
        with pytest.raises(ValueError, match="at least one"):
            door(*empty)
    for regularization in (-1e-3, math.nan, math.inf):
        with pytest.raises(ValueError, match="regularization is"):
            door(y, H, codes, regularization)
    with pytest.raises(ValueError, match="solver 'qr' unknown"):
        door(y, H, codes, solver="qr")


def test_lesson_3_the_default_regularisation_is_one_thousandth_everywhere() -> None:
    assert TikhonovConfig().regularization == 1e-3
    for door in (tikhonov_solve, sample_covariance):
        assert inspect.signature(door).parameters["regularization"].default == 1e-3


def test_shape_of_the_oracle_is_the_documented_one() -> None:
    y, H, codes = (t[0].numpy() for t in problem())
    assert reference.solve(y, H, codes, 1e-3).shape == (4, 9)
    assert np.iscomplexobj(reference.solve(y, H, codes, 0.0))
