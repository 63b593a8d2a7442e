"""What the network sees: physics computed from a measurement, in full precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from physics.candidates import Candidates
from physics.covariance import LowRankCovariance
from physics.precision import in_full_precision
from physics.scaling import column_energy
from physics.tikhonov import TikhonovConfig, solve_unchecked

_LOADING = 0.1  # of the adaptive spectrum, relative to the mean diagonal


@dataclass(frozen=True)
class Features:
    """Input of the network for B scenes; everything is free of the scale of H and y."""

    ridge: Tensor  # (B, L, N) complex, ridge solutions of unit mean power
    codes: Tensor  # (B, L, N) complex
    y: Tensor  # (B, L, M) complex, unit mean power
    H: Tensor  # (B, M, N) complex, unit mean power
    spectrum: Tensor  # (B, 2 or 3, G) logarithms of spectra on the dictionary, mean 0
    snr_db: Tensor  # (B,) real; NaN where unknown
    n_fallbacks: int  # scenes that the solver's SVD fallback served
    candidates: Candidates | None = None  # of the networks that judge them

    def measured_covariance(self, shrinkage: float = 0.0) -> LowRankCovariance:
        """R_samp of the same ridge solutions, trace N."""
        # The ridge solutions of a scene have unit mean power, or are zero throughout.
        return LowRankCovariance(self.ridge.mT).normalized(moderate=True).shrunk(shrinkage)


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
    adaptive: bool = False,
) -> Features:
    """Ridge solutions and their matched-filter spectra over a dictionary of positions.

    The two spectra are the incoherent ``mean_l |a_g^H a_l|^2``, the statistic of fluctuating
    sources, and the coherent ``|a_g^H mean_l a_l|^2``, the one of constant sources; both enter as
    logarithms around their mean. The adaptive one is MVDR's, ``1 / a_g^H (R_samp + I/10)^-1 a_g``
    with R_samp at trace N.

    Args:
        y: (B, L, M) complex.
        H: (B, M, N) complex.
        codes: (B, L, N) complex.
        snr_db: (B,) real; NaN where unknown.
        dictionary: (G, N) complex steering vectors.
        tikhonov: how the ridge solutions are computed.
        unit_modulus: what is known of the codes; None looks.
        candidates: of the same scenes, where the network judges them.
        adaptive: whether the adaptive spectrum is computed too.
    """
    ridge, report = solve_unchecked(
        y, H, codes, tikhonov.regularization, tikhonov.solver, unit_modulus
    )
    ridge, y, H = _unit_power(ridge), _unit_power(y), _unit_power(H)
    matched = ridge @ dictionary.mH  # (B, L, G)
    incoherent = torch.view_as_real(matched).square().sum(-1).mean(-2)
    coherent = torch.view_as_real(matched.mean(-2)).square().sum(-1)
    spectra = [incoherent, coherent]
    if adaptive:
        spectra.append(_adaptive(ridge, matched))
    spectrum = torch.stack(spectra, dim=1)
    eps = torch.finfo(spectrum.dtype).eps
    floor = (eps * spectrum.amax(-1, keepdim=True)).clamp_min(eps)
    log_spectrum = torch.log(spectrum.clamp_min(floor))
    return Features(
        ridge=ridge,
        codes=codes,
        y=y,
        H=H,
        spectrum=log_spectrum - log_spectrum.mean(-1, keepdim=True),
        snr_db=snr_db,
        n_fallbacks=report.n_fallbacks,
        candidates=candidates,
    )


def _adaptive(ridge: Tensor, matched: Tensor) -> Tensor:
    """MVDR spectrum (B, G) of R_samp loaded by a tenth of its mean diagonal.

    With ``R = F F^H`` of the L ridge solutions, ``a^H (R + d I)^-1 a`` is
    ``(1 - (F^H a)^H (F^H F + d I)^-1 F^H a) / d`` (Woodbury), for ``|a| = 1``.
    """
    n_snapshots = ridge.shape[-2]
    gram = ridge.conj() @ ridge.mT / n_snapshots
    load = _LOADING * torch.eye(n_snapshots, dtype=gram.dtype, device=gram.device)
    cholesky = torch.linalg.cholesky_ex(gram + load)[0]
    seen = matched.conj() / n_snapshots**0.5
    inside = column_energy(torch.linalg.solve_triangular(cholesky, seen, upper=False))
    return (1.0 - inside).clamp_min(torch.finfo(inside.dtype).eps).reciprocal()


def _unit_power(value: Tensor) -> Tensor:
    """Scale each scene to unit mean power; a zero scene stays zero."""
    peak = value.abs().amax((-2, -1), keepdim=True)
    value = value / torch.where(peak > 0, peak, torch.ones_like(peak))
    power = torch.view_as_real(value).square().sum(-1).mean((-2, -1), keepdim=True)
    return value / torch.where(power > 0, power, torch.ones_like(power)).sqrt()
