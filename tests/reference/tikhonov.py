"""Ridge regression, one snapshot at a time, in complex128."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Complex = NDArray[np.complex128]


def solve(y: Complex, H: Complex, codes: Complex, regularization: float) -> Complex:
    """Ridge solutions (L, N) of one scene: y (L, M), H (M, N), codes (L, N).

    Normal equations by np.linalg.solve; the pseudo-inverse where the loading is zero.
    """
    y, H, codes = (np.asarray(v, dtype=np.complex128) for v in (y, H, codes))
    n_snapshots, n_elements = codes.shape
    a = np.zeros((n_snapshots, n_elements), dtype=np.complex128)
    for snapshot in range(n_snapshots):
        phi = H @ np.diag(codes[snapshot])
        gram = phi.conj().T @ phi
        alpha = regularization * np.trace(gram).real / n_elements
        if alpha > 0:
            a[snapshot] = np.linalg.solve(
                gram + alpha * np.eye(n_elements), phi.conj().T @ y[snapshot]
            )
        else:
            a[snapshot] = np.linalg.pinv(phi) @ y[snapshot]
    return a


def solve_batch(y: Complex, H: Complex, codes: Complex, regularization: float) -> Complex:
    """The same for a batch (B, ...)."""
    return np.stack([solve(*scene, regularization) for scene in zip(y, H, codes, strict=True)])
