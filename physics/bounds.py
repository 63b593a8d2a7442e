"""Cramer-Rao bounds of source positions."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from physics.checks import check_finite
from physics.fit import (
    Measurement,
    gauss_newton,
    loaded_cholesky,
    normal_equations,
    position_blocks,
    position_of,
)
from physics.geometry import PlanarArray
from physics.precision import in_full_precision
from physics.scaling import divide, divisor, peak, power
from physics.scene import Scenes, SourceMode
from physics.steering import Wavefront, steering_derivatives

_CHUNK = 16  # scenes at a time: in complex128 their response matrices take 10 MB


@in_full_precision
@torch.no_grad()
def crb(
    position: Tensor,
    H: Tensor,
    codes: Tensor,
    noise_power: Tensor,
    *,
    amplitude: Tensor | None = None,
    source_power: Tensor | None = None,
    present: Tensor | None = None,
    array: PlanarArray | None = None,
    wavefront: Wavefront = "spherical",
    source_mode: SourceMode = "fluctuating",
) -> Tensor:
    """Cramer-Rao bound on the covariance of the errors of each source's position.

    The measurement is ``y_l = H diag(c_l) sum_k b_lk a(p_k) + n_l``. The positions of all sources
    and the other unknowns are estimated jointly:

    - **deterministic** (``amplitude`` given): amplitudes are unknown constants, one per source
      (``constant``) or per source and snapshot (``fluctuating``). The Fisher information of the
      coordinates, amplitudes eliminated, is ``(2 / sigma^2) Re(D^H P D)``.
    - **stochastic** (``source_power`` given): amplitudes are circular Gaussian of unknown power,
      the noise power is unknown; ``F_ij = sum_g tr(C_g^-1 dC_g/di C_g^-1 dC_g/dj)`` over the
      groups of observations that share an amplitude: every snapshot, or the whole sweep.

    Computed in complex128 whatever the dtype of the arguments.

    Args:
        position: (B, K, 3) azimuth, elevation [rad], range [m].
        H: (B, M, N) complex.
        codes: (B, L, N) complex.
        noise_power: (B,) sigma^2 above 0.
        amplitude: (B, L, K) complex for fluctuating sources, (B, 1, K) for constant ones.
        source_power: (B, K) real, E|b|^2.
        present: (B, K) bool, which of them hold a source; all if left out.
        array: the surface; 12 x 12 at half a wavelength if left out.
        wavefront: model of the steering vectors.
        source_mode: whether a source has one amplitude for all snapshots or one per snapshot.

    Returns:
        (B, K, 3, 3) float64: azimuth, elevation [rad], range [m]. The diagonal is infinite where
        a source is absent or where the data do not identify its position (the range of a plane
        wave, coincident sources in the stochastic bound).

    Raises:
        ValueError: both or neither of ``amplitude`` and ``source_power``, shapes that do not fit,
            NaN or Inf (except in the positions of absent sources), a noise power not above 0,
            or an unknown source mode.

    Source: Stoica and Nehorai, "MUSIC, maximum likelihood, and Cramer-Rao bound", IEEE Trans.
    Acoust., Speech, Signal Process. 37(5), 1989, eq. 2.11 (deterministic); Slepian and Bangs'
    formula for circular Gaussian data as in Stoica and Moses, "Spectral Analysis of Signals", 2005,
    appendix B (stochastic).
    """
    if (amplitude is None) == (source_power is None):
        raise ValueError(
            f"got {'neither' if amplitude is None else 'both'} of amplitude and source_power; "
            "expected amplitude for the deterministic bound or source_power for the stochastic one"
        )
    if source_mode not in get_args(SourceMode):
        raise ValueError(f"source_mode {source_mode!r} unknown; choose from {get_args(SourceMode)}")
    n_scenes, n_sources = position.shape[:2]
    n_groups = codes.shape[-2] if source_mode == "fluctuating" else 1
    for name, value, shape in (
        ("position", position, (n_scenes, n_sources, 3)),
        ("noise_power", noise_power, (n_scenes,)),
        ("amplitude", amplitude, (n_scenes, n_groups, n_sources)),
        ("source_power", source_power, (n_scenes, n_sources)),
        ("present", present, (n_scenes, n_sources)),
    ):
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected {shape}")
    if present is not None:
        position = torch.where(present.unsqueeze(-1), position, 1.0)
    for name, value in (
        ("position", position),
        ("H", H),
        ("codes", codes),
        ("noise_power", noise_power),
        ("amplitude", amplitude),
        ("source_power", source_power),
    ):
        if value is not None:
            check_finite(name, value)
    if not bool((noise_power > 0).all()):
        raise ValueError(
            f"noise_power has a smallest value of {float(noise_power.min())}; expected above 0: "
            "without noise there is no bound"
        )
    if n_sources == 0:
        return torch.zeros(n_scenes, 0, 3, 3, dtype=torch.float64, device=position.device)
    if present is None:
        present = torch.ones(n_scenes, n_sources, dtype=torch.bool, device=position.device)
    place = position.double()
    H, codes = H.to(torch.complex128), codes.to(torch.complex128)
    measurement = Measurement.of(
        H.new_zeros(n_scenes, codes.shape[-2], H.shape[-2]),
        H,
        codes,
        array or PlanarArray(),
        wavefront,
        source_mode,
    )
    signals, slopes = _signals(measurement, place, present)
    if amplitude is not None:
        cholesky = loaded_cholesky(signals.conj() @ signals.mT)
        _, matrix = gauss_newton(signals, slopes, amplitude.to(signals.dtype), cholesky)
        information = matrix * (2.0 / noise_power.double())[:, None, None]
    else:
        assert source_power is not None
        information = _stochastic(
            signals, slopes, source_power.double() * present, noise_power.double()
        )
    return _position_bound(information, place[..., 2], present)


def scene_crb(
    scenes: Scenes, array: PlanarArray, wavefront: Wavefront, source_mode: SourceMode
) -> Tensor:
    """Bounds at the true positions of recorded or simulated scenes, as :func:`crb` gives them.

    Constant sources get the deterministic bound, at the amplitudes that fit the measurement best
    at the true positions; fluctuating sources get the stochastic bound, at the scenes' powers
    scaled to the measurement's energy. The noise power follows from the SNR.

    Args:
        scenes: B scenes of at most K sources.
        array: the nominal surface.
        wavefront: the model that the scenes were made with.
        source_mode: whether symbols fluctuate from snapshot to snapshot.

    Returns:
        (B, K, 3, 3) real: covariances of azimuth, elevation [rad] and range [m]; infinite where
        there is no source and where the SNR is NaN (unknown).
    """
    parts = [
        _scene_crb(scenes[slice(start, start + _CHUNK)], array, wavefront, source_mode)
        for start in range(0, max(len(scenes), 1), _CHUNK)
    ]
    return torch.cat(parts)


def _scene_crb(
    scenes: Scenes, array: PlanarArray, wavefront: Wavefront, source_mode: SourceMode
) -> Tensor:
    y, H, codes = (
        divide(t, divisor(peak(t))[:, None, None]).to(torch.complex128)
        for t in (scenes.y, scenes.H, scenes.codes)
    )
    place = torch.where(scenes.present.unsqueeze(-1), scenes.position, 1.0).double()
    measurement = Measurement.of(y, H, codes, array, wavefront, source_mode)
    mean = measurement.energy / measurement.n_rows
    unknown = ~torch.isfinite(scenes.snr_db) | (mean == 0)  # nothing received: no noise power
    snr = 10.0 ** (torch.where(unknown, 0.0, scenes.snr_db).double() / 10.0)
    noise = (mean / (1.0 + snr)).clamp_min(torch.finfo(torch.float64).tiny)
    known: dict[str, Tensor]
    if source_mode == "constant":
        fit, _, _ = normal_equations(measurement, position_of(place), scenes.present)
        known = {"amplitude": fit.amplitude}
    else:
        share = scenes.power.double() * scenes.present
        share = share / divisor(share.amax(-1, keepdim=True))
        signals, _ = _signals(measurement, place, scenes.present)
        expected = (power(signals).sum((1, 3)) * share).sum(-1) / measurement.n_rows
        known = {
            "source_power": share
            * ((mean - noise).clamp_min(0.0) / divisor(expected)).unsqueeze(-1)
        }
    return crb(
        place,
        H,
        codes,
        noise,
        **known,
        present=scenes.present & ~unknown.unsqueeze(-1),
        array=array,
        wavefront=wavefront,
        source_mode=source_mode,
    )


def _signals(measurement: Measurement, position: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Signals (B, G, K, R) of unit sources and their derivatives (B, G, 3 K, R)."""
    a, da = steering_derivatives(position, measurement.array, measurement.wavefront)
    here = present.unsqueeze(-1)
    rows = torch.cat([a * here, (da * here.unsqueeze(-1)).flatten(-3, -2)], dim=-2)
    signals = measurement.rows(rows)
    return signals.split([a.shape[-2], 3 * a.shape[-2]], dim=-2)


def _stochastic(signals: Tensor, slopes: Tensor, p: Tensor, noise: Tensor) -> Tensor:
    """Fisher information (B, 3 K, 3 K) of the coordinates, with powers and noise eliminated."""
    n_sources, n_rows = signals.shape[-2:]
    sigma2 = noise[:, None, None, None]
    root = p.sqrt()[:, None, :, None]
    A = signals * root  # C = A A^H + sigma^2 I
    gram = A.conj() @ A.mT
    eye = torch.eye(n_sources, dtype=gram.dtype, device=gram.device)
    V = torch.cat([signals, slopes], dim=-2)
    # C^-1 V by Woodbury's identity; V and U hold vectors as rows.
    inner = torch.linalg.solve(gram + sigma2 * eye, A.conj() @ V.mT)
    U = (V - inner.mT @ A) / sigma2
    X, Y = V.conj() @ U.mT, U.conj() @ U.mT
    aa, ad, dd = (
        X[..., :n_sources, :n_sources],
        X[..., :n_sources, n_sources:],
        X[..., n_sources:, n_sources:],
    )

    def spread(value: Tensor) -> Tensor:  # from per source to per coordinate
        return value.repeat_interleave(3, dim=-2)

    power_i = p.repeat_interleave(3, dim=-1)  # (B, 3 K)
    wide = spread(ad)  # row i: a_k^H C^-1 d_j of the source k of i
    both = spread(spread(aa).mT).mT  # (3 K, 3 K): a_k^H C^-1 a_l of the sources of i and j
    coordinates = 2.0 * (wide * wide.mT + both * dd.mT).real.sum(1)
    coordinates = coordinates * power_i.unsqueeze(-1) * power_i.unsqueeze(-2)
    by_power = 2.0 * (spread(aa) * ad.mT).real.sum(1) * power_i.unsqueeze(-1)  # (3 K, K)
    own = Y[..., :n_sources, n_sources:].unflatten(-1, (n_sources, 3))
    own = own.diagonal(dim1=-3, dim2=-2).mT.flatten(-2)  # a_k^H C^-2 d_i
    by_noise = 2.0 * own.real.sum(1) * power_i
    powers = aa.abs().square().sum(1)
    power_noise = Y[..., :n_sources, :n_sources].diagonal(dim1=-2, dim2=-1).real.sum(1)
    level = torch.linalg.eigvalsh(gram) + noise[:, None, None]
    noise_noise = (level.pow(-2).sum(-1) + (n_rows - n_sources) / noise[:, None] ** 2).sum(1)
    nuisance = torch.cat(
        [
            torch.cat([powers, power_noise.unsqueeze(-1)], dim=-1),
            torch.cat([power_noise, noise_noise.unsqueeze(-1)], dim=-1).unsqueeze(-2),
        ],
        dim=-2,
    )
    across = torch.cat([by_power, by_noise.unsqueeze(-1)], dim=-1)  # (B, 3 K, K + 1)
    scale = _unit_scale(nuisance)
    across = across * scale.unsqueeze(-2)
    nuisance = nuisance * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    return coordinates - across @ torch.linalg.pinv(nuisance, hermitian=True) @ across.mT


def _unit_scale(matrix: Tensor) -> Tensor:
    """Scale that makes the diagonal of a positive matrix one; 0 where the diagonal is zero."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    return torch.where(diagonal > 0, diagonal, torch.inf).rsqrt()


def _position_bound(information: Tensor, range_: Tensor, present: Tensor) -> Tensor:
    """Inverse of the coordinates' information, per source, in azimuth, elevation and range."""
    n_sources = range_.shape[-1]
    scale = _unit_scale(information)
    values, vectors = torch.linalg.eigh(information * scale.unsqueeze(-1) * scale.unsqueeze(-2))
    floor = 3 * n_sources * torch.finfo(values.dtype).eps
    inverse = (vectors / values.clamp_min(floor).unsqueeze(-2)) @ vectors.mT
    # Coordinates that contribute to a direction of vanishing information have no finite bound.
    lost = ((vectors.abs() > 1e-6) & (values <= 1e3 * floor).unsqueeze(-2)).any(-1)
    bound = inverse * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    return position_blocks(bound, range_, lost | ~present.repeat_interleave(3, dim=-1))
