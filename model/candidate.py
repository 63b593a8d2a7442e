"""The candidate network: it rates the sources that matching pursuit proposes."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from model.features import Features, Spectrum, moderate_level
from model.prediction import AttentionConfig, Prediction, SourceNetwork
from physics.candidates import CandidateConfig, Candidates
from physics.config import Adjustable
from physics.geometry import PlanarArray
from physics.precision import full_precision
from physics.scene import SceneConfig

_FARTHEST = math.radians(9.0)  # largest correction of a direction


class CandidateNetworkConfig(AttentionConfig):
    """Sizes of the candidate network."""

    method: ClassVar[str] = "candidates of matching pursuit, judged"

    family: Literal["candidate"] = Field(
        "candidate", description="judges matching pursuit's candidates"
    )
    depth: int = Field(1, ge=1, description="encoder layers over the candidates")
    dropout: Adjustable[float] = Field(0.0, ge=0, lt=1, description="dropout rate")
    candidates: CandidateConfig = CandidateConfig()

    @property
    def front_end(self) -> CandidateConfig:
        """Matching pursuit's candidates."""
        return self.candidates

    @property
    def spectra(self) -> tuple[Spectrum, ...]:
        """Empty: the network reads candidates instead."""
        return ()

    @property
    def slots(self) -> int:
        """Largest number of sources that the network can predict."""
        return self.candidates.count


class CandidateNetwork(SourceNetwork):
    """Rates the candidates of an overcomplete matching pursuit, each in the context of the others.

    A slot is a candidate. The network predicts whether a source lies in its direction, tempers and
    tilts the likelihood of its range, corrects its power, widens or narrows the ellipse of its
    direction and the interval of its range, and shifts the direction, in units of the fit's
    standard deviations and by at most 9 degrees: where the model is wrong, the best fit lies beside
    the source. A small transformer encoder lets the candidates of a scene attend to one another,
    since the interpretation of one depends on how strong and how near the others are.

    Where candidates were also fitted with other wave models, direction and range likelihood are
    mixtures over all models, weighted by their probabilities: the posterior ones from the fits'
    deviances, tempered and shifted by the network.

    The factor of R_pred is the posterior mean on the manifold: column i is
    ``sqrt(q_i p_i) sum_s w_is a(p_is)`` with existence q, power p and the weights w of the cells.

    Args:
        config: sizes.
        scene: field of view, wavefront and SNR.
        array: the surface.
    """

    gated = True

    def __init__(
        self, config: CandidateNetworkConfig, scene: SceneConfig, array: PlanarArray
    ) -> None:
        super().__init__(config, scene, array)
        self.config = config
        width, n_candidates = config.width, config.candidates.count
        n_cells, n_others = config.candidates.range_cells, len(config.candidates.waves)
        n_inputs = 20 + n_cells + n_candidates + (n_candidates + 1) + 3 + n_others * (5 + n_cells)
        self.token = nn.Linear(n_inputs, width)
        layer = nn.TransformerEncoderLayer(
            width,
            config.heads,
            2 * width,
            config.dropout,
            "gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(
            layer, config.depth, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.existence = nn.Linear(width, 1)
        # Outputs: sharpness of the likelihood; centre, weight and slope of a prior on log range;
        # power; standard deviations of direction and range relative to those of fit and posterior;
        # the direction's step, as scale and two coordinates; sharpness of the evidence for the
        # other wave models and the offsets added to it.
        self.judgement = nn.Linear(width, 10 + (1 + n_others if n_others else 0))
        nn.init.zeros_(self.judgement.weight)
        nn.init.zeros_(self.judgement.bias)

    def forward(self, features: Features) -> Prediction:
        """Predict B scenes. Runs under autocast and returns full precision."""
        found = features.candidates
        if found is None:
            raise ValueError("features hold no candidates; this network needs find_candidates")
        with full_precision():
            inputs = torch.cat(
                [_of_candidates(found), _of_scenes(found, features.snr_db), _of_others(found)],
                dim=-1,
            )
        hidden = self.encoder(self.token(inputs))
        existence = self.existence(hidden).squeeze(-1)
        judgement = self.judgement(hidden)
        with full_precision():
            existence, judgement = existence.float(), judgement.float()
            sharpness, centre, weight, slope, log_power, log_spread, log_interval, log_scale = (
                judgement[..., :8].unbind(-1)
            )
            log_range = torch.log(found.range_m)
            prior = (
                slope.unsqueeze(-1) * log_range
                - 4.0
                * functional.softplus(weight.unsqueeze(-1) - 2.0)
                * (log_range - 1.5 - centre.unsqueeze(-1)).square()
            )
            # softplus(0.54) is 1, which leaves the likelihood unchanged.
            sharpness = functional.softplus(sharpness.unsqueeze(-1) + 0.54)
            log_share = _log_shares(found, judgement[..., 10:])  # (B, P, 1 + W)
            evidence = torch.cat(
                [found.range_evidence.unsqueeze(2), found.other_range_evidence], dim=2
            )
            by_model = torch.log_softmax(sharpness.unsqueeze(-1) * evidence, dim=-1)
            mixed = torch.logsumexp(log_share.unsqueeze(-1) + by_model, dim=2)
            log_pointer = torch.log_softmax(mixed + prior, dim=-1)
            direction, apart = _mixed(found, log_share.exp())
            step = (_std_of(found) * log_scale.exp().unsqueeze(-1)) * judgement[..., 8:10]
            direction = direction + _FARTHEST * torch.tanh(step / _FARTHEST)
            cells = _cells(direction, found.range_m)
            pointer = log_pointer.exp()
            log_weight = functional.logsigmoid(existence) + log_power + _log(found.power)
            factor = self.manifold_factor(cells, pointer, log_weight)
            position = torch.cat(
                [direction, (pointer / found.range_m).sum(-1, keepdim=True)], dim=-1
            )
            spread = (2.0 * log_spread).exp()[..., None, None]
            angles = spread * (found.covariance[..., :2, :2] + apart)
        return Prediction(
            factor, existence, log_pointer, position, cells, angles, log_interval.exp()
        )


def _cells(direction: Tensor, ranges: Tensor) -> Tensor:
    """Azimuth, elevation [rad] and range [m] (B, P, S, 3) of every candidate's cells."""
    directions = direction.unsqueeze(-2).expand(*ranges.shape, 2)
    return torch.cat([directions, ranges.unsqueeze(-1)], dim=-1)


def _std_of(found: Candidates) -> Tensor:
    """The fit's standard deviations (B, P, 2) of the directions [rad], at most the largest step."""
    variance = found.covariance[..., :2, :2].diagonal(dim1=-2, dim2=-1)
    return variance.clamp_min(0.0).sqrt().clamp_max(_FARTHEST)


def _mixed(found: Candidates, share: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B, P, 2) and covariance (B, P, 2, 2) of the directions over all wave models.

    Args:
        found: candidates.
        share: (B, P, 1 + W) probabilities of the models, the nominal one first.
    """
    nominal = found.coordinates.unsqueeze(2)
    directions = torch.cat([nominal, found.other_coordinates], dim=2)[..., :2]
    mean = (share.unsqueeze(-1) * directions).sum(2)
    off = share.sqrt().unsqueeze(-1) * (directions - mean.unsqueeze(2))
    return mean, off.mT @ off


def _log_shares(found: Candidates, said: Tensor) -> Tensor:
    """Log probabilities (B, P, 1 + W) of the wave models, the nominal one first.

    Where ``said`` is zero, these are the fits' posterior probabilities under a uniform prior.

    Args:
        found: candidates.
        said: (B, P, 1 + W): sharpness, and an offset for each of the other models; empty if there
            are none.
    """
    sharpness = functional.softplus(said[..., :1] + 0.54)
    logit = sharpness * _wave_evidence(found).unsqueeze(1) + said[..., 1:]
    nominal = torch.zeros_like(found.power).unsqueeze(-1)
    return torch.log_softmax(torch.cat([nominal, logit], dim=-1), dim=-1)


def _wave_evidence(found: Candidates) -> Tensor:
    """Log-likelihood ratios (B, W) of the other wave models, clamped to +-20."""
    return found.wave_evidence.clamp(-20.0, 20.0)


def _log(value: Tensor) -> Tensor:
    return torch.log(value.clamp(1e-9, 1e9))


def _compressed(value: Tensor) -> Tensor:
    """Compress values: logarithmic for large ones of either sign, linear around 0."""
    return value.sign() * torch.log1p(value.abs())


def _of_candidates(found: Candidates) -> Tensor:
    """Inputs (B, P, 20 + S + P) of order 1, per candidate."""
    log_likelihood = torch.log_softmax(found.range_evidence, dim=-1)
    n_candidates = found.power.shape[1]
    azimuth, elevation, inverse_range = found.coordinates.unbind(-1)
    log_power = _log(found.power)
    eye = torch.eye(n_candidates, dtype=log_power.dtype, device=log_power.device)
    coherence = found.coherence * (1.0 - eye)
    stronger = log_power.unsqueeze(-2) > log_power.unsqueeze(-1)
    likelihood = log_likelihood.exp()
    ranges = found.range_m
    mean = (likelihood * ranges).sum(-1)
    spread = ((likelihood * (ranges - mean.unsqueeze(-1)).square()).sum(-1) + 1e-4).sqrt()
    gain = 0.5 * (found.deviance[:, :-1] - found.deviance[:, 1:])
    std = found.covariance.diagonal(dim1=-2, dim2=-1).clamp(1e-10, 1e2).log() * 0.5
    single = torch.stack(
        [
            2.0 * azimuth,
            4.0 * elevation,
            torch.log(inverse_range),
            (log_power - torch.logsumexp(log_power, -1, keepdim=True)) / 2.0,
            _log(found.received) / 2.0 - 1.0,
            _compressed(found.evidence) / 2.0 - 1.0,
            _compressed(found.crowded) / 2.0 - 1.0,
            found.likely.to(log_power.dtype),
            _compressed(gain) / 2.0 - 1.0,
            2.0 * coherence.amax(-1) - 1.0,
            2.0 * (coherence * stronger).amax(-1) - 1.0,
            mean / 4.0 - 1.0,
            torch.log(spread),
            ranges[..., 0] / 4.0 - 1.0,
            ranges[..., -1] / 4.0 - 1.0,
            torch.log(mean),
            log_power / 4.0,
        ],
        dim=-1,
    )
    order = eye.expand(len(found), -1, -1)
    shape = log_likelihood.clamp_min(-12.0) / 4.0 + 1.0
    return torch.cat([single, std / 2.0 + 2.0, shape, order], dim=-1)


def _of_scenes(found: Candidates, snr_db: Tensor) -> Tensor:
    """Inputs (B, P, P + 1 + 3) of order 1, the same for all candidates of a scene."""
    fit = 0.5 * (found.deviance - found.deviance.amin(-1, keepdim=True))
    unknown = torch.isnan(snr_db)
    level = moderate_level(snr_db, ~unknown)
    rest = torch.stack([level, unknown.to(level.dtype), 5.0 * _log(found.misfit)], dim=-1)
    whole = torch.cat([_compressed(fit) / 3.0 - 1.0, rest.clamp(-5.0, 5.0)], dim=-1)
    return whole.unsqueeze(1).expand(-1, found.power.shape[1], -1)


def _of_others(found: Candidates) -> Tensor:
    """Inputs (B, P, W (5 + S)) of order 1: the fits with the other wave models."""
    away = found.other_coordinates - found.coordinates.unsqueeze(2)
    moved = _compressed(away[..., :2] / _std_of(found).clamp_min(1e-5).unsqueeze(2)) / 2.0
    bent = _log(found.other_coordinates[..., 2]) - _log(found.coordinates[..., 2]).unsqueeze(2)
    evidence = _compressed(found.other_evidence) / 2.0 - 1.0
    waves = (_wave_evidence(found) / 5.0).unsqueeze(1).expand_as(evidence)
    shape = torch.log_softmax(found.other_range_evidence, dim=-1).clamp_min(-12.0) / 4.0 + 1.0
    single = torch.stack([bent, evidence, waves], dim=-1)
    return torch.cat([moved, single, shape], dim=-1).flatten(2)
