"""What trials that were stopped, or still run, would end with: from those that came further.

Samplers that model the objective (a Gaussian process) know finished trials alone. A scheduler stops
most trials early, so that they would learn from few, and the few are the best. How a trial stood
when it was last heard of says much of its end: the ends of all that came further are regressed on
how those stood at that same epoch, and the line gives the end that is expected of it.

It is what a sampler is told and nothing else: no expected end is recorded, shown or ranked.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
from optuna.trial import FrozenTrial, TrialState

_SLOPES = (0.2, 1.0)  # of the line: differences may shrink towards the end, not turn round or grow
_RIDGE = 0.01  # of the variance: few points that stand alike are no slope
_FEWEST = 3  # trials that make a line; with fewer, differences are taken as they are


def with_expected_ends(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials, with those that have not finished completed by the end that is expected of them.

    Args:
        trials: of one objective that is minimised, which reports its best value so far by epoch.

    Returns:
        The same trials in the same order; of those that were stopped or run, have reported and
        have had somebody come further, copies that are COMPLETE.
    """
    ends = expected_ends(trials)
    found = []
    for trial in trials:
        if trial.number in ends and trial.state != TrialState.COMPLETE:
            trial = copy.copy(trial)
            trial.state = TrialState.COMPLETE
            trial.values = [ends[trial.number]]
        found.append(trial)
    return found


def expected_ends(trials: Sequence[FrozenTrial]) -> dict[int, float]:
    """Last objectives by the trial's number: those reached of finished trials, expected of others.

    Trials are taken from the one that came furthest on: who is expected to end somewhere helps to
    tell where those will who came less far.
    """
    heard = [t for t in trials if t.state != TrialState.FAIL and t.intermediate_values]
    ends = {t.number: float(t.values[0]) for t in trials if t.state == TrialState.COMPLETE}
    further = [t for t in heard if t.number in ends]
    others = [t for t in heard if t.number not in ends]
    for epoch in sorted({_reached(t) for t in others}, reverse=True):
        here = [t for t in others if _reached(t) == epoch]
        if further:
            stood = np.array([_standing(t, epoch) for t in further])
            ended = np.array([ends[t.number] for t in further])
            slope = _slope(stood, ended)
            for trial in here:
                reached = _standing(trial, epoch)
                ends[trial.number] = min(
                    reached, float(ended.mean() + slope * (reached - stood.mean()))
                )
            further += here
    return ends


def _slope(stood: np.ndarray, ended: np.ndarray) -> float:
    if len(stood) < _FEWEST:
        return _SLOPES[1]
    x, y = stood - stood.mean(), ended - ended.mean()
    spread = float((x**2).sum())
    if spread == 0.0:
        return _SLOPES[1]
    return float(np.clip((x * y).sum() / ((1.0 + _RIDGE) * spread), *_SLOPES))


def _reached(trial: FrozenTrial) -> int:
    return max(trial.intermediate_values)


def _standing(trial: FrozenTrial, epoch: int) -> float:
    """The best value up to an epoch; of one that was first heard of later, its first."""
    values = trial.intermediate_values
    before = [value for step, value in values.items() if step <= epoch]
    return min(before) if before else values[min(values)]
