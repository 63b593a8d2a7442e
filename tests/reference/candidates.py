"""What one source adds to a measurement, from dense covariances with it and without it."""

from __future__ import annotations

import numpy as np

from tests.reference.estimation import (
    Complex,
    Real,
    Steer,
    signals,
    stochastic_covariances,
    stochastic_deviance,
)

POWERS = np.geomspace(1 / 4, 4, 7)  # +-6 dB, even in decibels


def evidence(
    coordinates: Real,  # (P, 3)
    power: Real,  # (P,)
    index: int,
    noise_power: float,
    y: Complex,
    H: Complex,
    codes: Complex,
    steer: Steer,
    *,
    inverse_range: float | None = None,
    constant: bool,
) -> float:
    """Log of the mean likelihood with source ``index``, its power spread, over that without it.

    Where ``inverse_range`` is given the source stands there, in its own direction.
    """

    def log_likelihood(points: Real, powers: Real) -> float:
        C = stochastic_covariances(points, powers, noise_power, H, codes, steer, constant=constant)
        return -0.5 * stochastic_deviance(y, C, constant=constant)

    others = np.delete(coordinates, index, axis=0).reshape(-1, 3)
    their_power = np.delete(power, index)
    point = coordinates[index].copy()
    if inverse_range is not None:
        point[2] = inverse_range
    points = np.concatenate([others, point[None]])
    with_it = [
        log_likelihood(points, np.append(their_power, factor * power[index])) for factor in POWERS
    ]
    if len(others):
        without = log_likelihood(others, their_power)
    else:  # noise alone
        n = y.size
        without = -float(n * np.log(noise_power) + np.sum(np.abs(y) ** 2) / noise_power)
    ratios = np.array(with_it) - without
    return float(np.log(np.mean(np.exp(ratios - ratios.max()))) + ratios.max())


def received(
    coordinates: Real,
    power: Real,
    index: int,
    noise_power: float,
    H: Complex,
    codes: Complex,
    steer: Steer,
    *,
    constant: bool,
) -> float:
    """Mean of ``p g^H C^-1 g`` over the groups, C without source ``index``."""
    G = signals(coordinates, H, codes, steer)
    if constant:
        G = [np.concatenate(G)]
    values = []
    for A in G:
        others = np.delete(A, index, axis=1)
        C = (others * np.delete(power, index)) @ others.conj().T + noise_power * np.eye(len(A))
        g = A[:, index]
        values.append(power[index] * (g.conj() @ np.linalg.solve(C, g)).real)
    return float(np.mean(values))
