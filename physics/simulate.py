"""Simulation of measurements from sources: y_l = H diag(c_l) x_l + n_l, batched in torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from physics.channel import complex_normal, rician_channel
from physics.codebook import draw_codes
from physics.geometry import PlanarArray
from physics.precision import in_full_precision
from physics.scene import SceneConfig, Scenes, draw_sources
from physics.steering import steering_vector
from physics.transfer import sent


@in_full_precision
def simulate(
    n_scenes: int,
    config: SceneConfig | None = None,
    array: PlanarArray | None = None,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.complex64,
) -> Scenes:
    """Simulate a batch of scenes on one device.

    The signal on the surface is ``x_l = sum_k g_k s_kl a(p_k)`` with ``g_k = r_k^-exponent`` and
    circular normal symbols of unit variance: fresh in every snapshot (``fluctuating``) or one per
    sweep (``constant``). ``power`` is the weight of the sources in ``R_true``: ``g_k^2`` for
    fluctuating sources, ``|g_k s_k|^2`` for constant ones. The noise is scaled to the drawn SNR in
    every scene; a scene without sources holds noise of unit variance.

    Hardware errors of ``config`` (element jitter, phase and amplitude errors, dead elements), and
    waves that differ from the model, affect only the measurement: H, codes and R_true stay nominal,
    as an estimator would know them.

    Args:
        n_scenes: B.
        config: how scenes are drawn; the defaults of ``SceneConfig`` if left out.
        array: the surface; 12 x 12 at half a wavelength if left out.
        generator: random generator on ``device``; torch's default one if left out.
        device: where to compute; the generator's if left out.
        dtype: complex64 or complex128.

    Returns:
        Scenes with y (B, L, M), H (B, M, N), codes (B, L, N).

    Raises:
        ValueError: a negative count, a real dtype, or a codebook that the array does not support.
    """
    if n_scenes < 0:
        raise ValueError(f"n_scenes is {n_scenes}; at least 0 needed")
    if not dtype.is_complex:
        raise ValueError(f"dtype is {dtype}; expected torch.complex64 or torch.complex128")
    config = config or SceneConfig()
    array = array or PlanarArray()
    if device is None and generator is not None:
        device = generator.device
    real = dtype.to_real()
    draw: Any = {"generator": generator, "device": device}

    position, n_sources = draw_sources(config, n_scenes, dtype=real, **draw)
    base_station, _ = draw_sources(
        config.model_copy(
            update={"range_m": config.base_station_range_m, "max_sources": 1, "min_sources": 1}
        ),
        n_scenes,
        dtype=real,
        **draw,
    )
    H = rician_channel(
        config.n_antennas,
        array,
        k_factor_db=config.k_factor_db,
        base_station=base_station[:, 0],
        batch=(n_scenes,),
        generator=generator,
        dtype=dtype,
    )
    codes = draw_codes(
        config.codebook,
        config.n_snapshots,
        array,
        bits=config.code_bits,
        batch=(n_scenes,),
        dtype=dtype,
        **draw,
    )
    present = torch.arange(config.max_sources, device=device) < n_sources.unsqueeze(-1)
    gain = position[..., 2].pow(-config.path_loss_exponent) * present
    n_symbols = config.n_snapshots if config.source_mode == "fluctuating" else 1
    symbols = complex_normal((n_scenes, n_symbols, config.max_sources), dtype=dtype, **draw)
    if config.source_mode == "fluctuating":
        power = gain.square()
    else:
        power = (gain * symbols[:, 0].abs()).square()

    low, high = config.snr_db
    snr_db = low + (high - low) * torch.rand((n_scenes,), dtype=real, **draw)
    noise = complex_normal((n_scenes, config.n_snapshots, config.n_antennas), dtype=dtype, **draw)
    # Drawn last, so that the same seed gives the same scenes with and without hardware errors.
    response, reflection = _hardware(config, array, position, generator)
    x = (symbols * gain.unsqueeze(-2)) @ response  # (B, L or 1, N)
    if reflection is not None:
        x = x * reflection.unsqueeze(-2)
    y = (codes * x) @ H.mT

    signal_power = y.abs().square().mean((-2, -1))
    noise_power = torch.where(
        signal_power > 0, signal_power * 10.0 ** (-snr_db / 10.0), torch.ones_like(signal_power)
    )
    y = y + noise * noise_power.sqrt()[:, None, None]
    return Scenes(y, H, codes, position, power, n_sources, snr_db)


def _hardware(
    config: SceneConfig,
    array: PlanarArray,
    position: Tensor,  # (B, K, 3) real
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor | None]:
    """True response (B, K, N) of the sources and the elements' reflection error (B, N)."""
    device, real = position.device, position.dtype
    batch = position.shape[0]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=real)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device, dtype=real)

    errors = (
        config.element_jitter,
        config.phase_error_deg,
        config.amplitude_error_db,
        config.dropout,
    )
    if not any(errors):
        return _arriving(config, array, position, None, generator), None
    share = position.new_ones(1, 4)
    if config.error_levels == "varied":
        share = (2.0 * uniform(batch, 4) - 1.0).clamp_min(0.0)
        if config.faultless_share:
            share = share * (uniform(batch, 1) >= config.faultless_share)
    levels = share * sent(torch.tensor(errors, dtype=real), device)
    jitter, phase_deg, level_db, dropout = levels.unsqueeze(-1).unbind(1)  # (B or 1, 1) each
    displacement = None
    if config.element_jitter:
        displacement = jitter[..., None, None] * normal(batch, 1, array.size, 3)
    if not any(errors[1:]):
        return _arriving(config, array, position, displacement, generator), None
    level = 10.0 ** (level_db / 20.0 * normal(batch, array.size))
    phase = torch.deg2rad(phase_deg) * normal(batch, array.size)
    alive = uniform(batch, array.size) >= dropout
    response = _arriving(config, array, position, displacement, generator)
    return response, torch.polar(level * alive, phase)


def _arriving(
    config: SceneConfig,
    array: PlanarArray,
    position: Tensor,  # (B, K, 3) real
    displacement: Tensor | None,  # (B, 1, N, 3) real
    generator: torch.Generator | None,
) -> Tensor:
    """Steering vectors (B, K, N) of the arriving waves, with one wave model per scene."""
    assumed, true = config.wavefront, config.true_wavefront or config.wavefront
    response = steering_vector(position, array, true, displacement)
    if true == assumed or config.error_levels == "fixed":
        return response
    drawn = torch.rand(len(position), generator=generator, device=position.device)
    nominal = steering_vector(position, array, assumed, displacement)
    return torch.where((drawn < 0.5)[:, None, None], nominal, response)
