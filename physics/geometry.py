"""The planar surface and the spherical coordinates around it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from pydantic import Field
from torch import Tensor

from physics.config import FrozenModel


class ArrayConfig(FrozenModel):
    """Geometry of the reconfigurable surface; lengths in metres."""

    n_horizontal: int = Field(12, ge=1, description="elements along x")
    n_vertical: int = Field(12, ge=1, description="elements along y")
    spacing: float = Field(0.15, gt=0, description="element spacing [m]")
    wavelength: float = Field(0.3, gt=0, description="carrier wavelength [m]")
    offset: tuple[float, float] = Field(
        (0.0, 0.0), description="centre of the elements relative to the origin (x, y) [m]"
    )

    def build(self) -> PlanarArray:
        """Return the array that this section describes."""
        return PlanarArray(
            n_horizontal=self.n_horizontal,
            n_vertical=self.n_vertical,
            spacing=self.spacing,
            wavelength=self.wavelength,
            offset=self.offset,
        )


@dataclass(frozen=True)
class PlanarArray:
    """Uniform planar array in the x-y plane, boresight along z.

    Elements are centred on ``offset`` and numbered with the horizontal index fastest:
    element ``n = v * n_horizontal + h``.

    Args:
        n_horizontal: elements along x.
        n_vertical: elements along y.
        spacing: distance between neighbouring elements [m].
        wavelength: carrier wavelength [m].
        offset: centre of the element grid (x, y) [m]; (0, 0) puts it on the origin.
    """

    n_horizontal: int = 12
    n_vertical: int = 12
    spacing: float = 0.15
    wavelength: float = 0.3
    offset: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "offset", tuple(self.offset))  # a list has no hash
        if self.n_horizontal < 1 or self.n_vertical < 1:
            raise ValueError(
                f"array has {self.n_horizontal} x {self.n_vertical} elements; at least 1 x 1 needed"
            )
        if not (self.spacing > 0 and self.wavelength > 0):
            raise ValueError(
                f"spacing {self.spacing} m and wavelength {self.wavelength} m must be positive"
            )

    @property
    def size(self) -> int:
        """Number of elements N."""
        return self.n_horizontal * self.n_vertical

    @property
    def wavenumber(self) -> float:
        """k = 2 pi / wavelength [rad/m]."""
        return 2.0 * torch.pi / self.wavelength

    @cached_property
    @torch.inference_mode(False)  # cached: later calls may differentiate through it
    def elements(self) -> Tensor:
        """Element positions (N, 3), float64 [m]."""
        x = (
            torch.arange(self.n_horizontal, dtype=torch.float64) - (self.n_horizontal - 1) / 2
        ) * self.spacing + self.offset[0]
        y = (
            torch.arange(self.n_vertical, dtype=torch.float64) - (self.n_vertical - 1) / 2
        ) * self.spacing + self.offset[1]
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        return torch.stack(
            [grid_x.reshape(-1), grid_y.reshape(-1), torch.zeros(self.size, dtype=torch.float64)],
            dim=-1,
        )


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # cached, as the elements are
def elements_on(array: PlanarArray, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Element positions (N, 3) [m] of an array, moved to a device once per process."""
    return array.elements.to(device=device, dtype=dtype)


def direction(azimuth: Tensor, elevation: Tensor) -> Tensor:
    """Unit vectors (…, 3) towards azimuth and elevation [rad].

    ``u = (cos(el) sin(az), sin(el), cos(el) cos(az))``.
    """
    cos_elevation = torch.cos(elevation)
    return torch.stack(
        [
            cos_elevation * torch.sin(azimuth),
            torch.sin(elevation),
            cos_elevation * torch.cos(azimuth),
        ],
        dim=-1,
    )


def to_cartesian(position: Tensor) -> Tensor:
    """Cartesian points (…, 3) [m] of positions (…, 3) = azimuth, elevation [rad], range [m]."""
    return position[..., 2:] * direction(position[..., 0], position[..., 1])


def from_cartesian(point: Tensor) -> Tensor:
    """Positions (…, 3) = azimuth, elevation [rad], range [m] of cartesian points (…, 3) [m]."""
    range_ = torch.linalg.vector_norm(point, dim=-1)
    azimuth = torch.atan2(point[..., 0], point[..., 2])
    elevation = torch.atan2(point[..., 1], torch.hypot(point[..., 0], point[..., 2]))
    return torch.stack([azimuth, elevation, range_], dim=-1)
