"""R_blend: the one function that training, validation and inference build it with."""

from __future__ import annotations

import torch
from torch import Tensor

from model.features import Features
from model.prediction import Prediction
from physics.covariance import BlendConfig, LowRankCovariance, blend


def blended_covariance(
    prediction: Prediction,
    features: Features,
    config: BlendConfig,
    generator: torch.Generator | None = None,
) -> LowRankCovariance:
    """``R_blend = (1 - beta) R_pred + beta R_samp`` of a batch, trace N.

    Args:
        prediction: the network's.
        features: of the same scenes; R_samp comes from their ridge solutions.
        config: beta, jitter and shrinkage.
        generator: CPU generator of a training; each scene's beta is then drawn uniformly within
            beta +- jitter and clamped to [0, 1]. Without it beta is exact, as in inference.
    """
    beta: float | Tensor = config.beta
    if generator is not None and config.jitter:
        unit = torch.rand(features.y.shape[0], generator=generator)
        drawn = config.beta + config.jitter * (2.0 * unit - 1.0)
        beta = drawn.clamp(0.0, 1.0).to(features.y.device)
    measured = features.measured_covariance(config.shrinkage)
    return blend(prediction.covariance, measured, beta)
