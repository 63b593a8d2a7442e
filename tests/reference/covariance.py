"""Covariances as dense N x N matrices in complex128."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Complex = NDArray[np.complex128]


def dense(factor: Complex, loading: float = 0.0) -> Complex:
    """R = F F^H + loading I of one scene."""
    factor = np.asarray(factor, dtype=np.complex128)
    return factor @ factor.conj().T + loading * np.eye(len(factor))


def normalize(matrix: Complex) -> Complex:
    """Hermitian part, scaled to trace N; the zero matrix becomes the identity."""
    matrix = (matrix + matrix.conj().T) / 2
    trace = np.trace(matrix).real
    return matrix * (len(matrix) / trace) if trace > 0 else np.eye(len(matrix), dtype=complex)


def sample_covariance(snapshots: Complex) -> Complex:
    """(1/L) sum a_l a_l^H of snapshots (L, N), scaled to trace N; the mean stays in."""
    n_snapshots, n_elements = snapshots.shape
    total = np.zeros((n_elements, n_elements), dtype=np.complex128)
    for a in snapshots:
        total += np.outer(a, a.conj())
    return normalize(total / n_snapshots)


def blend(predicted: Complex, measured: Complex, beta: float) -> Complex:
    """(1 - beta) R_pred + beta R_samp of trace-normalised matrices."""
    return (1 - beta) * normalize(predicted) + beta * normalize(measured)


def shrink(matrix: Complex, rho: float) -> Complex:
    """(1 - rho) R + rho tr(R)/N I."""
    n = len(matrix)
    return (1 - rho) * matrix + rho * np.trace(matrix).real / n * np.eye(n)


def nmse(estimate: Complex, truth: Complex) -> float:
    """||R^ - R||^2 / ||R||^2 of trace-normalised matrices."""
    estimate, truth = normalize(estimate), normalize(truth)
    return float(np.linalg.norm(estimate - truth) ** 2 / np.linalg.norm(truth) ** 2)


def signal_subspace(matrix: Complex, n_sources: int) -> Complex:
    """Eigenvectors (N, K) of the K largest eigenvalues."""
    _, vectors = np.linalg.eigh(matrix)
    return vectors[:, len(matrix) - n_sources :][:, ::-1]
