"""Eigendecompositions at whose success nobody looks until the values are needed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from physics import eigen
from physics.subspace import dominant_weights


def hermitian(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(*shape, 5, 5, dtype=torch.complex64, generator=generator)
    return rows @ rows.mH


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])
def test_they_are_those_of_pytorch(shape: tuple[int, ...], device: torch.device) -> None:
    matrix = hermitian(*shape).to(device)
    values, vectors, failed = eigen.eigh_trusting(matrix)
    expected = torch.linalg.eigh(matrix)
    assert torch.equal(values, expected.eigenvalues)
    assert torch.equal(vectors, expected.eigenvectors)
    assert failed.shape == shape
    assert not failed.any()
    assert not eigen.keeps_codes()


def test_a_failure_is_an_error_on_a_cpu() -> None:
    with pytest.raises(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        eigen.eigh_trusting(hermitian(3).fill_(torch.nan))
    assert not eigen.keeps_codes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_says_itself_where_it_failed() -> None:
    matrix = hermitian(3).cuda()
    matrix[1] = torch.nan
    expected = torch.linalg.eigh(matrix[::2])
    torch.cuda.set_sync_debug_mode("error")
    try:
        values, _, failed = eigen.eigh_trusting(matrix)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert failed.tolist()[::2] == [False, False]
    assert failed[1] or values[1].isnan().all()
    torch.testing.assert_close(values[::2], expected.eigenvalues)


# What a GPU does, done to the CPU of a process of its own: the look is the same operator's.
AS_ON_A_GPU = """
import threading, torch
from physics import eigen
from physics.subspace import dominant_weights
from tests.physics.test_eigen import hermitian

assert eigen._replace_check("CPU") is not None
matrix = hermitian(3)
sound = torch.linalg.eigh(matrix).eigenvalues
matrix[2] = torch.nan
values, vectors, failed = eigen.eigh_trusting(matrix)
assert failed.tolist() == [False, False, True], failed
assert torch.equal(values[:2], sound[:2])

def raises(call, *parts):
    try:
        call()
    except torch.linalg.LinAlgError as error:
        assert all(part in str(error) for part in parts), error
    else:
        raise AssertionError("nothing was raised")

# Everybody else is told as ever, in this thread and beside it.
raises(lambda: torch.linalg.eigh(matrix), "linalg.eigh: (Batch element 2): The algorithm failed")
raises(lambda: torch.linalg.cholesky(-hermitian()), "linalg.cholesky: The factorization could not")
raises(lambda: torch.linalg.inv(torch.zeros(2, 2)), "linalg.inv: The diagonal element 1 is zero")
torch.linalg.cholesky(hermitian(2) + torch.eye(5))
found = []
original = torch.linalg.eigh

def beside(matrix):
    def other():
        raises(lambda: original(matrix), "linalg.eigh")
        found.append(True)
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    return original(matrix)

torch.linalg.eigh = beside
assert eigen.eigh_trusting(matrix)[2].any()
assert found == [True]
torch.linalg.eigh = original

# One that fails is NaN in the end, and the others are what they were.
def failing(matrix):
    values, vectors = original(matrix)
    codes = torch.tensor([0, 7, 0], dtype=torch.int32)
    torch.ops.aten._linalg_check_errors(codes, "eigh", is_matrix=False)
    return values, vectors

gram = hermitian(3).requires_grad_()
alone = dominant_weights(gram, 2, trusting=True)
torch.linalg.eigh = failing
raises(lambda: dominant_weights(gram, 2), "eigh: (Batch element 1)")
weights = dominant_weights(gram, 2, trusting=True)
assert weights[1].isnan().all()
assert torch.equal(weights[::2], alone[::2])
weights[::2].abs().sum().backward()
assert gram.grad[::2].isfinite().all()
print("well")
"""


def test_where_the_look_is_left_out_a_failure_stays_with_its_matrix() -> None:
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", AS_ON_A_GPU],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "well\n"


def test_the_subspace_is_decomposed_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, vectors, failed = eigen.eigh_trusting(matrix)
        failed[1] = True
        return values, vectors, failed

    gram = hermitian(3)
    alone = dominant_weights(gram, 2, trusting=True)
    monkeypatch.setattr("physics.subspace.eigh_trusting", failing)
    weights = dominant_weights(gram, 2, trusting=True)
    assert weights[1].isnan().all()
    assert torch.equal(weights[::2], alone[::2])
