from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from physics import (
    LowRankCovariance,
    PlanarArray,
    SceneConfig,
    blend,
    covariance_of,
    nmse,
    sample_covariance,
    simulate,
    tikhonov_solve,
)
from tests.physics.helpers import (
    LargestTensor,
    assert_equals,
    complex_normal,
    covariance,
    dense,
    eps,
    relative_error,
    unit_codes,
)
from tests.reference import covariance as reference

DTYPES = [torch.complex128, torch.complex64]


shapes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 8))
laws = settings(max_examples=30)


@laws
@given(shape=shapes, loading=st.floats(0, 3), seed=st.integers(0, 1000))
def test_it_is_hermitian_positive_and_its_trace_is_the_diagonals_sum(
    shape: tuple[int, int, int], loading: float, seed: int
) -> None:
    R = covariance(*shape, loading=loading, seed=seed)
    matrix = R.dense()
    assert torch.allclose(matrix, matrix.mH, atol=1e-14 * (1 + loading + shape[2]))
    values = torch.linalg.eigvalsh(matrix)
    assert (values >= loading - 1e-12 * values[:, -1:]).all()
    trace = matrix.diagonal(dim1=-2, dim2=-1).real.sum(-1)
    assert torch.allclose(R.trace(), trace, rtol=1e-12)
    assert_equals(R, dense(R), 1e-12)


@pytest.mark.parametrize("shrinkage", [-0.1, 1.1, math.nan, torch.tensor([0.1, 0.2, 1.3])])
def test_shrinkage_outside_zero_to_one_is_refused(shrinkage: Any) -> None:
    with pytest.raises(ValueError, match="shrinkage"):
        covariance().shrunk(shrinkage)


@laws
@given(shape=shapes, loading=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 1000))
def test_every_method_matches_the_dense_matrix(
    shape: tuple[int, int, int], loading: float, seed: int
) -> None:
    B, N, r = shape
    R, S = covariance(*shape, loading=loading, seed=seed), covariance(B, N, 2, seed=seed + 1)
    matrix, other = R.dense(), S.dense()
    x, v = complex_normal(B, N, 4, seed=seed), complex_normal(B, 5, N, seed=seed)
    assert torch.allclose(R.gram(), R.factor.mH @ R.factor)
    assert torch.allclose(R.inner(S), (matrix * other.conj()).sum((-2, -1)).real, rtol=1e-10)
    assert torch.allclose(R.matmul(x), matrix @ x)
    expected = torch.einsum("bgn,bnm,bgm->bg", v.conj(), matrix, v).real
    assert torch.allclose(R.quadratic(v), expected)
    largest = torch.linalg.eigvalsh(matrix).flip(-1)[:, : min(r, N)]
    assert torch.allclose(R.eigenvalues()[:, : min(r, N)], largest, atol=1e-11)
    assert torch.allclose(R.eigenvalues()[:, N:], torch.full((B, max(0, r - N)), loading).double())
    if loading:
        assert relative_error(R.solve(x), torch.linalg.solve(matrix, x)) < 1e-10
        inverse = torch.linalg.inv(matrix)
        expected = torch.einsum("bgn,bnm,bgm->bg", v.conj(), inverse, v).real
        assert torch.allclose(R.inverse_quadratic(v), expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalising_shrinking_and_loading_match_the_dense_matrix(
    dtype: torch.dtype, device: torch.device
) -> None:
    R = covariance(loading=0.2, dtype=dtype).to(device)
    matrices, tolerance = dense(R), 50 * eps(dtype)
    assert_equals(R.normalized(), [reference.normalize(m) for m in matrices], tolerance)
    assert torch.allclose(
        R.normalized().trace().cpu(), torch.full((3,), 7.0, dtype=dtype.to_real())
    )
    for rho in (0.0, 0.3, 1.0):
        assert_equals(R.shrunk(rho), [reference.shrink(m, rho) for m in matrices], tolerance)
        assert torch.allclose(R.shrunk(rho).trace(), R.trace())
        loaded = [m + rho * m.trace().real / 7 * torch.eye(7).numpy() for m in matrices]
        assert_equals(R.loaded(rho), loaded, tolerance)
    per_item = torch.tensor([0.0, 0.5, 1.0], device=device)
    expected = [reference.shrink(m, p) for m, p in zip(matrices, (0.0, 0.5, 1.0), strict=True)]
    assert_equals(R.shrunk(per_item), expected, tolerance)


def test_shrinkage_of_an_unloaded_covariance_lifts_the_noise_floor_to_rho() -> None:
    R = covariance(r=2).normalized().shrunk(0.25)
    values = torch.linalg.eigvalsh(R.dense())
    assert torch.allclose(values[:, :5], torch.full((3, 5), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_zero_matrix_says_nothing_and_becomes_the_identity(dtype: torch.dtype) -> None:
    factor = torch.zeros(2, 5, 3, dtype=dtype, requires_grad=True)
    R = LowRankCovariance(factor).normalized()
    assert torch.equal(R.dense(), torch.eye(5, dtype=dtype).expand(2, 5, 5))
    R.inner(R).sum().backward()
    assert factor.grad is not None
    assert torch.isfinite(factor.grad).all()


@pytest.mark.parametrize("scale", [1e-40, 1e-25, 1e-15, 1e15, 1e25, 1e37])
def test_normalising_forgets_any_scale(scale: float) -> None:
    R = covariance(dtype=torch.complex64)
    S = LowRankCovariance(R.factor * scale).normalized()
    # Below 1.2e-38 float32 keeps fewer digits: about five at 1e-40.
    tolerance = 1e-4 if scale < 1e-38 else 20 * eps(torch.complex64)
    assert relative_error(S.dense(), R.normalized().dense().to(torch.complex128)) < tolerance
    assert float(nmse(S, R).max()) < 1e-5


def test_scaled_loading_is_forgotten_with_the_factor() -> None:
    R = covariance(dtype=torch.complex64, loading=0.5)
    S = LowRankCovariance(R.factor * 1e15, R.loading * 1e30).normalized()
    assert relative_error(S.dense(), R.normalized().dense().to(torch.complex128)) < 1e-5


@pytest.mark.parametrize("r", [1, 4, 12])
def test_signal_subspace_matches_the_dense_eigenvectors(r: int) -> None:
    R = covariance(N=8, r=r, loading=0.1)
    for k in range(min(r, 8) + 1):
        U = R.signal_subspace(k)
        assert U.shape == (3, 8, k)
        assert torch.allclose(U.mH @ U, torch.eye(k, dtype=U.dtype).expand(3, k, k), atol=1e-12)
        for u, matrix in zip(U, dense(R), strict=True):
            expected = torch.from_numpy(reference.signal_subspace(matrix, k).copy())
            assert torch.allclose(u @ u.mH, expected @ expected.mH, atol=1e-9)


def test_signal_subspace_comes_largest_first() -> None:
    R = covariance(N=8, r=4)
    U = R.signal_subspace(4)
    power = torch.einsum("bnk,bnm,bmk->bk", U.conj(), R.dense(), U).real
    assert torch.allclose(power, R.eigenvalues())
    assert (power.diff(dim=-1) < 0).all()


def test_more_sources_than_columns_are_refused_for_a_basis() -> None:
    for k in (-1, 4):
        with pytest.raises(ValueError, match=r"rank 3 .* 0\.\.3"):
            covariance().signal_subspace(k)


@laws
@given(shape=shapes, loading=st.sampled_from([0.0, 0.5]), seed=st.integers(0, 1000))
def test_lesson_6_nmse_matches_the_dense_matrices_and_normalises_both_sides(
    shape: tuple[int, int, int], loading: float, seed: int
) -> None:
    B, N, _ = shape
    E, T = covariance(*shape, loading=loading, seed=seed), covariance(B, N, 2, seed=seed + 1)
    expected = torch.tensor(
        [reference.nmse(e, t) for e, t in zip(dense(E), dense(T), strict=True)],
        dtype=torch.float64,
    )
    # The factored difference cancels: a few eps of the energies, absolute.
    assert torch.allclose(nmse(E, T), expected, rtol=1e-9, atol=1e-12)
    scaled = LowRankCovariance(T.factor * 1e3, T.loading)
    assert torch.allclose(nmse(E, scaled), expected, rtol=1e-9, atol=1e-12)
    assert float(nmse(scaled, T).max()) < 1e-12
    assert float(nmse(T, T).max()) < 1e-12


def test_nmse_gradient_matches_finite_differences() -> None:
    T = covariance(2, 5, 2, seed=4)
    factor = complex_normal(2, 5, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: nmse(LowRankCovariance(f), T), (factor,))


@pytest.mark.parametrize("delta", [0.0, 0.1, 1.0, 10.0])
def test_trap_diagonal_loading_puts_a_floor_under_a_perfect_nmse(delta: float) -> None:
    """(R + d I) / (1 + d) misses R by d (I - R) / (1 + d), of energy N less than R's own.

    NMSE = (d / (1 + d))^2 (1 - N / ||R||^2), where ||R||^2 = N^2 / K for K equal orthogonal
    sources: 0.25 (1 - K / N) for a loading of 1.
    """
    R = covariance(N=40, r=3).normalized()
    floor = (delta / (1 + delta)) ** 2 * (1 - 40 / R.inner(R))
    assert torch.allclose(nmse(R.loaded(delta), R), floor)
    q, _ = torch.linalg.qr(complex_normal(144, 3))
    sources = LowRankCovariance(q)
    assert float(nmse(sources.loaded(1.0), sources)) == pytest.approx(0.25 * (1 - 3 / 144))


@pytest.mark.parametrize("mode", ["constant", "fluctuating"])
def test_trap_sample_covariance_is_not_mean_centred(mode: str) -> None:
    array = PlanarArray(6, 6)
    config = SceneConfig(source_mode=mode, snr_db=(60.0, 60.0), n_antennas=48)
    scenes = simulate(
        8, config, array, generator=torch.Generator().manual_seed(0), dtype=torch.complex128
    )
    a, _ = tikhonov_solve(scenes.y, scenes.H, scenes.codes, 1e-6)
    R = sample_covariance(scenes.y, scenes.H, scenes.codes, 1e-6)
    for b in range(8):
        expected = reference.sample_covariance(a[b].numpy())
        assert relative_error(R.dense()[b], torch.from_numpy(expected)) < 1e-10
    if mode == "constant":  # the mean is the signal: what is left without it is mostly noise
        centred = covariance_of(a - a.mean(-2, keepdim=True))
        assert float(R.eigenvalues()[:, 0].median()) > 0.9 * array.size
        assert float(centred.eigenvalues()[:, 0].median()) < 0.5 * array.size


def test_sample_covariance_is_hermitian_positive_of_trace_n_and_rank_l() -> None:
    scenes = simulate(5, generator=torch.Generator().manual_seed(0))
    R = sample_covariance(scenes.y, scenes.H, scenes.codes)
    assert R.factor.shape == (5, 144, 16)
    assert torch.allclose(R.trace(), torch.full((5,), 144.0))
    assert torch.equal(R.loading, torch.zeros(5))
    matrix = R.dense()
    assert relative_error(matrix, matrix.mH.to(torch.complex128)) < 1e-6
    assert float(torch.linalg.eigvalsh(matrix).min()) > -144 * 16 * eps(matrix.dtype)


def test_no_signal_gives_the_identity() -> None:
    y, H, codes = complex_normal(2, 3, 4), complex_normal(2, 4, 6), unit_codes(2, 3, 6)
    eye = torch.eye(6, dtype=torch.complex128).expand(2, 6, 6)
    assert torch.equal(sample_covariance(0 * y, H, codes).dense(), eye)
    assert torch.equal(sample_covariance(y, 0 * H, codes).dense(), eye)
    mixed = sample_covariance(y * torch.tensor([0.0, 1.0])[:, None, None], H, codes).dense()
    assert torch.equal(mixed[0], eye[0])
    assert not torch.allclose(mixed[1], eye[1])


def test_one_snapshot_and_no_batch_dimension_give_a_rank_one_matrix() -> None:
    R = sample_covariance(complex_normal(1, 4), complex_normal(4, 6), unit_codes(1, 6))
    assert R.dense().shape == (6, 6)
    assert R.rank == 1
    assert float(R.eigenvalues()) == pytest.approx(6)
    empty = sample_covariance(complex_normal(0, 1, 4), complex_normal(0, 4, 6), unit_codes(0, 1, 6))
    assert empty.dense().shape == (0, 6, 6)
    assert nmse(empty, empty).shape == (0,)


def test_dense_alone_forms_n_by_n() -> None:
    N = 60
    R, S = covariance(2, N, 3, loading=0.1), covariance(2, N, 2, seed=1)
    vectors = complex_normal(2, 5, N)
    with LargestTensor() as seen:
        nmse(blend(R, S, 0.3).shrunk(0.1), S)
        R.inverse_quadratic(vectors)
        R.solve(vectors.mT)
        R.subspace_energy(vectors, 2)
        R.signal_subspace(2)
    assert seen.elements < N * N
    with LargestTensor() as seen:
        R.dense()
    assert seen.elements >= 2 * N * N


def test_a_singular_covariance_is_not_solved_with() -> None:
    for call in (
        lambda: covariance().solve(complex_normal(3, 7, 1)),
        lambda: covariance().inverse_quadratic(complex_normal(3, 1, 7)),
    ):
        with pytest.raises(ValueError, match=r"positive loading.*loaded\("):
            call()


def test_loading_below_the_rounding_is_raised_and_not_a_crash() -> None:
    factor = complex_normal(2, 16, 1, dtype=torch.complex64) @ complex_normal(
        2, 1, 5, seed=1, dtype=torch.complex64
    )
    R = LowRankCovariance(factor).normalized().loaded(1e-12)
    value = R.inverse_quadratic(complex_normal(2, 3, 16, dtype=torch.complex64))
    assert torch.isfinite(value).all()
    assert (value > 0).all()


def test_conjugate_views_serve_as_factors() -> None:
    factor = complex_normal(2, 3, 7)
    lazy, plain = LowRankCovariance(factor.mH), LowRankCovariance(factor.mH.resolve_conj())
    assert torch.allclose(lazy.trace(), plain.trace())
    assert torch.allclose(lazy.normalized().dense(), plain.normalized().dense())


@pytest.mark.parametrize(
    "factor", [torch.zeros(3, 4), torch.zeros(4).cfloat(), torch.zeros(4, 0).cfloat()]
)
def test_bad_factors_are_refused(factor: Tensor) -> None:
    with pytest.raises(ValueError, match="factor"):
        LowRankCovariance(factor)


def test_bad_loadings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"loading is torch\.complex64"):
        LowRankCovariance(complex_normal(4, 2), torch.zeros(()).cfloat())


def test_trap_autocast_stays_out_of_the_covariance(device: torch.device) -> None:
    R = covariance(N=64, r=8, dtype=torch.complex64).to(device)
    S = covariance(N=64, r=4, seed=1, dtype=torch.complex64).to(device)
    exact = nmse(R.to(torch.complex128), S.to(torch.complex128))
    with torch.autocast(device.type, torch.bfloat16):
        value, matrix, subspace = nmse(R, S), R.dense(), R.signal_subspace(3)
    assert value.dtype == torch.float32
    assert matrix.dtype == subspace.dtype == torch.complex64
    assert torch.allclose(value.double(), exact, rtol=1e-4)
    assert relative_error(matrix, R.to(torch.complex128).dense().cpu()) < 10 * eps(matrix.dtype)
    assert R.detach().factor.device.type == device.type
    assert "rank=8" in repr(R)


@pytest.mark.parametrize("looked_at", ["without gradient", "in inference mode"])
def test_what_is_kept_without_a_graph_takes_no_gradient_away(looked_at: str) -> None:
    parts = [complex_normal(7, 2, seed=i).requires_grad_() for i in range(2)]
    truth, vectors = LowRankCovariance(complex_normal(7, 2, seed=2)), complex_normal(1, 3, 7)
    quiet = torch.no_grad if looked_at == "without gradient" else torch.inference_mode

    def gradients(*, look: bool) -> tuple[Tensor, ...]:
        R, S = (LowRankCovariance(part) for part in parts)
        if look:
            with quiet():
                for T in (R, S):
                    T.gram()
                    T.dense()
                    T.project(vectors)
        B = blend(R, S, 0.3)
        energy = B.inner(B) + R.inner(truth) + B.factor.abs().square().sum()
        return torch.autograd.grad(energy + B.project(vectors).abs().sum(), parts)

    for plain, later in zip(gradients(look=False), gradients(look=True), strict=True):
        assert torch.equal(plain, later)


def test_amplitudes_scale_the_columns() -> None:
    columns, amplitudes = (
        complex_normal(3, 7, 2),
        torch.tensor([[1.0, 0.0], [2.0, 3.0], [0.5, 1.0]]),
    )
    R = LowRankCovariance(columns, amplitudes=amplitudes.double())
    plain = LowRankCovariance(columns * amplitudes.unsqueeze(-2))
    vectors = complex_normal(3, 4, 7, seed=1)
    for value, expected in (
        (R.dense(), plain.dense()),
        (R.gram(), plain.gram()),
        (R.trace(), plain.trace()),
        (R.project(vectors), plain.project(vectors)),
        (R.quadratic(vectors), plain.quadratic(vectors)),
        (R.normalized().dense(), plain.normalized().dense()),
        (R.normalized(moderate=True).shrunk(0.3).dense(), plain.normalized().shrunk(0.3).dense()),
        (
            R.reweighted(amplitudes.double() ** 2).trace(),
            (plain.factor * amplitudes.unsqueeze(-2)).abs().square().sum((-2, -1)),
        ),
        (
            nmse(R, LowRankCovariance(complex_normal(3, 7, 2, seed=5))),
            nmse(plain, LowRankCovariance(complex_normal(3, 7, 2, seed=5))),
        ),
        (R.to(torch.complex64).dense(), plain.dense().to(torch.complex64)),
        (R.detach().dense(), plain.dense()),
    ):
        assert torch.allclose(value, expected)
    one = LowRankCovariance(columns[0], amplitudes=amplitudes.double())  # columns broadcast
    assert one.dense().shape == (3, 7, 7)
    assert torch.allclose(one.dense()[1], LowRankCovariance(columns[0] * amplitudes[1]).dense())


def test_normalising_leaves_weighed_columns_as_they_are() -> None:
    columns = complex_normal(3, 7, 2).requires_grad_()
    R = LowRankCovariance(columns, amplitudes=torch.tensor([1.0, 2.0]).double())
    ones = torch.ones(3, 2, dtype=torch.float64)
    assert torch.allclose(
        R.normalized(moderate=True).reweighted(ones).dense(), columns @ columns.mH
    )


def test_nmse_takes_projections_that_are_known() -> None:
    R, T = covariance(r=4).normalized(), covariance(r=2, seed=3)
    known = nmse(R, T, R.project(T.columns.mT))
    assert torch.allclose(known, nmse(R, T))


def test_bad_amplitudes_are_refused() -> None:
    for bad in (torch.ones(3), torch.ones(2).cfloat()):
        with pytest.raises(ValueError, match="amplitudes"):
            LowRankCovariance(complex_normal(4, 2), amplitudes=bad)


def test_a_projection_follows_vectors_that_change_in_place() -> None:
    R, vectors = covariance(), complex_normal(3, 4, 7)
    R.project(vectors)
    vectors.mul_(2.0)
    assert torch.equal(R.project(vectors), R.factor.mT @ vectors.mH)
    with torch.inference_mode():
        vectors = complex_normal(3, 4, 7)
        R.project(vectors)
        vectors.mul_(2.0)
        assert torch.equal(R.project(vectors), R.factor.mT @ vectors.mH)


def test_a_gram_matrix_follows_columns_that_change_in_place() -> None:
    factor = complex_normal(2, 5, 3)
    R = LowRankCovariance(factor)
    before = R.normalized(moderate=True).trace(), R.reweighted(torch.ones(2, 3)).gram()
    factor.mul_(2.0)
    assert torch.allclose(LowRankCovariance(factor).gram(), 4.0 * before[1])
    assert torch.allclose(R.reweighted(torch.ones(2, 3)).gram(), 4.0 * before[1])
