"""What stops trials early in the local mode: Optuna's pruners, whose state lies in the ledger."""

from __future__ import annotations

from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    SuccessiveHalvingPruner,
)

from tuner.config import MEDIAN_OVER, SearchConfig


def make_pruner(search: SearchConfig, epochs: int) -> BasePruner:
    """The pruner that takes the place of the study's scheduler."""
    grace = min(search.grace_epochs, epochs)
    if search.scheduler == "asha":
        return SuccessiveHalvingPruner(min_resource=grace, reduction_factor=search.reduction_factor)
    if search.scheduler == "hyperband":
        return HyperbandPruner(
            min_resource=grace, max_resource=epochs, reduction_factor=search.reduction_factor
        )
    if search.scheduler == "median":
        return MedianPruner(
            n_startup_trials=MEDIAN_OVER, n_warmup_steps=grace, n_min_trials=MEDIAN_OVER
        )
    return NopPruner()
