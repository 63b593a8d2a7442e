"""Model order selection: likelihoods and information criteria for the number of sources."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from physics.fit import Fit, Measurement
from physics.scaling import column_energy
from physics.scene import SourceMode
from physics.steering import Wavefront

Criterion = Literal["bic", "aic", "mdl"]
_EM_STEPS = 20


def parameters_per_source(source_mode: SourceMode, wavefront: Wavefront) -> int:
    """Number of real parameters of a source in the likelihood used for the source mode.

    Three coordinates (two of a plane wave), and a complex amplitude (constant) or a power
    (fluctuating).
    """
    coordinates = 2 if wavefront == "planar" else 3
    return coordinates + (2 if source_mode == "constant" else 1)


def penalty(criterion: Criterion, n_rows: int, n_snapshots: int) -> float:
    """Cost of one real parameter on the scale of twice the negative log-likelihood.

    - ``aic``: 2 (Akaike, 1974);
    - ``bic``: the logarithm of the number of real observations, 2 L M (Schwarz, 1978);
    - ``mdl``: the logarithm of the number of snapshots L, as array processing counts its sample
      (Wax and Kailath, "Detection of signals by information theoretic criteria", IEEE Trans.
      Acoust., Speech, Signal Process. 33(2), 1985).

    Raises:
        ValueError: an unknown criterion.
    """
    if criterion not in get_args(Criterion):
        raise ValueError(f"criterion {criterion!r} unknown; choose from {get_args(Criterion)}")
    if criterion == "aic":
        return 2.0
    return math.log(2 * n_rows if criterion == "bic" else max(n_snapshots, 2))


def conditional_deviance(
    measurement: Measurement, cost: Tensor, noise_power: Tensor | None
) -> Tensor:
    """Twice the negative log-likelihood (B,) given the amplitudes, up to a constant.

    ``2 cost / sigma^2`` where the noise is known, else ``2 L M log(cost / L M)``. A cost below
    the rounding of the measurement's energy is raised to that rounding, so that data without noise
    have a finite value.

    Args:
        measurement: B scenes.
        cost: (B,) energy of the residual.
        noise_power: (B,) sigma^2, or None where it is unknown.
    """
    n_rows = measurement.n_rows
    kind = torch.finfo(cost.dtype)
    rounding = 100 * kind.eps * measurement.energy + kind.tiny
    if noise_power is not None:
        return 2.0 * cost / noise_power.maximum(rounding / n_rows)
    return 2.0 * n_rows * torch.log(cost.maximum(rounding) / n_rows)


@dataclass(frozen=True)
class Symbols:
    """Powers of circular normal symbols, and the resulting likelihood terms."""

    power: Tensor  # (B, K), on the scale of |amplitude|^2
    noise_power: Tensor  # (B,) sigma^2
    logdet: Tensor  # (B,) log det (C / sigma^2) of the measurement's covariance C, all groups
    unexplained: Tensor  # (B,) sigma^2 y^H C^-1 y
    rounding: Tensor  # (B,) noise power below which differences are rounding


def symbol_powers(measurement: Measurement, fit: Fit, noise_power: Tensor | None) -> Symbols:
    """Near-maximum-likelihood powers at the fit's positions, and the noise where it is unknown.

    Symbols are integrated out: ``y_l ~ CN(0, C_l)`` with
    ``C_l = sigma^2 I + sum_k p_k g_lk g_lk^H``. Expectation maximisation starts from the powers of
    the fit.

    Source: Dempster, Laird and Rubin, J. R. Stat. Soc. B 39(1), 1977.
    """
    n_rows, n_sources = measurement.n_rows, fit.amplitude.shape[-1]
    energy = measurement.energy
    kind = torch.finfo(energy.dtype)
    rounding = (100 * kind.eps * energy + kind.tiny) / n_rows
    sigma2 = (fit.cost / n_rows if noise_power is None else noise_power).maximum(rounding)
    p = fit.amplitude.abs().square().mean(1)  # (B, K)
    eye = torch.eye(n_sources, dtype=fit.gram.dtype, device=fit.gram.device)
    for step in range(_EM_STEPS + 1):
        # With W = P^1/2 G^H G P^1/2 / sigma^2 + I everything is K x K.
        root = (p / sigma2.unsqueeze(-1)).sqrt().unsqueeze(1)  # (B, 1, K)
        W = fit.gram * (root.unsqueeze(-1) * root.unsqueeze(-2)) + eye
        cholesky = torch.linalg.cholesky_ex(W)[0]
        seen = fit.seen * root
        solved = torch.cholesky_solve(seen.unsqueeze(-1), cholesky).squeeze(-1)
        explained = (seen.conj() * solved).real.sum((-2, -1))
        if step == _EM_STEPS:
            break
        # Posterior of the symbols: mean root u, variance sigma^2 root^2 diag(W^-1).
        scatter = column_energy(torch.linalg.solve_triangular(cholesky, eye, upper=False))
        spread = root.square() * sigma2[:, None, None]
        new_p = (solved.abs().square() * root.square() + spread * scatter).mean(1)
        if noise_power is None:
            misfit = energy - 2.0 * explained
            mean = (solved.unsqueeze(-1).conj() * ((W - eye) @ solved.unsqueeze(-1))).real
            traced = (1.0 - scatter).sum((-2, -1)) * sigma2
            sigma2 = ((misfit + mean.sum((-3, -2, -1)) + traced) / n_rows).maximum(rounding)
        p = new_p
    logdet = 2.0 * cholesky.diagonal(dim1=-2, dim2=-1).real.log().sum((-2, -1))
    return Symbols(p, sigma2, logdet, (energy - explained).clamp_min(0.0), rounding)


def marginal_deviance(measurement: Measurement, fit: Fit, noise_power: Tensor | None) -> Tensor:
    """Twice the negative log-likelihood (B,) of fluctuating sources, up to a constant.

    It uses the powers of :func:`symbol_powers` at the fit's positions and the scale of
    :func:`conditional_deviance`.

    Source: Stoica and Nehorai, "Performance study of conditional and unconditional
    direction-of-arrival estimation", IEEE Trans. Acoust., Speech, Signal Process. 38(10), 1990,
    eq. 2.6.
    """
    symbols = symbol_powers(measurement, fit, noise_power)
    if noise_power is not None:
        return 2.0 * (symbols.logdet + symbols.unexplained / symbols.noise_power)
    # The best common scale of noise and powers, given their ratios, is eliminated exactly.
    n_rows = measurement.n_rows
    mean = (symbols.unexplained / n_rows).maximum(symbols.rounding)
    return 2.0 * symbols.logdet + 2.0 * n_rows * torch.log(mean)
