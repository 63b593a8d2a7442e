"""Phase codes of the surface: 2-D DFT, Hadamard and random, with b-bit quantisation."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from physics.geometry import PlanarArray
from physics.transfer import sent

Codebook = Literal["random", "dft", "hadamard"]


def quantize(codes: Tensor, bits: int) -> Tensor:
    """Round each code to the nearest of ``2**bits`` uniformly spaced phases, with unit modulus.

    Args:
        codes: (…) complex.
        bits: at least 1.

    Raises:
        ValueError: ``bits`` below 1.
    """
    if bits < 1:
        raise ValueError(f"bits is {bits}; at least 1 needed (leave it out for continuous phases)")
    step = 2.0 * math.pi / 2**bits
    # The remainder maps -pi and pi to the same phase.
    phase = torch.round(torch.angle(codes) / step).remainder(2**bits) * step
    return torch.polar(torch.ones_like(phase), phase)


def random_codes(
    n_snapshots: int,
    array: PlanarArray,
    *,
    batch: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.complex64,
) -> Tensor:
    """Codes with independent phases, uniform on [0, 2 pi).

    Args:
        n_snapshots: L.
        array: of N elements.
        batch: leading dimensions.
        generator: random generator on ``device``; torch's default one if left out.
        device: where to draw; torch's default device if left out.
        dtype: complex64 or complex128.

    Returns:
        (*batch, L, N) complex of unit modulus.
    """
    phase = torch.rand(
        (*batch, n_snapshots, array.size), generator=generator, device=device, dtype=dtype.to_real()
    )
    phase = phase * (2.0 * math.pi)
    return torch.polar(torch.ones_like(phase), phase)


def dft_codebook(array: PlanarArray, dtype: torch.dtype = torch.complex64) -> Tensor:
    """All N two-dimensional DFT codes: the Kronecker product of two DFT matrices.

    Args:
        array: of N = n_vertical * n_horizontal elements.
        dtype: complex64 or complex128.

    Returns:
        (N, N) complex of unit modulus, orthogonal rows. Row ``v * n_horizontal + h`` steers to
        spatial frequency (h / n_horizontal, v / n_vertical).
    """

    def dft(n: int) -> Tensor:
        index = torch.arange(n, dtype=torch.float64)
        phase = -2.0 * math.pi * torch.outer(index, index).remainder(n) / n
        return torch.polar(torch.ones_like(phase), phase)

    return torch.kron(dft(array.n_vertical), dft(array.n_horizontal)).to(dtype)


def hadamard_matrix(order: int) -> Tensor:
    """Hadamard matrix (order, order) of +-1, float64, by Sylvester's and Paley's constructions.

    Raises:
        ValueError: no implemented construction gives this order.

    Source: Paley, "On orthogonal matrices", J. Math. Phys. 12, 1933 (construction I).
    """
    matrix = _hadamard(order)
    if matrix is None:
        raise ValueError(
            f"no Hadamard matrix of order {order} by Sylvester's or Paley's construction; "
            "use a codebook of kind 'dft' or 'random', or sides such as 2, 4, 8, 12, 16, 20, 24"
        )
    return matrix


def _hadamard(order: int) -> Tensor | None:
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    q = order - 1
    if order % 4 == 0 and all(q % d for d in range(2, math.isqrt(q) + 1)):
        residues = {(i * i) % q for i in range(1, q)}
        character = torch.tensor([0.0] + [1.0 if i in residues else -1.0 for i in range(1, q)])
        index = torch.arange(q)
        skew = torch.zeros(order, order, dtype=torch.float64)
        skew[0, 1:] = 1.0
        skew[1:, 0] = -1.0
        skew[1:, 1:] = character[(index[:, None] - index[None, :]) % q]
        return skew + torch.eye(order, dtype=torch.float64)
    if order % 2 == 0:
        half = _hadamard(order // 2)
        if half is not None:
            return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)
    return None


def hadamard_codebook(array: PlanarArray, dtype: torch.dtype = torch.complex64) -> Tensor:
    """All N Hadamard codes, built from one Hadamard matrix per side of the array.

    Args:
        array: of N = n_vertical * n_horizontal elements.
        dtype: complex64 or complex128.

    Returns:
        (N, N) complex of +-1, orthogonal rows.

    Raises:
        ValueError: no implemented construction gives a Hadamard matrix for one of the sides.
    """
    return torch.kron(hadamard_matrix(array.n_vertical), hadamard_matrix(array.n_horizontal)).to(
        dtype
    )


def draw_codes(
    kind: Codebook,
    n_snapshots: int,
    array: PlanarArray,
    *,
    bits: int | None = None,
    batch: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.complex64,
) -> Tensor:
    """Draw the codes of one sweep for each batch item.

    ``random`` draws every phase; ``dft`` and ``hadamard`` draw L of the N codes without
    replacement (with replacement from the (N+1)-th on).

    Args:
        kind: kind of the codebook.
        n_snapshots: L.
        array: of N elements.
        bits: resolution of the phase shifters; None leaves the phases unquantised.
        batch: leading dimensions.
        generator: random generator on ``device``; torch's default one if left out.
        device: where to draw; torch's default device if left out.
        dtype: complex64 or complex128.

    Returns:
        (*batch, L, N) complex of unit modulus.

    Raises:
        ValueError: unknown kind, bits below 1, or no Hadamard matrix for the array's sides.
    """
    if kind == "random":
        codes = random_codes(
            n_snapshots, array, batch=batch, generator=generator, device=device, dtype=dtype
        )
    elif kind in ("dft", "hadamard"):
        book = dft_codebook(array, dtype) if kind == "dft" else hadamard_codebook(array, dtype)
        repeats = -(-n_snapshots // array.size)
        keys = torch.rand(
            (*batch, repeats, array.size),
            generator=generator,
            device=device,
            dtype=dtype.to_real(),
        )
        chosen = keys.argsort(dim=-1).flatten(-2)[..., :n_snapshots]
        codes = sent(book, keys.device)[chosen]
    else:
        raise ValueError(f"codebook {kind!r} unknown; choose from {get_args(Codebook)}")
    return codes if bits is None else quantize(codes, bits)
