"""Newtonised orthogonal matching pursuit over azimuth, elevation and inverse range."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from physics.checks import check_finite, check_measurement
from physics.config import FrozenModel
from physics.detections import Detections
from physics.fit import Measurement, position_blocks, position_of, refine
from physics.geometry import PlanarArray
from physics.order import (
    Criterion,
    conditional_deviance,
    marginal_deviance,
    parameters_per_source,
    penalty,
)
from physics.precision import in_full_precision
from physics.scaling import divide, divisor, peak, power
from physics.scene import SceneConfig
from physics.spectrum import PolarGrid

_CHUNK = 64  # scenes at a time; their response matrices take some 20 MB


class NompConfig(FrozenModel):
    """How matching pursuit searches."""

    criterion: Criterion = Field("bic", description="that chooses the number of sources")
    oversampling: float = Field(2.0, gt=0, description="grid points per width of a beam")
    candidates: int = Field(32, ge=1, description="grid points whose gain is computed exactly")
    new_iterations: int = Field(3, ge=0, description="steps that refine a new source alone")
    joint_iterations: int = Field(5, ge=0, description="steps that refine all after each pick")
    final_iterations: int = Field(10, ge=0, description="steps that refine those that are kept")
    patience: int = Field(1, ge=1, description="picks in a row without a gain that end the pursuit")


@dataclass(frozen=True)
class NompResult:
    """What matching pursuit found in B scenes."""

    detections: Detections  # with the covariance of the errors that the fit predicts
    amplitude: Tensor  # (B, G, K) complex, 0 where there is no source; G is 1 or L
    noise_power: Tensor  # (B,) sigma^2: as told, or from the residual, at the scale of y
    snr_db: Tensor  # (B,) of the fit's signal over that noise, within -100 and 100 dB

    @staticmethod
    def concatenate(parts: list[NompResult]) -> NompResult:
        """One batch of several, in order."""
        return NompResult(
            Detections.concatenate([part.detections for part in parts]),
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in ("amplitude", "noise_power", "snr_db")
            ),
        )


def pursuit_grid(scene: SceneConfig, array: PlanarArray, oversampling: float = 2.0) -> PolarGrid:
    """Grid over a field of view, as dense as the array's beams are narrow.

    A beam is ``lambda / D`` wide in the sine of an angle, and ``2 lambda / rho^2`` deep in inverse
    range, where D is the aperture along the axis and rho the distance of the outermost element:
    a phase of 2 pi across the array.
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


@in_full_precision
@torch.no_grad()
def nomp(
    y: Tensor,
    H: Tensor,
    codes: Tensor,
    *,
    array: PlanarArray | None = None,
    scene: SceneConfig | None = None,
    snr_db: float | Tensor | None = None,
    config: NompConfig | None = None,
    initial: Detections | None = None,
) -> NompResult:
    """Find sources by matching pursuit, refine all of them after each pick, and choose how many.

    Each pick takes the grid point that lowers the residual's energy most, refines it alone and
    then all sources together (Levenberg-Marquardt on azimuth, elevation and inverse range with
    the amplitudes eliminated). An information criterion chooses among the fits: with the
    likelihood given the amplitudes for constant symbols, and with the symbols integrated out for
    fluctuating ones (:mod:`physics.order`). Sources stay within the field of view: one that
    stands outside of it is found, if at all, at its border.

    Args:
        y: (B, L, M) complex.
        H: (B, M, N) or (M, N) complex.
        codes: (B, L, N) or (L, N) complex.
        array: the surface; 12 x 12 at half a wavelength if left out.
        scene: field of view, wavefront, source mode and the most sources; at most as many are
            looked for as the measurement can hold (fewer than M for fluctuating sources).
        snr_db: (B,) or one for all [dB]; None where it is not known: the noise is then estimated.
        config: how to search.
        initial: where to start: the pursuit takes these positions, in their order, before it
            looks at the grid. The criterion decides over them as over the others, so put the
            strongest first: what comes after a start that does not exist is kept with it or not
            at all. There may be more of them than ``scene.max_sources``.

    Returns:
        The sources, strongest first. Without any signal there are none.

    Raises:
        TypeError, ValueError: as :func:`physics.checks.check_measurement`, or an ``snr_db`` or
            ``initial`` that does not fit.

    Source: Mamandipoor, Ramasamy and Madhow, "Newtonized orthogonal matching pursuit: frequency
    estimation over the continuum", IEEE Trans. Signal Process. 64(19), 2016, in three dimensions
    and with joint refinement by variable projection.
    """
    config = config or NompConfig()
    search = _Search(array or PlanarArray(), scene or SceneConfig(), config, y, H, codes)
    if initial is not None and len(initial):
        initial = _compact(initial)
        most = max(search.max_sources, int(initial.count.max()))
        search.max_sources = min(most, search.resolvable)
    parts = [
        search.pursue(measurement, noise, None if initial is None else initial[index])
        for index, measurement, noise in search.chunks(snr_db, initial)
    ]
    return search.rescaled(NompResult.concatenate(parts)) if parts else search.nothing()


@in_full_precision
@torch.no_grad()
def polish(
    y: Tensor,
    H: Tensor,
    codes: Tensor,
    initial: Detections,
    *,
    array: PlanarArray | None = None,
    scene: SceneConfig | None = None,
    snr_db: float | Tensor | None = None,
    config: NompConfig | None = None,
) -> NompResult:
    """Refine the positions of another estimator by maximum likelihood; their number stays.

    Arguments, result and errors are those of :func:`nomp`; all of ``initial`` is kept, moved into
    the field of view where it lies outside.
    """
    config = config or NompConfig()
    search = _Search(array or PlanarArray(), scene or SceneConfig(), config, y, H, codes)
    start = _compact(initial)
    parts = [
        search.finish(
            measurement,
            position_of(start.position[index].to(search.bounds)),
            start.present[index],
            noise,
        )
        for index, measurement, noise in search.chunks(snr_db, start)
    ]
    return search.rescaled(NompResult.concatenate(parts)) if parts else search.nothing()


def estimate_snr_db(
    y: Tensor,
    H: Tensor,
    codes: Tensor,
    *,
    array: PlanarArray | None = None,
    scene: SceneConfig | None = None,
    config: NompConfig | None = None,
) -> Tensor:
    """SNR (B,) [dB] of measurements whose noise is not known.

    The noise is what matching pursuit cannot explain, over the degrees of freedom that its sources
    leave; the signal is the rest of the measurement's energy. NaN where it finds no source: the
    level is then low, and that is all that is known. Arguments and errors are those of
    :func:`nomp`.
    """
    result = nomp(y, H, codes, array=array, scene=scene, config=config)
    return result.snr_db.masked_fill(result.detections.count == 0, torch.nan)


def _compact(found: Detections) -> Detections:
    """The same detections, those that are present first."""
    order = found.present.int().argsort(dim=-1, descending=True, stable=True)
    position = found.position.gather(1, order.unsqueeze(-1).expand(-1, -1, 3))
    present = found.present.gather(1, order)
    return Detections(torch.where(present.unsqueeze(-1), position, 1.0), present)


class _Search:
    """One call: the measurement at a moderate scale, and the grid."""

    def __init__(
        self,
        array: PlanarArray,
        scene: SceneConfig,
        config: NompConfig,
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
        n_snapshots, n_antennas = y.shape[-2:]
        self.n_rows = n_snapshots * n_antennas
        # Fewer real parameters than real observations; amplitudes are one or one a snapshot.
        fitted = 3 + 2 * (n_snapshots if self.fluctuating else 1)
        self.resolvable = (2 * self.n_rows - 1) // fitted
        if self.fluctuating:
            self.resolvable = min(self.resolvable, n_antennas - 1)
        self.max_sources = min(scene.max_sources, self.resolvable)
        per_source = parameters_per_source(scene.source_mode, scene.wavefront)
        self.price = per_source * penalty(config.criterion, self.n_rows, n_snapshots)

    def chunks(
        self, snr_db: float | Tensor | None, initial: Detections | None
    ) -> Iterator[tuple[slice, Measurement, Tensor | None]]:
        """Scenes, a bounded number at a time, and their noise where it is known."""
        n_scenes = len(self.y)
        if initial is not None and len(initial) != n_scenes:
            raise ValueError(f"initial holds {len(initial)} scenes and y {n_scenes}")
        if initial is not None:
            here = torch.where(initial.present.unsqueeze(-1), initial.position, 0.0)
            check_finite("initial.position", here)
        level = None if snr_db is None else self._level(snr_db)
        for start in range(0, n_scenes, _CHUNK):
            index = slice(start, start + _CHUNK)
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

    def pursue(
        self, measurement: Measurement, noise: Tensor | None, initial: Detections | None
    ) -> NompResult:
        """Pick, refine and choose for one chunk."""
        n_scenes = len(measurement)
        kept = self.points.new_zeros(n_scenes, self.max_sources, 3)
        kept[..., 2] = self.bounds[1, 2]
        best = conditional_deviance(measurement, measurement.energy, noise)
        count = torch.zeros(n_scenes, dtype=torch.int64, device=self.device)
        active = torch.arange(n_scenes, device=self.device)
        wasted = torch.zeros_like(active)
        here, current, residual = measurement, kept[:, :0], measurement.y
        n_given = torch.zeros_like(count) if initial is None else initial.count
        for k in range(1, self.max_sources + 1):
            new = self._pick(here, residual)
            if initial is not None and k <= initial.present.shape[1]:
                start = position_of(initial.position[active, k - 1].to(self.bounds))
                given = initial.present[active, k - 1]
                new = torch.where(given[:, None, None], start.unsqueeze(1), new)
            alone = replace(here, y=residual)
            fit, _ = refine(alone, new, self.bounds, self.config.new_iterations)
            current = torch.cat([current, fit.coordinates], dim=1)
            fit, _ = refine(here, current, self.bounds, self.config.joint_iterations)
            current, residual = fit.coordinates, fit.residual
            known = None if noise is None else noise[active]
            deviance = (
                marginal_deviance(here, fit, known)
                if self.fluctuating
                else conditional_deviance(here, fit.cost, known)
            )
            value = deviance + k * self.price
            gain = value < best[active]
            best[active] = torch.where(gain, value, best[active])
            count[active] = torch.where(gain, k, count[active])
            kept[active[gain], :k] = current[gain]
            wasted = torch.where(gain, 0, wasted + 1)
            going = (wasted < self.config.patience) | (k < n_given[active])
            if not bool(going.any()):
                break
            if not bool(going.all()):
                active, wasted, here = active[going], wasted[going], here[going]
                current, residual = current[going], residual[going]
        present = torch.arange(self.max_sources, device=self.device) < count.unsqueeze(-1)
        return self.finish(measurement, kept, present, noise)

    def _pick(self, measurement: Measurement, residual: Tensor) -> Tensor:
        """The grid point (B, 1, 3) whose source lowers the residual's energy most.

        The exact gain takes the norm of every point's signal, which differs between scenes. It is
        computed for the points that are best by the numerator alone.
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

    def finish(
        self,
        measurement: Measurement,
        coordinates: Tensor,
        present: Tensor,
        noise: Tensor | None,
    ) -> NompResult:
        """Refine what is kept, and say how sure it is."""
        if present.shape[-1] == 0:
            coordinates = self.bounds[1].expand(len(measurement), 1, 3)
            present = present.new_zeros(len(measurement), 1)
        fit, matrix = refine(
            measurement, coordinates, self.bounds, self.config.final_iterations, present
        )
        n_groups = fit.amplitude.shape[1]
        spent = (1.5 + n_groups) * present.sum(-1)  # complex numbers that were fitted
        estimated = fit.cost / (self.n_rows - spent).clamp_min(1.0)
        noise = estimated if noise is None else noise
        signal = (measurement.energy / self.n_rows - noise).clamp_min(0.0)
        tiny = torch.finfo(noise.dtype).tiny
        snr_db = 10.0 * torch.log10((signal / noise.clamp_min(tiny)).clamp(1e-10, 1e10))
        strength = (fit.amplitude.abs().square().mean(1) * present).masked_fill(~present, -1.0)
        order = strength.argsort(dim=-1, descending=True)
        covariance = _error_covariance(matrix, fit.position[..., 2], present, noise)
        wide = order[..., None].expand(-1, -1, 3)
        detections = Detections(
            fit.position.gather(1, wide),
            present.gather(1, order),
            covariance.gather(1, wide[..., None].expand(-1, -1, -1, 3)),
        )
        amplitude = (fit.amplitude * present.unsqueeze(1)).gather(
            -1, order.unsqueeze(1).expand(-1, n_groups, -1)
        )
        return NompResult(detections, amplitude, noise, snr_db)

    def rescaled(self, result: NompResult) -> NompResult:
        """Amplitudes and noise at the scale of the call."""
        y, H, codes = self.scales
        amplitude = divide(result.amplitude, (H * codes)[:, None, None])
        amplitude = torch.view_as_complex(torch.view_as_real(amplitude) * y[:, None, None, None])
        return replace(result, amplitude=amplitude, noise_power=result.noise_power * y * y)

    def nothing(self) -> NompResult:
        """The result of no scenes."""
        none = self.points.new_zeros(0)
        found = Detections(none.view(0, 1, 3), none.view(0, 1) > 0, none.view(0, 1, 3, 3))
        n_groups = self.y.shape[1] if self.fluctuating else 1
        return NompResult(found, self.y.new_zeros(0, n_groups, 1), none, none)


def _error_covariance(
    matrix: Tensor,  # (B, 3 K, 3 K) Re(D^H P D)
    range_: Tensor,  # (B, K) [m]
    present: Tensor,  # (B, K) bool
    noise_power: Tensor,  # (B,)
) -> Tensor:
    """Covariance (B, K, 3, 3) of azimuth, elevation and range: sigma^2 / 2 of the inverse."""
    kind = torch.finfo(matrix.dtype)
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    system = matrix * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    # Where the data hardly tell coordinates apart the loading makes the variance huge, not NaN.
    loading = 1e2 * kind.eps + (diagonal <= 0)
    inverse = torch.linalg.pinv(system + torch.diag_embed(loading), hermitian=True)
    inverse = inverse * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    own = position_blocks(inverse, range_, diagonal <= 0)  # the range of a plane wave is lost
    own = 0.5 * noise_power[:, None, None, None] * own
    return torch.where(present[..., None, None], own, torch.zeros_like(own))
