"""MUSIC and MVDR spectra over azimuth x elevation x inverse range, and their peaks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from physics.checks import check_finite
from physics.covariance import LowRankCovariance
from physics.geometry import PlanarArray
from physics.precision import in_full_precision
from physics.scene import SceneConfig
from physics.search import check_loading, music_form, mvdr_form
from physics.steering import Wavefront, steering_vector

_STEERING_ROWS = 8192  # grid points whose steering vectors are computed at once


@dataclass(frozen=True)
class PolarGrid:
    """Regular grid in azimuth [rad], elevation [rad] and inverse range [1/m].

    Inverse range is the coordinate in which near-field beams have even width; 0 is infinity.
    An axis of identical points is reduced to one: each copy of a plane would hold every peak.
    """

    azimuth: tuple[float, ...]
    elevation: tuple[float, ...]
    inverse_range: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.azimuth or not self.elevation or not self.inverse_range:
            raise ValueError(f"grid has shape {self.shape}; every axis needs at least one point")
        if min(self.inverse_range) < 0:
            raise ValueError(
                f"inverse range starts at {min(self.inverse_range)} 1/m; it must be at least 0"
            )
        for name in ("azimuth", "elevation", "inverse_range"):
            points = getattr(self, name)
            if min(points) == max(points):
                object.__setattr__(self, name, points[:1])

    @classmethod
    def covering(
        cls, scene: SceneConfig, n_azimuth: int = 61, n_elevation: int = 31, n_range: int = 8
    ) -> PolarGrid:
        """Grid with the given counts over the field of view of a scene configuration.

        A direction or range that is fixed there gets one point, whatever the given count.
        """

        def axis(bounds: tuple[float, float], count: int) -> tuple[float, ...]:
            low, high = bounds
            if count == 1:
                return ((low + high) / 2,)
            return tuple(torch.linspace(low, high, count, dtype=torch.float64).tolist())

        def in_radians(bounds_deg: tuple[float, float]) -> tuple[float, float]:
            return math.radians(bounds_deg[0]), math.radians(bounds_deg[1])

        return cls(
            axis(in_radians(scene.azimuth_deg), n_azimuth),
            axis(in_radians(scene.elevation_deg), n_elevation),
            axis((1.0 / scene.range_m[1], 1.0 / scene.range_m[0]), n_range),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Counts along azimuth, elevation and inverse range."""
        return len(self.azimuth), len(self.elevation), len(self.inverse_range)

    def positions(
        self, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """(A, E, Q, 3) azimuth, elevation [rad], range [m]."""
        axes = (
            torch.tensor(values, dtype=torch.float64)
            for values in (self.azimuth, self.elevation, self.inverse_range)
        )
        azimuth, elevation, inverse_range = torch.meshgrid(*axes, indexing="ij")
        points = torch.stack([azimuth, elevation, inverse_range.reciprocal()], dim=-1)
        return points.to(device=device, dtype=dtype)

    def shares(self) -> Tensor:
        """Fraction (A, E, Q) of the field spanned by the grid that is nearest to each point.

        It is measured in azimuth, elevation and range, not in inverse range: the probability that a
        uniformly placed source lies in the cell around the point. Float64; the grid must not reach
        infinity.
        """
        azimuth, elevation = (_parts(values) for values in (self.azimuth, self.elevation))
        distance = _parts(self.inverse_range, inverse=True)
        return azimuth[:, None, None] * elevation[:, None] * distance

    def steering(
        self,
        array: PlanarArray,
        wavefront: Wavefront = "spherical",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.complex64,
    ) -> Tensor:
        """Steering vectors (A E Q, N) of all grid points."""
        return _grid_steering(self, array, wavefront, torch.device(device or "cpu"), dtype)


def _parts(values: tuple[float, ...], *, inverse: bool = False) -> Tensor:
    """Fraction of an axis nearest to each of its points, measured in the inverse on request."""
    if len(values) == 1:
        return torch.ones(1, dtype=torch.float64)
    points = torch.tensor(values, dtype=torch.float64)
    edges = torch.cat([points[:1], (points[1:] + points[:-1]) / 2.0, points[-1:]])
    widths = (edges.reciprocal() if inverse else edges).diff().abs()
    return widths / widths.sum()


@lru_cache(maxsize=4)
@torch.inference_mode(False)  # cached: later calls may differentiate through it
def _grid_steering(
    grid: PolarGrid,
    array: PlanarArray,
    wavefront: Wavefront,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    positions = grid.positions(device=device, dtype=dtype.to_real()).reshape(-1, 3)
    # In blocks: the path lengths of all points would take several times the result's memory.
    steering = torch.empty((len(positions), array.size), dtype=dtype, device=device)
    blocks = zip(positions.split(_STEERING_ROWS), steering.split(_STEERING_ROWS), strict=True)
    for points, rows in blocks:
        rows.copy_(steering_vector(points, array, wavefront))
    return steering


@in_full_precision
def music_spectrum(
    covariance: LowRankCovariance,
    grid: PolarGrid,
    n_sources: int | Tensor,
    array: PlanarArray,
    wavefront: Wavefront = "spherical",
) -> Tensor:
    """MUSIC pseudo-spectrum ``1 / ||U_n^H a(p)||^2`` in factored form.

    ``||U_n^H a||^2 = 1 - ||U_K^H a||^2``, floored at the rounding of the dtype. Where no gradient
    is needed, only the K columns of U_K are projected on the grid.

    Args:
        covariance: R (…), size N.
        grid: A x E x Q points.
        n_sources: K, one for all or (…); 0 gives a flat spectrum of ones.
        array: the surface, N elements.
        wavefront: model of the steering vectors.

    Returns:
        (…, A, E, Q) real, at least 1.

    Raises:
        ValueError: a non-finite covariance or a size that is not the array's.

    Source: Schmidt, "Multiple emitter location and signal parameter estimation", IEEE Trans.
    Antennas Propag. 34(3), 1986, eq. (6).
    """
    check_covariance(covariance, array)
    a = grid.steering(array, wavefront, device=covariance.device, dtype=covariance.dtype)
    if not _wants_gradient(covariance):
        form = music_form(covariance, n_sources)
        return form.height(form.energy(a), in_place=True).unflatten(-1, grid.shape)
    energy = covariance.subspace_energy(a, n_sources)
    floor = torch.finfo(energy.dtype).eps * 8
    return (1.0 - energy).clamp(floor, 1.0).reciprocal().unflatten(-1, grid.shape)


@in_full_precision
def mvdr_spectrum(
    covariance: LowRankCovariance,
    grid: PolarGrid,
    array: PlanarArray,
    wavefront: Wavefront = "spherical",
    loading: float = 1e-2,
) -> Tensor:
    """MVDR (Capon) spectrum ``1 / (a^H R^-1 a)`` in factored form.

    Args:
        covariance: R (…), size N.
        grid: A x E x Q points.
        array: the surface, N elements.
        wavefront: model of the steering vectors.
        loading: diagonal loading relative to tr(R)/N, added to R; above 0.

    Returns:
        (…, A, E, Q) real, positive: the power in the direction of a unit-norm steering vector.

    Raises:
        ValueError: loading not above 0, a non-finite covariance, or a wrong size.

    Source: Capon, "High-resolution frequency-wavenumber spectrum analysis", Proc. IEEE 57(8),
    1969; loading by Carlson, IEEE Trans. Aerosp. Electron. Syst. 24(4), 1988.
    """
    check_covariance(covariance, array)
    check_loading(loading)
    a = grid.steering(array, wavefront, device=covariance.device, dtype=covariance.dtype)
    if not _wants_gradient(covariance):
        form = mvdr_form(covariance, loading)
        return form.height(form.energy(a), in_place=True).unflatten(-1, grid.shape)
    loaded = covariance.normalized().loaded(loading)
    return loaded.inverse_quadratic(a).reciprocal().unflatten(-1, grid.shape)


def _wants_gradient(covariance: LowRankCovariance) -> bool:
    wanted = covariance.requires_grad or covariance.loading.requires_grad
    return wanted and torch.is_grad_enabled()


def check_covariance(covariance: LowRankCovariance, array: PlanarArray) -> None:
    """Raise ValueError for a covariance that is not finite or not of the array's size."""
    if covariance.size != array.size:
        raise ValueError(
            f"covariance is {covariance.size} x {covariance.size} but the array has "
            f"{array.size} elements ({array.n_horizontal} x {array.n_vertical})"
        )
    check_finite("covariance factor", covariance.factor)
    check_finite("covariance loading", covariance.loading)


def find_peaks(
    spectrum: Tensor, grid: PolarGrid, n_peaks: int, *, refine: bool = True
) -> tuple[Tensor, Tensor]:
    """The highest local maxima of a spectrum.

    A peak is at least as high as its up to 26 neighbours. With ``refine``, a parabola through the
    logarithms of the peak and its two neighbours moves it along each axis by at most half a cell.

    Args:
        spectrum: (…, A, E, Q) positive.
        grid: the grid of the spectrum.
        n_peaks: how many to return.
        refine: whether to interpolate between grid points.

    Returns:
        position (…, n_peaks, 3) azimuth, elevation [rad], range [m], highest first, and height
        (…, n_peaks). Where there are fewer peaks, height is 0 and the position NaN.

    Raises:
        ValueError: a spectrum that does not fit the grid, or is not finite; a negative count.
    """
    if n_peaks < 0:
        raise ValueError(f"n_peaks is {n_peaks}; at least 0 needed")
    if tuple(spectrum.shape[-3:]) != grid.shape:
        raise ValueError(
            f"spectrum has shape {tuple(spectrum.shape)}; expected (..., {grid.shape[0]}, "
            f"{grid.shape[1]}, {grid.shape[2]}) as the grid"
        )
    check_finite("spectrum", spectrum)
    batch = spectrum.shape[:-3]
    flat = spectrum.reshape(-1, *grid.shape)
    height = torch.where(flat == highest_around(flat.detach()), flat, 0.0).flatten(1)
    count = min(n_peaks, height.shape[-1])
    height, index = height.topk(count, dim=-1)
    cells = torch.stack(torch.unravel_index(index, grid.shape), dim=-1)  # (B, P, 3)
    position = torch.empty((*index.shape, 3), dtype=spectrum.dtype, device=spectrum.device)
    for axis, values in enumerate((grid.azimuth, grid.elevation, grid.inverse_range)):
        points = torch.tensor(values, dtype=spectrum.dtype, device=spectrum.device)
        cell = cells[..., axis]
        coordinate = points[cell]
        if refine and len(values) > 2:
            shift, step = _parabola(flat, cells, axis, points)
            coordinate = coordinate + shift * step
        position[..., axis] = coordinate.reciprocal() if axis == 2 else coordinate
    position = torch.where(height.unsqueeze(-1) > 0, position, torch.nan)
    missing = n_peaks - count
    if missing:
        position = torch.nn.functional.pad(position, (0, 0, 0, missing), value=torch.nan)
        height = torch.nn.functional.pad(height, (0, missing))
    return position.unflatten(0, batch) if batch else position.squeeze(0), (
        height.unflatten(0, batch) if batch else height.squeeze(0)
    )


def highest_around(values: Tensor, *, corners: bool = True) -> Tensor:
    """Largest value among each cell (B, A, E, Q) and its neighbours.

    A cell has up to 26 neighbours, or with ``corners=False`` up to 6 that share a face. Slices
    along each axis are many times as fast as max_pool3d on a CPU.
    """
    highest = values
    for axis in range(1, values.ndim):
        # Taking maxima of the previous axes' maxima includes the corner neighbours.
        source = highest if corners else values
        last = values.shape[axis] - 1
        highest = highest.clone()
        for here, there in ((0, 1), (1, 0)):
            side = highest.narrow(axis, here, last)
            torch.maximum(side, source.narrow(axis, there, last), out=side)
    return highest


def _parabola(
    spectrum: Tensor,  # (B, A, E, Q)
    cells: Tensor,  # (B, P, 3)
    axis: int,
    points: Tensor,
) -> tuple[Tensor, Tensor]:
    """Shift of each peak along one axis in cells, within +-1/2, and the size of a cell."""
    last = points.numel() - 1
    item = torch.arange(cells.shape[0], device=cells.device)[:, None]

    def at(step: int) -> Tensor:
        moved = cells.clone()
        moved[..., axis] = (moved[..., axis] + step).clamp(0, last)
        value = spectrum[item, moved[..., 0], moved[..., 1], moved[..., 2]]
        return value.clamp_min(torch.finfo(value.dtype).tiny).log()

    below, here, above = at(-1), at(0), at(1)
    curvature = 2.0 * here - below - above
    inner = (cells[..., axis] > 0) & (cells[..., axis] < last) & (curvature > 0)
    shift = torch.where(
        inner, 0.5 * (above - below) / curvature.where(inner, torch.ones_like(curvature)), 0.0
    )
    return shift.clamp(-0.5, 0.5), points[1] - points[0]
