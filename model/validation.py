"""Scores of a network on the validation scenes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from model.config import TrialConfig
from model.data import Batch
from model.decision import Decision, Judged, choose, judge
from model.decode import detect
from model.loss import ScenesLoss
from model.prediction import Prediction
from physics.covariance import LowRankCovariance, nmse
from physics.detections import Detections
from physics.geometry import PlanarArray
from physics.metrics import gospa, match
from physics.spectrum import PolarGrid

_BATCH = 128

Predict = Callable[[Batch], tuple[Prediction, LowRankCovariance]]


def score_validation(
    predict: Predict,
    validation: Batch,
    loss: ScenesLoss,
    config: TrialConfig,
    array: PlanarArray,
    grid: PolarGrid,
) -> tuple[dict[str, float], Decision | None]:
    """Metrics of predictions, and the decision that is best for these scenes.

    Args:
        predict: prediction and R_blend of a batch.
        validation: all validation scenes.
        loss: of the training, for the likelihood.
        config: the trial.
        array: the surface.
        grid: where the peaks of MUSIC are searched.

    Returns:
        The metrics of :meth:`model.training.Trainer.validate`, and the decision that selected the
        sources; None if none was needed, or if the weights diverged and locate nothing.
    """
    scenes, wavefront, goal = validation.scenes, config.scene.wavefront, config.decision.goal
    pred, blended_error, nll, found, judged = [], [], [], [], []
    size = -(-_BATCH // config.training.accumulation)
    for start in range(0, len(scenes), size):
        part = validation[slice(start, start + size)]
        prediction, blended = predict(part)
        truth = part.scenes.covariance(array, wavefront)
        pred.append(nmse(prediction.covariance, truth).double())
        blended_error.append(nmse(blended, truth).double())
        if not bool(torch.isfinite(blended_error[-1]).all()):
            continue
        nll.append(loss.nll(prediction, part.scenes, config.scene))
        if prediction.cells is not None:
            judged.append(judge(prediction, goal))
        else:
            found.append(detect(prediction, blended, grid, array, wavefront))
    located = decision = None
    if len(judged) == len(pred):
        everything = Judged.concatenate(judged)
        decision = choose(everything, scenes, goal)
        located = everything.named(decision)
    elif len(found) == len(pred):
        located = Detections.concatenate(found)
    sources = scenes.position, scenes.present
    # R_pred always has trace N, so its error is meaningless for empty scenes.
    occupied = scenes.present.any(-1) if bool(scenes.present.any()) else slice(None)
    matching = match(located, *sources) if located else None
    return {
        "nmse_pred": float(torch.cat(pred)[occupied].mean()),
        "nmse_blend": float(torch.cat(blended_error)[occupied].mean()),
        "nll": float(torch.cat(nll).mean()) if located else math.nan,
        "count_accuracy": matching.count_accuracy if matching else math.nan,
        "f1": matching.f1 if matching else math.nan,
        "gospa": float(gospa(located, *sources).total.double().mean()) if located else math.nan,
    }, decision
