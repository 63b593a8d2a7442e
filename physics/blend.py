"""R_blend: the weighted sum of the predicted and the measured covariance."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from physics.checks import as_fraction
from physics.config import Adjustable, FrozenModel
from physics.covariance import LowRankCovariance


class BlendConfig(FrozenModel):
    """How the predicted and the measured covariance are blended."""

    beta: Adjustable[float] = Field(0.30, ge=0, le=1, description="weight of R_samp in R_blend")
    jitter: Adjustable[float] = Field(
        0.05, ge=0, le=1, description="in training, beta is drawn within beta +- jitter"
    )
    shrinkage: Adjustable[float] = Field(
        0.0, ge=0, le=1, description="shrinkage of R_samp towards the identity"
    )


def blend(
    predicted: LowRankCovariance, measured: LowRankCovariance, beta: float | Tensor
) -> LowRankCovariance:
    """``R_blend = (1 - beta) R_pred + beta R_samp``, both brought to trace N first.

    Args:
        predicted: R_pred.
        measured: R_samp.
        beta: weight of R_samp in [0, 1], one for all or (…).

    Raises:
        ValueError: beta outside [0, 1].
    """
    return predicted.mixed(measured, as_fraction("beta", beta, predicted.loading))
