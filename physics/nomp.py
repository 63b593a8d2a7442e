"""Newtonised orthogonal matching pursuit over azimuth, elevation and inverse range."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from physics.detections import Detections
from physics.fit import (
    Measurement,
    coordinate_covariance,
    position_blocks,
    position_of,
    refine,
)
from physics.geometry import PlanarArray
from physics.order import conditional_deviance
from physics.precision import in_full_precision
from physics.pursuit import PursuitConfig, Search
from physics.scaling import divide
from physics.scene import SceneConfig


class NompConfig(PursuitConfig):
    """How matching pursuit searches, and when it ends."""

    final_iterations: int = Field(
        10, ge=0, description="steps that refine the sources that are kept"
    )
    patience: int = Field(
        1, ge=1, description="consecutive picks without a gain that end the pursuit"
    )


@dataclass(frozen=True)
class NompResult:
    """Result of matching pursuit for B scenes."""

    detections: Detections  # with the error covariance that the fit predicts
    amplitude: Tensor  # (B, G, K) complex, 0 where there is no source; G is 1 or L
    noise_power: Tensor  # (B,) sigma^2: as given, or from the residual, at the scale of y
    snr_db: Tensor  # (B,) of the fit's signal over that noise, within -100 and 100 dB

    @staticmethod
    def concatenate(parts: list[NompResult]) -> NompResult:
        """Concatenate batches in order."""
        return NompResult(
            Detections.concatenate([part.detections for part in parts]),
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in ("amplitude", "noise_power", "snr_db")
            ),
        )


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

    Among the ``config.candidates`` grid points that best match the residual, each pick takes the
    one that lowers its energy most, refines it alone and then refines all sources together
    (Levenberg-Marquardt on azimuth, elevation and inverse range with the amplitudes eliminated). An
    information criterion chooses among the fits: with the likelihood given the amplitudes for
    constant symbols, and with the symbols integrated out for fluctuating ones
    (:mod:`physics.order`). Sources stay within the field of view: one outside it is found, if at
    all, at its border.

    Args:
        y: (B, L, M) complex.
        H: (B, M, N) or (M, N) complex.
        codes: (B, L, N) or (L, N) complex.
        array: the surface; 12 x 12 at half a wavelength if left out.
        scene: field of view, wavefront, source mode and maximum number of sources; the search finds
            at most as many as the measurement can resolve (fewer than M for fluctuating sources).
        snr_db: (B,) or one for all [dB]; None where it is unknown: the noise is then estimated.
        config: search settings.
        initial: starting positions: the pursuit takes these, in their order, before it searches the
            grid. The criterion applies to them as to the others, so put the strongest first: a
            position that follows a nonexistent source is kept only together with it. There may be
            more of them than ``scene.max_sources``.

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
    search = Search(array or PlanarArray(), scene or SceneConfig(), config, y, H, codes)
    if initial is not None and len(initial):
        initial = _compact(initial)
        most = max(search.max_sources, int(initial.count.max()))
        search.max_sources = min(most, search.resolvable)
    parts = [
        _pursue(search, config, measurement, noise, None if initial is None else initial[index])
        for index, measurement, noise in search.chunks(snr_db, initial)
    ]
    return _rescaled(search, NompResult.concatenate(parts)) if parts else _nothing(search)


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
    """Refine the positions of another estimator by maximum likelihood, keeping their number.

    Arguments, result and errors are those of :func:`nomp`; all of ``initial`` is kept, and
    positions outside the field of view are moved into it.
    """
    config = config or NompConfig()
    search = Search(array or PlanarArray(), scene or SceneConfig(), config, y, H, codes)
    start = _compact(initial)
    parts = [
        _finish(
            search,
            config,
            measurement,
            position_of(start.position[index].to(search.bounds)),
            start.present[index],
            noise,
        )
        for index, measurement, noise in search.chunks(snr_db, start)
    ]
    return _rescaled(search, NompResult.concatenate(parts)) if parts else _nothing(search)


def estimate_snr_db(
    y: Tensor,
    H: Tensor,
    codes: Tensor,
    *,
    array: PlanarArray | None = None,
    scene: SceneConfig | None = None,
    config: NompConfig | None = None,
) -> Tensor:
    """SNR (B,) [dB] of measurements with unknown noise.

    The noise is the energy that matching pursuit cannot explain, over the degrees of freedom that
    its sources leave; the signal is the rest of the measurement's energy. NaN where it finds no
    source: all that is known then is that the SNR is low. Arguments and errors are those of
    :func:`nomp`.
    """
    result = nomp(y, H, codes, array=array, scene=scene, config=config)
    return result.snr_db.masked_fill(result.detections.count == 0, torch.nan)


def _compact(found: Detections) -> Detections:
    """The same detections, with those that are present first."""
    order = found.present.int().argsort(dim=-1, descending=True, stable=True)
    position = found.position.gather(1, order.unsqueeze(-1).expand(-1, -1, 3))
    present = found.present.gather(1, order)
    return Detections(torch.where(present.unsqueeze(-1), position, 1.0), present)


def _pursue(
    search: Search,
    config: NompConfig,
    measurement: Measurement,
    noise: Tensor | None,
    initial: Detections | None,
) -> NompResult:
    """Pick, refine and select sources for one chunk."""
    n_scenes = len(measurement)
    kept = search.points.new_zeros(n_scenes, search.max_sources, 3)
    kept[..., 2] = search.bounds[1, 2]
    best = conditional_deviance(measurement, measurement.energy, noise)
    count = torch.zeros(n_scenes, dtype=torch.int64, device=search.device)
    active = torch.arange(n_scenes, device=search.device)
    wasted = torch.zeros_like(active)
    here, current, residual = measurement, kept[:, :0], measurement.y
    n_given = torch.zeros_like(count) if initial is None else initial.count
    for k in range(1, search.max_sources + 1):
        start = None
        if initial is not None and k <= initial.present.shape[1]:
            index = slice(k - 1, k)
            start = Detections(initial.position[active, index], initial.present[active, index])
        fit, _ = search.grow(here, current, residual, start)
        current, residual = fit.coordinates, fit.residual
        deviance = search.deviance(here, fit, None if noise is None else noise[active])
        value = deviance + k * search.price
        gain = value < best[active]
        best[active] = torch.where(gain, value, best[active])
        count[active] = torch.where(gain, k, count[active])
        kept[active[gain], :k] = current[gain]
        wasted = torch.where(gain, 0, wasted + 1)
        going = (wasted < config.patience) | (k < n_given[active])
        if not bool(going.any()):
            break
        if not bool(going.all()):
            active, wasted, here = active[going], wasted[going], here[going]
            current, residual = current[going], residual[going]
    present = torch.arange(search.max_sources, device=search.device) < count.unsqueeze(-1)
    return _finish(search, config, measurement, kept, present, noise)


def _finish(
    search: Search,
    config: NompConfig,
    measurement: Measurement,
    coordinates: Tensor,
    present: Tensor,
    noise: Tensor | None,
) -> NompResult:
    """Refine the kept sources and estimate their error covariance."""
    if present.shape[-1] == 0:
        coordinates = search.bounds[1].expand(len(measurement), 1, 3)
        present = present.new_zeros(len(measurement), 1)
    fit, matrix = refine(measurement, coordinates, search.bounds, config.final_iterations, present)
    n_groups = fit.amplitude.shape[1]
    spent = (1.5 + n_groups) * present.sum(-1)  # complex numbers that were fitted
    estimated = fit.cost / (search.n_rows - spent).clamp_min(1.0)
    noise = estimated if noise is None else noise
    signal = (measurement.energy / search.n_rows - noise).clamp_min(0.0)
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


def _rescaled(search: Search, result: NompResult) -> NompResult:
    """Amplitudes and noise at the scale of the caller's arguments."""
    y, H, codes = search.scales
    amplitude = divide(result.amplitude, (H * codes)[:, None, None])
    amplitude = torch.view_as_complex(torch.view_as_real(amplitude) * y[:, None, None, None])
    return replace(result, amplitude=amplitude, noise_power=result.noise_power * y * y)


def _nothing(search: Search) -> NompResult:
    """The result for an empty batch."""
    none = search.points.new_zeros(0)
    found = Detections(none.view(0, 1, 3), none.view(0, 1) > 0, none.view(0, 1, 3, 3))
    n_groups = search.y.shape[1] if search.fluctuating else 1
    return NompResult(found, search.y.new_zeros(0, n_groups, 1), none, none)


def _error_covariance(
    matrix: Tensor,  # (B, 3 K, 3 K) Re(D^H P D)
    range_: Tensor,  # (B, K) [m]
    present: Tensor,  # (B, K) bool
    noise_power: Tensor,  # (B,)
) -> Tensor:
    """Covariance (B, K, 3, 3) of azimuth, elevation and range: sigma^2 / 2 times the inverse."""
    unseen = matrix.diagonal(dim1=-2, dim2=-1) <= 0  # such as the range of a plane wave
    own = position_blocks(coordinate_covariance(matrix, noise_power), range_, unseen)
    return torch.where(present[..., None, None], own, torch.zeros_like(own))
