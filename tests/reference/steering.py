"""Steering vectors by the exact distance, element by element, in float64."""

from __future__ import annotations

import cmath
import math

import numpy as np
from numpy.typing import NDArray

Complex = NDArray[np.complex128]


def elements(
    n_horizontal: int, n_vertical: int, spacing: float, offset: tuple[float, float] = (0.0, 0.0)
) -> list[tuple[float, float, float]]:
    """Element positions [m], horizontal index fastest, centred on the offset."""
    points = []
    for v in range(n_vertical):
        for h in range(n_horizontal):
            x = (h - (n_horizontal - 1) / 2) * spacing + offset[0]
            y = (v - (n_vertical - 1) / 2) * spacing + offset[1]
            points.append((x, y, 0.0))
    return points


def cartesian(azimuth: float, elevation: float, range_m: float) -> tuple[float, float, float]:
    """p = r (cos(el) sin(az), sin(el), cos(el) cos(az))."""
    return (
        range_m * math.cos(elevation) * math.sin(azimuth),
        range_m * math.sin(elevation),
        range_m * math.cos(elevation) * math.cos(azimuth),
    )


def path_difference(
    azimuth: float, elevation: float, range_m: float, element: tuple[float, float, float]
) -> float:
    """Distance from the source to the element, less the distance to the origin [m]."""
    if math.isinf(range_m):
        u = cartesian(azimuth, elevation, 1.0)
        return -sum(a * b for a, b in zip(u, element, strict=True))
    return math.dist(cartesian(azimuth, elevation, range_m), element) - range_m


def steering_vector(
    azimuth: float,
    elevation: float,
    range_m: float,
    points: list[tuple[float, float, float]],
    wavelength: float,
) -> Complex:
    """a_n = exp(-j k (|p - p_n| - r)) / sqrt(N) from the exact distance."""
    k = 2 * math.pi / wavelength
    return np.array(
        [
            cmath.exp(-1j * k * path_difference(azimuth, elevation, range_m, point))
            / math.sqrt(len(points))
            for point in points
        ]
    )
