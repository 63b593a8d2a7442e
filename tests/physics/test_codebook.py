from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from physics import (
    PlanarArray,
    dft_codebook,
    draw_codes,
    hadamard_codebook,
    quantize,
    random_codes,
    steering_vector,
)
from physics.codebook import hadamard_matrix
from physics.tikhonov import is_unit_modulus
from tests.physics.helpers import complex_normal, eps


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("kind", ["random", "dft", "hadamard"])
@pytest.mark.parametrize("bits", [None, 1, 3])
def test_every_codebook_has_unit_modulus(kind: str, bits: int | None, dtype: torch.dtype) -> None:
    codes = draw_codes(
        kind,  # type: ignore[arg-type]
        7,
        PlanarArray(4, 12),
        bits=bits,
        batch=(2, 3),
        generator=generator(),
        dtype=dtype,
    )
    assert codes.shape == (2, 3, 7, 48)
    assert codes.dtype == dtype
    assert is_unit_modulus(codes)
    assert (codes.abs() - 1).abs().max() <= 4 * eps(dtype)


@pytest.mark.parametrize("sides", [(12, 12), (3, 5), (1, 4)])
def test_dft_codes_are_orthogonal_and_steer_to_their_spatial_frequency(
    sides: tuple[int, int],
) -> None:
    array = PlanarArray(*sides)
    book = dft_codebook(array, torch.complex128)
    eye = torch.eye(array.size, dtype=torch.complex128)
    assert torch.allclose(book @ book.mH / array.size, eye, atol=array.size * eps(book.dtype))
    for row, (v, h) in (
        (v * sides[0] + h, (v, h)) for v in range(sides[1]) for h in range(sides[0])
    ):
        for n in range(array.size):
            turns = h * (n % sides[0]) / sides[0] + v * (n // sides[0]) / sides[1]
            expected = torch.polar(torch.tensor(1.0), torch.tensor(-2 * torch.pi * turns))
            assert abs(complex(book[row, n]) - complex(expected)) < 1e-5


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 16, 20, 24, 32])
def test_hadamard_matrices_hold_signs_and_are_orthogonal(order: int) -> None:
    matrix = hadamard_matrix(order)
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix.mT, order * torch.eye(order, dtype=torch.float64))


def test_hadamard_codebook_serves_the_12_by_12_surface() -> None:
    book = hadamard_codebook(PlanarArray(), torch.complex128)
    assert book.shape == (144, 144)
    assert torch.equal(book @ book.mH, 144 * torch.eye(144, dtype=torch.complex128))


@pytest.mark.parametrize("order", [3, 6, 28])
def test_a_missing_hadamard_matrix_names_the_order_that_was_asked_for(order: int) -> None:
    with pytest.raises(ValueError, match=f"order {order} .*dft"):
        hadamard_codebook(PlanarArray(order, 4))


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_b_bits_give_exactly_two_to_the_b_numbers(bits: int, dtype: torch.dtype) -> None:
    codes = quantize(random_codes(64, PlanarArray(), generator=generator(), dtype=dtype), bits)
    assert len(torch.view_as_real(codes).reshape(-1, 2).unique(dim=0)) == 2**bits


@settings(max_examples=30)
@given(bits=st.integers(1, 8), seed=st.integers(0, 1000))
def test_quantisation_moves_a_phase_by_at_most_half_a_step_and_only_once(
    bits: int, seed: int
) -> None:
    codes = complex_normal(40, seed=seed)
    once = quantize(codes, bits)
    moved = (once * codes.conj()).angle().abs()
    assert float(moved.max()) <= torch.pi / 2**bits + 1e-12
    assert torch.allclose(quantize(once, bits), once, atol=1e-12)


@pytest.mark.parametrize("kind", ["dft", "hadamard"])
def test_codes_of_a_sweep_do_not_repeat_before_the_book_is_used_up(kind: str) -> None:
    array = PlanarArray(4, 2)
    codes = draw_codes(kind, 12, array, batch=(5,), generator=generator())  # type: ignore[arg-type]
    for sweep in codes:
        gram = (sweep[:8] @ sweep[:8].mH).abs() / 8
        assert torch.allclose(gram, torch.eye(8), atol=1e-5)
    assert codes.shape == (5, 12, 8)


def test_the_same_seed_draws_the_same_codes_and_another_seed_others() -> None:
    a, b, c = (
        draw_codes("random", 4, PlanarArray(), generator=generator(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_random_codes_look_in_every_direction() -> None:
    array = PlanarArray(6, 6)
    codes = random_codes(4000, array, generator=generator())
    a = steering_vector(torch.tensor([0.3, 0.1, 4.0]), array)
    # E|c^T a|^2 = ||a||^2 = 1, from 4000 draws of variance about 1.
    assert float((codes @ a).abs().square().mean()) == pytest.approx(1, abs=4 / 4000**0.5)


def test_bad_codebook_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="bits is 0"):
        quantize(complex_normal(3), 0)
    with pytest.raises(ValueError, match="hadamard"):
        draw_codes("walsh", 4, PlanarArray())  # type: ignore[arg-type]


def test_codes_are_made_on_the_device_that_is_asked_for(device: torch.device) -> None:
    for kind in ("random", "dft", "hadamard"):
        codes = draw_codes(kind, 3, PlanarArray(4, 4), bits=3, device=device)  # type: ignore[arg-type]
        assert codes.device.type == device.type
