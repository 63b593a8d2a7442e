"""Loss terms with dense N x N matrices and eigh, a scene at a time, in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.complex128]


def at_trace_n(R: Matrix) -> Matrix:
    R = 0.5 * (R + R.conj().T)
    return R * (R.shape[0] / np.trace(R).real)


def nmse(estimate: Matrix, truth: Matrix) -> float:
    estimate, truth = at_trace_n(estimate), at_trace_n(truth)
    return float(np.linalg.norm(estimate - truth) ** 2 / np.linalg.norm(truth) ** 2)


def dominant_subspace(R: Matrix, n_sources: int) -> Matrix:
    _, vectors = np.linalg.eigh(R)
    return vectors[:, R.shape[0] - n_sources :]


def subspace_align(blended: Matrix, sources: Matrix) -> float:
    """1 - ||U_K^H Q||^2 / K for the sources' steering vectors in the columns of ``sources``."""
    k = sources.shape[1]
    q, _ = np.linalg.qr(sources)
    u = dominant_subspace(blended, k)
    return float(1.0 - np.linalg.norm(u.conj().T @ q) ** 2 / k)


def peak_contrast(
    blended: Matrix, sources: Matrix, decoys: Matrix, temperature: float
) -> list[float]:
    """Cross-entropy of each source's column against the columns of ``decoys``."""
    u = dominant_subspace(blended, sources.shape[1])
    values = []
    for a in sources.T:
        mine = np.linalg.norm(u.conj().T @ a) ** 2
        others = [
            np.linalg.norm(u.conj().T @ d) ** 2
            for d in decoys.T
            if max(abs(d.conj() @ s) ** 2 for s in sources.T) <= 0.5
        ]
        scores = np.array([mine, *others]) / temperature
        values.append(float(np.log(np.exp(scores).sum()) - scores[0]))
    return values
