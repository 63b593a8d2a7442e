"""Least squares, likelihoods and Fisher information of one scene, written out with dense matrices.

A scene is y (L, M), H (M, N), codes (L, N); ``steer`` maps coordinates (azimuth, elevation,
inverse range) to a steering vector (N,). ``constant`` says that a source keeps its amplitude.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Complex = NDArray[np.complex128]
Real = NDArray[np.float64]
Steer = Callable[[Real], Complex]


def signals(coordinates: Real, H: Complex, codes: Complex, steer: Steer) -> list[Complex]:
    """For each snapshot the signals (M, K) of unit sources."""
    return [
        np.stack([H @ (code * steer(point)) for point in coordinates], axis=1) for code in codes
    ]


def residual_energy(
    coordinates: Real, y: Complex, H: Complex, codes: Complex, steer: Steer, *, constant: bool
) -> float:
    """Energy that least-squares amplitudes leave."""
    G = signals(coordinates, H, codes, steer)
    if constant:
        G, y = [np.concatenate(G)], y.reshape(1, -1)
    total = 0.0
    for A, row in zip(G, y, strict=True):
        amplitude, *_ = np.linalg.lstsq(A, row, rcond=None)
        total += float(np.sum(np.abs(row - A @ amplitude) ** 2))
    return total


def greedy_pursuit(
    grid: Real,
    n_picks: int,
    y: Complex,
    H: Complex,
    codes: Complex,
    steer: Steer,
    *,
    constant: bool,
) -> tuple[list[int], list[float]]:
    """Points (P, 3) of a grid picked one after the other, and the energy left after each.

    A pick has the largest sum, over the snapshots, of squared correlations of its unit signal with
    what least-squares amplitudes of those before leave.
    """
    G = signals(grid, H, codes, steer)
    if constant:
        G, y = [np.concatenate(G)], y.reshape(1, -1)
    picked: list[int] = []
    energies = []
    residual = [row.copy() for row in y]
    for _ in range(n_picks):
        gain = np.zeros(len(grid))
        for A, r in zip(G, residual, strict=True):
            gain += np.abs(A.conj().T @ r) ** 2 / np.sum(np.abs(A) ** 2, axis=0)
        picked.append(int(gain.argmax()))
        for group, (A, row) in enumerate(zip(G, y, strict=True)):
            amplitude, *_ = np.linalg.lstsq(A[:, picked], row, rcond=None)
            residual[group] = row - A[:, picked] @ amplitude
        energies.append(sum(float(np.vdot(r, r).real) for r in residual))
    return picked, energies


def deterministic_information(
    coordinates: Real,
    amplitude: Complex,  # (L, K), or (1, K) for constant sources
    noise_power: float,
    H: Complex,
    codes: Complex,
    steer: Steer,
    *,
    constant: bool,
) -> Real:
    """Fisher information of all real parameters, by central differences of the mean.

    Coordinates by source, then real and imaginary parts of every amplitude:
    ``F = (2 / sigma^2) Re(J^H J)``.
    """
    shape = amplitude.shape

    def mean(parameters: Real) -> Complex:
        n = coordinates.size
        points = parameters[:n].reshape(coordinates.shape)
        re, im = parameters[n:].reshape(2, *shape)
        b = re + 1j * im
        G = signals(points, H, codes, steer)
        return np.concatenate([A @ b[0 if constant else i] for i, A in enumerate(G)])

    start = np.concatenate([coordinates.ravel(), amplitude.real.ravel(), amplitude.imag.ravel()])
    J = np.stack([_slope(mean, start, i) for i in range(start.size)], axis=1)
    return 2.0 / noise_power * (J.conj().T @ J).real


def stochastic_covariances(
    coordinates: Real,
    power: Real,
    noise_power: float,
    H: Complex,
    codes: Complex,
    steer: Steer,
    *,
    constant: bool,
) -> list[Complex]:
    """Covariance matrices of the independent groups of observations."""
    G = signals(coordinates, H, codes, steer)
    if constant:
        G = [np.concatenate(G)]
    return [(A * power) @ A.conj().T + noise_power * np.eye(len(A)) for A in G]


def stochastic_information(
    coordinates: Real,
    power: Real,
    noise_power: float,
    H: Complex,
    codes: Complex,
    steer: Steer,
    *,
    constant: bool,
) -> Real:
    """Slepian-Bangs with covariances differentiated by central differences.

    Coordinates by source, then powers, then the noise power.
    """
    n = coordinates.size

    def stacked(parameters: Real) -> Complex:
        points = parameters[:n].reshape(coordinates.shape)
        return np.stack(
            stochastic_covariances(
                points, parameters[n:-1], parameters[-1], H, codes, steer, constant=constant
            )
        )

    start = np.concatenate([coordinates.ravel(), power, [noise_power]])
    inverse = [np.linalg.inv(C) for C in stacked(start)]
    slopes = [_slope(stacked, start, i) for i in range(start.size)]
    F = np.zeros((start.size, start.size))
    for i, di in enumerate(slopes):
        for j, dj in enumerate(slopes):
            F[i, j] = sum(
                np.trace(Ci @ a @ Ci @ b).real for Ci, a, b in zip(inverse, di, dj, strict=True)
            )
    return F


def stochastic_deviance(y: Complex, covariances: list[Complex], *, constant: bool) -> float:
    """Twice the negative log-likelihood without its term in pi."""
    rows = y.reshape(1, -1) if constant else y
    return 2.0 * sum(
        float(np.linalg.slogdet(C)[1] + (row.conj() @ np.linalg.solve(C, row)).real)
        for C, row in zip(covariances, rows, strict=True)
    )


def bound(information: Real, coordinates: Real) -> list[Real]:
    """Per source the 3 x 3 bound on azimuth, elevation and range from the whole information."""
    covariance = np.linalg.inv(information)
    blocks = []
    for k, point in enumerate(coordinates):
        turn = np.diag([1.0, 1.0, -1.0 / point[2] ** 2])  # dr = -r^2 dq
        block = covariance[3 * k : 3 * k + 3, 3 * k : 3 * k + 3]
        blocks.append(turn @ block @ turn)
    return blocks


def _slope(function: Callable[[Real], Complex], start: Real, index: int) -> Complex:
    step = 1e-6 * max(1.0, abs(start[index]))
    up, down = start.copy(), start.copy()
    up[index] += step
    down[index] -= step
    slope: Complex = (function(up) - function(down)) / (2.0 * step)
    return slope
