"""Assignments by trying all of them, one scene at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Real = NDArray[np.float64]


def pairings(n_true: int, n_found: int) -> Iterator[list[tuple[int, int]]]:
    """Every one-to-one set of pairs (true, found), the empty one too."""
    for n_pairs in range(min(n_true, n_found) + 1):
        for rows in itertools.combinations(range(n_true), n_pairs):
            for columns in itertools.permutations(range(n_found), n_pairs):
                yield list(zip(rows, columns, strict=True))


def differences(found: Real, true: Real) -> tuple[float, float, float]:
    """|azimuth|, |elevation|, |range|, the azimuth on the circle."""
    azimuth = abs(math.remainder(found[0] - true[0], 2 * math.pi))
    return azimuth, abs(found[1] - true[1]), abs(found[2] - true[2])


def best_matching(found: Real, true: Real, limits: Real) -> tuple[int, float]:
    """Most pairs within the limits, and the smallest sum of normalised distances with so many."""
    best = (0, 0.0)
    for pairs in pairings(len(true), len(found)):
        apart = [np.array(differences(found[j], true[i])) for i, j in pairs]
        if all((d <= limits).all() for d in apart):
            total = sum(float(np.linalg.norm(d / limits)) for d in apart)
            best = max(best, (len(pairs), -total))
    return best[0], -best[1]


def point(position: Real) -> Real:
    azimuth, elevation, r = position
    return r * np.array(
        [
            math.cos(elevation) * math.sin(azimuth),
            math.sin(elevation),
            math.cos(elevation) * math.cos(azimuth),
        ]
    )


def gospa(found: Real, true: Real, c: float, p: float) -> float:
    """Eq. (1) of Rahmathullah et al. (2017) with alpha = 2: permutations of the larger set."""
    few, many = sorted(([point(x) for x in found], [point(x) for x in true]), key=len)
    sums = [
        sum(
            min(float(np.linalg.norm(x - many[j])), c) ** p for x, j in zip(few, order, strict=True)
        )
        for order in itertools.permutations(range(len(many)), len(few))
    ]
    return (min(sums) + c**p / 2 * (len(many) - len(few))) ** (1 / p)


def gospa_parts(found: Real, true: Real, c: float, p: float) -> tuple[float, float, float]:
    """Localisation, missed and false of the least cost over all pairings (Proposition 1)."""
    costs = []
    for pairs in pairings(len(true), len(found)):
        localisation = sum(
            float(np.linalg.norm(point(true[i]) - point(found[j]))) ** p for i, j in pairs
        )
        missed = c**p / 2 * (len(true) - len(pairs))
        false = c**p / 2 * (len(found) - len(pairs))
        costs.append((localisation, missed, false))
    return min(costs, key=sum)
