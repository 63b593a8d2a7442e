"""R_blend: the function with which training, validation and inference build it."""

from __future__ import annotations

import torch
from torch import Tensor

from model.features import Features
from model.prediction import Prediction
from physics.blend import BlendConfig, blend
from physics.covariance import LowRankCovariance


def jittered_beta(n_scenes: int, config: BlendConfig, generator: torch.Generator) -> Tensor | None:
    """A beta (B,) for each scene of a training step, uniform within beta +- jitter and in [0, 1].

    Args:
        n_scenes: B, of the whole step.
        config: beta and jitter; without jitter None is returned.
        generator: CPU generator of the training.
    """
    if not config.jitter:
        return None
    unit = torch.rand(n_scenes, generator=generator)
    return (config.beta + config.jitter * (2.0 * unit - 1.0)).clamp(0.0, 1.0)


def blended_covariance(
    prediction: Prediction, features: Features, config: BlendConfig, beta: Tensor | None = None
) -> LowRankCovariance:
    """``R_blend = (1 - beta) R_pred + beta R_samp`` of a batch, trace N.

    Args:
        prediction: the network's.
        features: of the same scenes; R_samp comes from their ridge solutions.
        config: beta and shrinkage.
        beta: (B,) of a training step, on the CPU, see :func:`jittered_beta`; None uses
            ``config.beta``, as inference does.
    """
    measured = features.measured_covariance(config.shrinkage)
    return blend(prediction.covariance, measured, config.beta if beta is None else beta)
