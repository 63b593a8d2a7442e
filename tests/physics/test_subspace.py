from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from physics import LowRankCovariance, PlanarArray, blend, nmse, steering_vector
from physics.subspace import orthonormal_weights
from tests.physics.helpers import complex_normal, relative_error
from tests.physics.test_covariance import DTYPES, covariance, dense, laws, shapes
from tests.reference import covariance as reference


@laws
@given(shape=shapes, seed=st.integers(0, 1000))
def test_dominant_energy_is_the_energy_in_the_dense_subspace(
    shape: tuple[int, int, int], seed: int
) -> None:
    B, N, r = shape
    R = covariance(*shape, seed=seed)
    counts = torch.randint(0, r + 3, (B,), generator=torch.Generator().manual_seed(seed))
    vectors = complex_normal(B, 4, N, seed=seed)
    energy = R.subspace_energy(vectors, counts)
    for b, matrix in enumerate(dense(R)):
        k = min(int(counts[b]), r, N)
        U = torch.from_numpy(reference.signal_subspace(matrix, k).copy())
        # Accurate to eps over the smallest relative eigenvalue that is kept.
        expected = (vectors[b].conj() @ U).abs().square().sum(-1)
        assert torch.allclose(energy[b], expected, atol=1e-6)
    most = int(counts.max())
    bounded = R.dominant_energy(R.project(vectors), counts, at_most=most)
    assert torch.allclose(bounded, energy, atol=1e-6)


def test_sources_beyond_the_numerical_rank_add_nothing() -> None:
    for dtype in DTYPES:
        factor = complex_normal(2, 6, 2, dtype=dtype)
        padded = torch.cat([factor, torch.zeros(2, 6, 3, dtype=dtype)], dim=-1)
        every_direction = torch.eye(6, dtype=dtype).expand(2, 6, 6)
        for rows in (padded, torch.cat([factor, factor], dim=-1)):
            trace = LowRankCovariance(rows).subspace_energy(every_direction, 5).sum(-1)
            assert torch.allclose(trace, torch.full_like(trace, 2.0), atol=1e-3)


def test_gradient_of_the_dominant_energy_matches_finite_differences() -> None:
    factor = complex_normal(3, 5, 3).requires_grad_()
    vectors = complex_normal(2, 5)
    for counts in (torch.tensor([0, 1, 2]), torch.tensor([3, 2, 1]), 2):
        assert torch.autograd.gradcheck(
            lambda f, counts=counts: LowRankCovariance(f).subspace_energy(vectors, counts),
            (factor,),
        )

    def energy(f: Tensor, v: Tensor, s: Tensor) -> Tensor:
        R = LowRankCovariance(f, amplitudes=s.exp())
        return R.dominant_energy(R.project(v), torch.tensor([0, 1, 2]), at_most=2)

    moving = complex_normal(3, 4, 5, seed=1).requires_grad_()
    amplitudes = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(energy, (factor, moving, amplitudes))


def test_weights_of_the_dominant_subspace_make_an_orthonormal_basis() -> None:
    R = blend(covariance(N=8, r=3), covariance(N=8, r=2, seed=1), 0.3)
    counts = torch.tensor([0, 2, 3])
    basis = R.combined(R.dominant_weights(counts, at_most=3))
    assert basis.shape == (3, 3, 8)
    for rows, matrix, k in zip(basis, dense(R), counts.tolist(), strict=True):
        expected = torch.from_numpy(reference.signal_subspace(matrix, k).copy())
        assert torch.equal(rows[: 3 - k], torch.zeros_like(rows[: 3 - k]))
        assert torch.allclose(rows.mT @ rows.conj(), expected @ expected.mH, atol=1e-9)


def test_gradient_of_what_depends_on_the_dominant_subspace_matches_finite_differences() -> None:
    factor = complex_normal(3, 5, 3).requires_grad_()
    measured = covariance(3, 5, 2, seed=1)

    def projector(f: Tensor) -> Tensor:
        R = blend(LowRankCovariance(f), measured, 0.3)
        basis = R.combined(R.dominant_weights(torch.tensor([0, 1, 2]), at_most=2))
        return basis.mT @ basis.conj()

    assert torch.autograd.gradcheck(projector, (factor,))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_gradient_of_the_subspace_energy_knows_the_scale(scale: float) -> None:
    plain = complex_normal(2, 6, 3, dtype=torch.complex64).requires_grad_()
    scaled = (plain.detach() * scale).requires_grad_()
    vectors = complex_normal(4, 6, seed=1, dtype=torch.complex64)
    for factor in (plain, scaled):
        LowRankCovariance(factor).subspace_energy(vectors, 2)[:, 0].sum().backward()
    assert plain.grad is not None
    assert scaled.grad is not None
    assert relative_error(scaled.grad * scale, plain.grad.to(torch.complex128)) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("repeated", ["all", "across the gap", "inside", "zero", "tiny"])
def test_lesson_3_gradient_is_finite_at_repeated_eigenvalues(
    repeated: str, dtype: torch.dtype
) -> None:
    diagonal = {
        "all": [2.0, 2.0, 2.0, 2.0],
        "across the gap": [3.0, 2.0, 2.0, 1.0],
        "inside": [2.0, 2.0, 1.0, 1.0],
        "zero": [0.0, 0.0, 0.0, 0.0],
        "tiny": [1e-15, 1e-15, 1e-15, 1e-15],
    }[repeated]
    factor = torch.zeros(1, 6, 4, dtype=dtype)
    factor[0, :4] = torch.diag(torch.tensor(diagonal, dtype=dtype))
    factor.requires_grad_()
    vectors = complex_normal(3, 6, dtype=dtype)
    for door in (
        lambda: LowRankCovariance(factor).normalized().subspace_energy(vectors, 2).sum(),
        lambda: nmse(LowRankCovariance(factor), covariance(1, 6, 2, dtype=dtype)).sum(),
    ):
        (gradient,) = torch.autograd.grad(door(), factor)
        assert torch.isfinite(gradient).all()
    if repeated == "inside":
        exact = torch.autograd.gradcheck if dtype == torch.complex128 else None
        if exact:
            assert exact(lambda f: LowRankCovariance(f).subspace_energy(vectors, 2), (factor,))


def test_nan_in_one_item_stays_there() -> None:
    factor = complex_normal(3, 6, 2)
    vectors = complex_normal(4, 6, seed=1)
    clean = LowRankCovariance(factor).subspace_energy(vectors, 1)
    factor[1, 2, 0] = complex("nan")
    R = LowRankCovariance(factor)
    energy = R.dominant_energy(R.project(vectors), 1)
    assert torch.isnan(energy[1]).all()
    assert torch.allclose(energy[::2], clean[::2])


def test_counts_for_one_matrix_give_it_the_sum_of_their_gradients() -> None:
    factor, counts = complex_normal(6, 4), torch.tensor([1, 3])
    vectors = complex_normal(2, 5, 6, seed=1)

    def energies(factor: Tensor, counts: Tensor) -> Tensor:
        R = LowRankCovariance(factor)
        return R.dominant_energy(R.project(vectors), counts)

    shared, each = factor.clone().requires_grad_(), factor.repeat(2, 1, 1).requires_grad_()
    one, two = energies(shared, counts), energies(each, counts)
    assert torch.allclose(one, two)
    one.square().sum().backward()
    two.square().sum().backward()
    assert shared.grad is not None
    assert each.grad is not None
    assert torch.allclose(shared.grad, each.grad.sum(0))


def orthonormal(columns: Tensor) -> tuple[Tensor, Tensor]:
    """The basis A T (…, N, K) and its dimension."""
    weights, dimension = orthonormal_weights(columns)
    return columns @ weights, dimension


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_orthonormal_weights_span_what_the_columns_do(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    columns = torch.randn(20, 30, 5, generator=generator, dtype=dtype)
    columns = columns / torch.linalg.vector_norm(columns, dim=-2, keepdim=True)
    # No columns, coinciding ones, those that others span, and close ones.
    columns[0] = 0.0
    columns[1, :, 3] = columns[1, :, 1] * 1j
    columns[2, :, 1:3] = 0.0
    both = columns[3, :, 0] + columns[3, :, 1]
    columns[3, :, 4] = both / torch.linalg.vector_norm(both)
    columns[4, :, 2] = columns[4, :, 0] + 0.05 * columns[4, :, 2]
    columns[4] = columns[4] / torch.linalg.vector_norm(columns[4], dim=-2, keepdim=True)
    basis, dimension = orthonormal(columns)
    assert dimension.tolist() == [0, 4, 3, 4, *[5] * 16]
    # Rounding of the columns over the root of the smallest pivot, 0.05 of the close ones.
    rounding = 1000 * torch.finfo(dtype).eps
    for item in range(len(columns)):
        kept = basis[item][:, basis[item].abs().sum(0) > 0]
        assert kept.shape[1] == dimension[item]
        assert torch.allclose(kept.mH @ kept, torch.eye(kept.shape[1], dtype=dtype), atol=rounding)
        left, values, _ = torch.linalg.svd(columns[item], full_matrices=False)
        left = left[:, values > 1e-3]
        assert torch.allclose(kept @ kept.mH, left @ left.mH, atol=rounding)


@pytest.mark.parametrize("spread", [0.03, 0.01, 0.003, 0.001])
@pytest.mark.parametrize("n_sources", [2, 3, 5])
def test_weights_of_sources_close_to_each_other_are_orthonormal_too(
    spread: float, n_sources: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    around = torch.tensor([0.1, 0.05, 3.0])
    offset = spread * (2.0 * torch.rand(400, n_sources, 3, generator=generator) - 1.0)
    columns = steering_vector(around + offset, PlanarArray()).mT  # complex64
    basis, dimension = orthonormal(columns)
    kept = (basis.abs().sum(-2) > 0).to(basis.dtype)
    assert torch.equal((kept.real > 0).sum(-1), dimension)
    # The weights are as large as the root of the smallest pivot's reciprocal, and round the sum.
    least = 144 * torch.finfo(torch.float32).eps
    tolerance = 10 * torch.finfo(torch.float32).eps / least**0.5 * n_sources
    assert (basis.mH @ basis - torch.diag_embed(kept)).abs().max() < tolerance
