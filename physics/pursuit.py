"""The search of matching pursuit: a measurement at a moderate scale, and the search grid."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from physics.checks import check_finite, check_measurement
from physics.config import FrozenModel
from physics.detections import Detections
from physics.fit import Fit, Measurement, position_of, refine
from physics.geometry import PlanarArray
from physics.order import (
    Criterion,
    conditional_deviance,
    marginal_deviance,
    parameters_per_source,
    penalty,
)
from physics.scaling import divide, divisor, peak, power
from physics.scene import SceneConfig, SourceMode
from physics.spectrum import PolarGrid

_CHUNK = 64  # maximum number of scenes processed at a time
_BYTES = 2**28  # maximum memory of their candidates' signals


class PursuitConfig(FrozenModel):
    """How matching pursuit picks and refines."""

    criterion: Criterion = Field(
        "bic", description="information criterion that chooses the number of sources"
    )
    oversampling: float = Field(2.0, gt=0, description="grid points per beam width")
    candidates: int = Field(128, ge=1, description="grid points whose gain is computed exactly")
    new_iterations: int = Field(3, ge=0, description="steps that refine a new source alone")
    joint_iterations: int = Field(
        5, ge=0, description="steps that refine all sources after each pick"
    )


def pursuit_grid(scene: SceneConfig, array: PlanarArray, oversampling: float = 2.0) -> PolarGrid:
    """Grid over a field of view, with a spacing that follows the width of the array's beams.

    A beam is ``lambda / D`` wide in the sine of an angle, and ``2 lambda / rho^2`` deep in inverse
    range, where D is the aperture along the axis and rho the distance of the outermost element.
    This is a phase of 2 pi across the array.
    """
    wide, high = (
        array.spacing * n / array.wavelength for n in (array.n_horizontal, array.n_vertical)
    )
    rho2 = float(array.elements.square().sum(-1).max())

    def sines(bounds_deg: tuple[float, float]) -> float:
        low, top = (math.sin(math.radians(b)) for b in bounds_deg)
        return top - low

    depth = (1.0 / scene.range_m[0] - 1.0 / scene.range_m[1]) * rho2 / (2.0 * array.wavelength)
    widths = (sines(scene.azimuth_deg) * wide, sines(scene.elevation_deg) * high, depth)
    counts = [1 + math.ceil(oversampling * width) for width in widths]
    if scene.wavefront == "planar":
        counts[2] = 1  # a plane wave has no range
    return PolarGrid.covering(scene, *counts)


def resolvable_sources(source_mode: SourceMode, n_snapshots: int, n_antennas: int) -> int:
    """The largest number of sources that a measurement can resolve.

    It requires fewer real parameters than real observations, with one amplitude per source
    (constant) or per source and snapshot (fluctuating), and in the latter case fewer sources than
    antennas.
    """
    fluctuating = source_mode == "fluctuating"
    fitted = 3 + 2 * (n_snapshots if fluctuating else 1)
    most = (2 * n_snapshots * n_antennas - 1) // fitted
    return min(most, n_antennas - 1) if fluctuating else most


class Search:
    """One call of an estimator: the measurement at a moderate scale, and the grid.

    Arguments and errors are those of :func:`physics.nomp.nomp`.
    """

    def __init__(
        self,
        array: PlanarArray,
        scene: SceneConfig,
        config: PursuitConfig,
        y: Tensor,
        H: Tensor,
        codes: Tensor,
    ) -> None:
        check_measurement(y, H, codes)
        batch = torch.broadcast_shapes(y.shape[:-2], H.shape[:-2], codes.shape[:-2])
        if len(batch) != 1 or H.shape[-1] != array.size:
            raise ValueError(
                f"y has shape {tuple(y.shape)}, H {tuple(H.shape)} and codes {tuple(codes.shape)}; "
                f"expected a batch (B, L, M), (B, M, {array.size}), (B, L, {array.size}) of scenes"
                f" of a {array.n_horizontal} x {array.n_vertical} array"
            )
        self.array, self.scene, self.config = array, scene, config
        self.y, self.H, self.codes = (t.expand(*batch, *t.shape[-2:]) for t in (y, H, codes))
        self.real, self.device = y.dtype.to_real(), y.device
        self.fluctuating = scene.source_mode == "fluctuating"
        # Only ratios of the scales matter; products of them could over- or underflow.
        self.scales = [divisor(peak(t)) for t in (self.y, self.H, self.codes)]
        grid = pursuit_grid(scene, array, config.oversampling)
        self.points = position_of(grid.positions(device=y.device, dtype=self.real).reshape(-1, 3))
        self.steering = grid.steering(array, scene.wavefront, device=y.device, dtype=y.dtype)
        self.bounds = torch.stack([self.points.amin(0), self.points.amax(0)])
        self.n_snapshots, n_antennas = y.shape[-2:]
        self.n_rows = self.n_snapshots * n_antennas
        self.resolvable = resolvable_sources(scene.source_mode, self.n_snapshots, n_antennas)
        self.max_sources = min(scene.max_sources, self.resolvable)
        # Penalty of one source on the scale of the deviance.
        self.price = parameters_per_source(scene.source_mode, scene.wavefront) * penalty(
            config.criterion, self.n_rows, self.n_snapshots
        )

    def chunks(
        self, snr_db: float | Tensor | None, initial: Detections | None
    ) -> Iterator[tuple[slice, Measurement, Tensor | None]]:
        """Yield scenes in chunks of bounded size, with their noise where it is known."""
        n_scenes = len(self.y)
        if initial is not None and len(initial) != n_scenes:
            raise ValueError(f"initial holds {len(initial)} scenes and y {n_scenes}")
        if initial is not None:
            here = torch.where(initial.present.unsqueeze(-1), initial.position, 0.0)
            check_finite("initial.position", here)
        level = None if snr_db is None else self._level(snr_db)
        each = self.config.candidates * self.n_rows * self.y.element_size()
        chunk = max(1, min(_CHUNK, _BYTES // each))
        for start in range(0, n_scenes, chunk):
            index = slice(start, start + chunk)
            y, H, codes = (
                divide(t[index], s[index, None, None])
                for t, s in zip((self.y, self.H, self.codes), self.scales, strict=True)
            )
            scene = self.scene
            measurement = Measurement.of(
                y, H, codes, self.array, scene.wavefront, scene.source_mode
            )
            noise = None
            if level is not None:
                noise = measurement.energy / measurement.n_rows / (1.0 + level[index])
            yield index, measurement, noise

    def _level(self, snr_db: float | Tensor) -> Tensor:
        level = torch.as_tensor(snr_db, dtype=self.real, device=self.device)
        if level.ndim > 1 or (level.ndim == 1 and len(level) != len(self.y)):
            raise ValueError(
                f"snr_db has shape {tuple(level.shape)}; expected a number or ({len(self.y)},)"
            )
        if bool(torch.isnan(level).any()):
            raise ValueError(
                "snr_db holds NaN; expected a level in dB for every scene, or None for none"
            )
        return (10.0 ** (level / 10.0)).expand(len(self.y))

    def grow(
        self,
        measurement: Measurement,
        coordinates: Tensor,
        residual: Tensor,
        start: Detections | None = None,
    ) -> tuple[Fit, Tensor]:
        """Fit one more source: pick it from the residual, refine it alone, then refine all.

        Args:
            measurement: B scenes.
            coordinates: (B, K, 3) of the sources so far.
            residual: (B, G, R) that they leave.
            start: (B, 1) positions used instead of a grid point in the scenes that have one.

        Returns:
            the fit of K + 1 sources and its Gauss-Newton matrix (B, 3 K + 3, 3 K + 3).
        """
        new = self.pick(measurement, residual)
        if start is not None:
            given = position_of(start.position.to(self.bounds))
            new = torch.where(start.present.unsqueeze(-1), given, new)
        alone = replace(measurement, y=residual)
        fit, _ = refine(alone, new, self.bounds, self.config.new_iterations)
        coordinates = torch.cat([coordinates, fit.coordinates], dim=1)
        return refine(measurement, coordinates, self.bounds, self.config.joint_iterations)

    def deviance(self, measurement: Measurement, fit: Fit, noise: Tensor | None) -> Tensor:
        """Twice the negative log-likelihood (B,) that ranks fits of this source mode."""
        if self.fluctuating:
            return marginal_deviance(measurement, fit, noise)
        return conditional_deviance(measurement, fit.cost, noise)

    def pick(self, measurement: Measurement, residual: Tensor) -> Tensor:
        """The grid point (B, 1, 3), of the most likely ones, whose source lowers the energy most.

        The exact gain needs the norm of every point's signal, which differs between scenes. It is
        computed only for the points with the largest numerator: with fluctuating symbols and few
        such points, the best point overall may not be among them.
        """
        back = measurement.back_projected(residual)  # (B, G, N)
        score = power(back.flatten(0, 1) @ self.steering.mH).unflatten(0, back.shape[:2]).sum(1)
        n_candidates = min(self.config.candidates, len(self.points))
        index = score.topk(n_candidates, dim=-1).indices  # (B, P)
        signals = measurement.rows(self.steering[index])  # (B, G, P, R)
        norm = power(signals).sum(-1)
        seen = power((signals.conj() @ residual.unsqueeze(-1)).squeeze(-1))
        gain = (seen / norm.clamp_min(torch.finfo(norm.dtype).tiny)).sum(1)
        best = index.gather(1, gain.argmax(-1, keepdim=True))
        return self.points[best]
