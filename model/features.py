"""Inputs of the network: physics computed from a measurement, in full precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from physics.candidates import Candidates
from physics.covariance import LowRankCovariance
from physics.precision import in_full_precision
from physics.scaling import column_energy, divide, divisor, energy, peak, power
from physics.tikhonov import TikhonovConfig, solve_trusting, solve_unchecked, zero_non_finite

Spectrum = Literal["incoherent", "coherent", "adaptive"]

_QUIET, _LOUD = -30.0, 50.0  # dB to which an SNR is clamped
_LOADING = 0.1  # of the adaptive spectrum, relative to the mean diagonal


@dataclass(frozen=True)
class Features:
    """Input of the network for B scenes; all of it is independent of the scale of H and y."""

    ridge: Tensor  # (B, L, N) complex, ridge solutions of unit mean power
    codes: Tensor  # (B, L, N) complex
    y: Tensor  # (B, L, M) complex, unit mean power
    H: Tensor  # (B, M, N) complex, unit mean power
    spectrum: Tensor  # (B, S, G) logarithms of the requested spectra on the dictionary, mean 0
    snr_db: Tensor  # (B,) real; NaN where unknown
    fell_back: Tensor  # (B,) bool, scenes that used, or need, the solver's SVD fallback
    candidates: Candidates | None = None  # for networks that rate them

    def measured_covariance(self, shrinkage: float = 0.0) -> LowRankCovariance:
        """R_samp of the same ridge solutions, trace N."""
        # The ridge solutions of a scene have unit mean power, or are zero throughout.
        return LowRankCovariance(self.ridge.mT).normalized(moderate=True).shrunk(shrinkage)


def moderate_level(snr_db: Tensor, known: Tensor) -> Tensor:
    """SNR (B,) in tens of dB, as input of networks: within -3..5, and 0 where it is unknown.

    Args:
        snr_db: (B,) [dB].
        known: (B,) bool.
    """
    return torch.where(known, snr_db.clamp(_QUIET, _LOUD), 0.0) / 10.0


@in_full_precision
@torch.no_grad()
def compute_features(
    y: Tensor,
    H: Tensor,
    codes: Tensor,
    snr_db: Tensor,
    *,
    dictionary: Tensor,
    tikhonov: TikhonovConfig,
    unit_modulus: bool | None = None,
    candidates: Candidates | None = None,
    spectra: tuple[Spectrum, ...] = ("incoherent", "coherent"),
    spectrum: Tensor | None = None,
    trusting: bool = False,
) -> Features:
    """Ridge solutions and their spectra over a dictionary of positions.

    The matched-filter spectra are the incoherent ``mean_l |a_g^H a_l|^2``, the statistic for
    fluctuating sources, and the coherent ``|a_g^H mean_l a_l|^2``, the one for constant sources.
    The adaptive one is MVDR's, ``1 / a_g^H (R_samp + I/10)^-1 a_g`` with R_samp at trace N. All
    enter as logarithms around their mean. NaN and Inf of a measurement count as zeros.

    Args:
        y: (B, L, M) complex.
        H: (B, M, N) complex.
        codes: (B, L, N) complex.
        snr_db: (B,) real; NaN where unknown.
        dictionary: (G, N) complex steering vectors.
        tikhonov: how the ridge solutions are computed.
        unit_modulus: whether the codes are known to have unit modulus; None checks them.
        candidates: of the same scenes, if the network rates them.
        spectra: the spectra to compute, in order.
        spectrum: (B, S, G) from :func:`compute_spectra`, if already computed.
        trusting: do not wait to check whether the SVD fallback is needed. Features of scenes that
            need it are then undefined; if there are any, recompute all features without this.
    """
    how = tikhonov.regularization, tikhonov.solver, unit_modulus
    if trusting:
        ridge, fell_back = solve_trusting(y, H, codes, *how)
    else:
        ridge, report = solve_unchecked(y, H, codes, *how)
        fell_back = report.fell_back
        if report.n_fallbacks:  # possibly because of NaN or Inf, which count as zeros here too
            y, H, codes = (zero_non_finite(t) for t in (y, H, codes))
    ridge, y, H = _unit_power(ridge), _unit_power(y), _unit_power(H)
    if spectrum is None:
        spectrum = _log_spectra(ridge, dictionary, spectra)
    return Features(
        ridge=ridge,
        codes=codes,
        y=y,
        H=H,
        spectrum=spectrum,
        snr_db=snr_db,
        fell_back=fell_back,
        candidates=candidates,
    )


@in_full_precision
@torch.no_grad()
def compute_spectra(
    y: Tensor,
    H: Tensor,
    codes: Tensor,
    dictionary: Tensor,
    tikhonov: TikhonovConfig,
    spectra: tuple[Spectrum, ...],
) -> Tensor:
    """Only the spectra (B, S, G) of :func:`compute_features`, with the same arguments."""
    ridge, _ = solve_unchecked(y, H, codes, tikhonov.regularization, tikhonov.solver)
    return _log_spectra(_unit_power(ridge), dictionary, spectra)


def _log_spectra(ridge: Tensor, dictionary: Tensor, wanted: tuple[Spectrum, ...]) -> Tensor:
    """Logarithms (B, S, G) around their mean."""
    if not wanted:
        return ridge.real.new_zeros(ridge.shape[0], 0, dictionary.shape[0])
    matched = ridge @ dictionary.mH  # (B, L, G)
    spectrum = torch.stack([_SPECTRA[name](ridge, matched) for name in wanted], dim=1)
    eps = torch.finfo(spectrum.dtype).eps
    floor = (eps * spectrum.amax(-1, keepdim=True)).clamp_min(eps)
    log_spectrum = torch.log(spectrum.clamp_min(floor))
    return log_spectrum - log_spectrum.mean(-1, keepdim=True)


def _incoherent(ridge: Tensor, matched: Tensor) -> Tensor:
    return power(matched).mean(-2)


def _coherent(ridge: Tensor, matched: Tensor) -> Tensor:
    return power(matched.mean(-2))


def _adaptive(ridge: Tensor, matched: Tensor) -> Tensor:
    """MVDR spectrum (B, G) of R_samp loaded by a tenth of its mean diagonal.

    With ``R = F F^H`` from the L ridge solutions, ``a^H (R + d I)^-1 a`` is
    ``(1 - (F^H a)^H (F^H F + d I)^-1 F^H a) / d`` (Woodbury), for ``|a| = 1``.
    """
    n_snapshots = ridge.shape[-2]
    gram = ridge.conj() @ ridge.mT / n_snapshots
    load = _LOADING * torch.eye(n_snapshots, dtype=gram.dtype, device=gram.device)
    cholesky = torch.linalg.cholesky_ex(gram + load)[0]
    seen = matched.conj() / n_snapshots**0.5
    inside = column_energy(torch.linalg.solve_triangular(cholesky, seen, upper=False))
    return (1.0 - inside).clamp_min(torch.finfo(inside.dtype).eps).reciprocal()


_SPECTRA: dict[Spectrum, Callable[[Tensor, Tensor], Tensor]] = {
    "incoherent": _incoherent,
    "coherent": _coherent,
    "adaptive": _adaptive,
}


def _unit_power(value: Tensor) -> Tensor:
    """Scale each scene to unit mean power; a zero scene stays zero."""
    value = divide(value, divisor(peak(value))[:, None, None])
    mean_power = energy(value) / (value.shape[-2] * value.shape[-1])
    return divide(value, divisor(mean_power).sqrt()[:, None, None])
