"""Predicts final objectives of stopped and running trials from trials that trained longer.

Samplers that model the objective (a Gaussian process) use only finished trials. A scheduler stops
most trials early, so that these samplers would learn from few trials, and only from the best. The
last reported objective of a trial is a good predictor of its final one: the final objectives of all
trials that trained longer are regressed on their objectives at that same epoch, and the regression
line gives the expected final objective.

The predictions are used by samplers and `search.least_chance` only; they are never recorded, shown
or ranked.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence

import numpy as np
from optuna.trial import FrozenTrial, TrialState
from scipy.special import stdtr

from tuner.records import REPEATS

_SLOPES = (0.2, 1.0)  # slope bounds: differences may shrink towards the end, not reverse or grow
_RIDGE = 0.01  # share of the variance added: a few similar points give no slope
_FEWEST = 3  # trials needed for a line; with fewer, the slope is 1
_FAR = 10.0  # times the median's distance from the best; trials beyond it are excluded from the fit


def with_expected_ends(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials, with unfinished ones completed by their expected final objectives.

    Failed trials get the worst objective of the finished ones, as a model without them would
    propose the same point again. Repetitions get the objective of the trial they repeat.

    Args:
        trials: trials of a single minimised objective that report the best value so far by epoch.

    Returns:
        The same trials in the same order. Failed trials, and stopped or running ones that have
        reported and that another trial has outlasted, are replaced by COMPLETE copies.
    """
    ends = expected_ends(trials)
    reached = [float(t.values[0]) for t in trials if t.state == TrialState.COMPLETE]
    for trial in trials if reached else ():
        if trial.state == TrialState.FAIL and trial.params:
            twin = int(trial.user_attrs.get(REPEATS, -1))  # of a proposal that was not run
            ends[trial.number] = ends.get(twin, max(reached))
    found = []
    for trial in trials:
        if trial.number in ends and trial.state != TrialState.COMPLETE:
            trial = copy.copy(trial)
            trial.state = TrialState.COMPLETE
            trial.values = [ends[trial.number]]
        found.append(trial)
    return found


def expected_ends(trials: Sequence[FrozenTrial]) -> dict[int, float]:
    """Return final objectives by trial number: actual for finished trials, expected for others.

    Trials are processed in descending order of their last epoch, and the prediction of a trial is
    used for those that trained less.
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


class Finished:
    """The finished trials, from which the chances of other trials are estimated.

    Their objectives at an epoch are cached, so that an estimate is cheap with thousands of trials.

    Args:
        trials: finished trials of a single minimised objective.
    """

    def __init__(self, trials: Iterable[FrozenTrial] = ()) -> None:
        self._trials: list[FrozenTrial] = []
        self._ends: list[float] = []
        self._stood: dict[int, list[float]] = {}  # by epoch, filled on request
        for trial in trials:
            self.add(trial)

    def add(self, trial: FrozenTrial) -> None:
        """Add a finished trial."""
        self._trials.append(trial)
        self._ends.append(float(trial.values[0]))

    def stood(self, epoch: int) -> np.ndarray:
        """Return the trials' best values up to an epoch."""
        known = self._stood.setdefault(epoch, [])
        known += [_standing(trial, epoch) for trial in self._trials[len(known) :]]
        return np.array(known)

    def why_hopeless(self, epoch: int, reached: float, wanted: int, least: float) -> str | None:
        """Return why a trial should stop; None to continue, or if too few trials have finished.

        Args:
            epoch: last epoch of the trial.
            reached: best objective of the trial so far.
            wanted: number of best trials that matter.
            least: minimum chance of being among them.

        Source: the criterion, to stop where P(end < best) is small, is that of Domhan, Springenberg
        and Hutter, "Speeding up automatic hyperparameter optimization of deep neural networks by
        extrapolation of learning curves", IJCAI 2015; they extrapolate the trial's own curve.
        """
        if len(self._ends) < wanted:
            return None
        target = float(np.partition(self._ends, wanted - 1)[wanted - 1])
        chance = self.chance_below(target, epoch, reached)
        if chance >= least:
            return None
        return (
            f"stopped after epoch {epoch} at {reached:.5g}: its chance to end below {target:.5g} "
            f"was {100 * chance:.2g} %"
        )

    def chance_below(self, target: float, epoch: int, reached: float) -> float:
        """Return the chance that a trial ends below a target; 1 if too few trials have finished.

        The regression line is that of :func:`expected_ends`, with the spread of the finished trials
        around it: Student's t of a new point (n - 2 degrees of freedom, so that few trials give a
        wide distribution). Trials that were far behind at that epoch are excluded, as one of them
        could determine the line. If all trials had the same value there is no line.
        """
        if reached < target or len(self._ends) < _FEWEST:
            return 1.0
        stood, ended = self.stood(epoch), np.array(self._ends)
        middle, first = float(np.median(stood)), float(stood.min())
        near = stood <= middle + _FAR * (middle - first)
        stood, ended, n = stood[near], ended[near], int(near.sum())
        if n < _FEWEST or not np.ptp(stood):
            return 1.0
        slope, away = _slope(stood, ended), reached - float(stood.mean())
        off = ended - ended.mean() - slope * (stood - stood.mean())
        spread = float(((stood - stood.mean()) ** 2).sum())
        variance = float((off**2).sum()) / (n - 2)
        deviation = math.sqrt(variance * (1 + 1 / n + away**2 / spread))
        room = target - min(reached, float(ended.mean()) + slope * away)
        return float(stdtr(n - 2, room / deviation)) if deviation else float(room > 0)


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
    """Return the best value up to an epoch, or the first value if it was reported later."""
    values = trial.intermediate_values
    before = [value for step, value in values.items() if step <= epoch]
    return min(before) if before else values[min(values)]
