"""MUSIC and MVDR with N x N matrices, and peaks by loops."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from tests.reference.covariance import normalize

Complex = NDArray[np.complex128]
Real = NDArray[np.float64]


def music(matrix: Complex, steering: Complex, n_sources: int) -> Real:
    """1 / ||U_n^H a||^2 for each row of steering (G, N), U_n the noise subspace."""
    _, vectors = np.linalg.eigh(matrix)
    noise = vectors[:, : len(matrix) - n_sources]
    return np.array([1 / np.linalg.norm(noise.conj().T @ a) ** 2 for a in steering])


def mvdr(matrix: Complex, steering: Complex, loading: float) -> Real:
    """1 / (a^H (R + loading tr(R)/N I)^-1 a) with tr(R) = N."""
    loaded = normalize(matrix) + loading * np.eye(len(matrix))
    return np.array([1 / (a.conj() @ np.linalg.solve(loaded, a)).real for a in steering])


def peaks(spectrum: Real, n_peaks: int) -> list[tuple[int, int, int]]:
    """Cells at least as high as all of their up to 26 neighbours, highest first."""
    found = []
    for cell in itertools.product(*(range(n) for n in spectrum.shape)):
        around = []
        for step in itertools.product((-1, 0, 1), repeat=3):
            neighbour = tuple(c + s for c, s in zip(cell, step, strict=True))
            if all(0 <= c < n for c, n in zip(neighbour, spectrum.shape, strict=True)):
                around.append(spectrum[neighbour])
        if spectrum[cell] >= max(around):
            found.append(cell)
    found.sort(key=lambda cell: -spectrum[cell])
    return found[:n_peaks]


def parabola_vertex(below: float, here: float, above: float) -> float:
    """Offset of the vertex through (-1, below), (0, here), (1, above), within +-1/2."""
    a, b, _ = np.polyfit([-1.0, 0.0, 1.0], [below, here, above], 2)
    return float(np.clip(-b / (2 * a), -0.5, 0.5)) if a < 0 else 0.0
