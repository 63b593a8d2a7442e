"""Rician channel between the surface and the base station."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from physics.geometry import PlanarArray
from physics.steering import steering_vector


def complex_normal(
    shape: tuple[int, ...],
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.complex64,
) -> Tensor:
    """Circular complex normal draws of unit variance."""
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def rician_channel(
    n_antennas: int,
    array: PlanarArray,
    *,
    k_factor_db: float = 3.0,
    base_station: Tensor,
    batch: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.complex64,
) -> Tensor:
    """Rician channel H with unit mean power per entry.

    ``H = sqrt(kappa/(kappa+1)) H_los + sqrt(1/(kappa+1)) H_nlos``. The line-of-sight part is the
    outer product of a half-wavelength uniform linear array at the base station, seen from an
    angle drawn uniformly in sine, and the surface's spherical steering vector towards the base
    station, with a uniform phase; the non-line-of-sight part is circular Gaussian.

    Args:
        n_antennas: M.
        array: the surface, N elements.
        k_factor_db: Rice factor kappa [dB].
        base_station: (*batch, 3) azimuth [rad], elevation [rad], range [m] seen by the surface.
        batch: leading shape.
        generator: random generator on the device of ``base_station``.

    Returns:
        (*batch, M, N) complex.

    Source: Goldsmith, "Wireless Communications", 2005, section 3.2 (Rice factor).
    """
    device = base_station.device
    real = dtype.to_real()
    kappa = 10.0 ** (k_factor_db / 10.0)
    draws = torch.rand((*batch, 2), generator=generator, device=device, dtype=real)
    sine, phase = 2.0 * draws[..., :1] - 1.0, 2.0 * math.pi * draws[..., 1:]
    antenna = torch.arange(n_antennas, device=device, dtype=real)
    response = torch.polar(torch.ones_like(phase * antenna), math.pi * sine * antenna + phase)
    surface = steering_vector(base_station.to(real), array) * math.sqrt(array.size)
    line_of_sight = response.unsqueeze(-1) * surface.unsqueeze(-2)
    scattered = complex_normal(
        (*batch, n_antennas, array.size), generator=generator, device=device, dtype=dtype
    )
    return (
        math.sqrt(kappa / (kappa + 1.0)) * line_of_sight
        + math.sqrt(1.0 / (kappa + 1.0)) * scattered
    )
