"""What trials that were stopped, or still run, would end with: from those that came further.

Samplers that model the objective (a Gaussian process) know finished trials alone. A scheduler stops
most trials early, so that they would learn from few, and the few are the best. How a trial stood
when it was last heard of says much of its end: the ends of all that came further are regressed on
how those stood at that same epoch, and the line gives the end that is expected of it.

Expected ends are what a sampler is told and what `search.least_chance` judges by; none is recorded,
shown or ranked.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence

import numpy as np
from optuna.trial import FrozenTrial, TrialState
from scipy.special import stdtr

from tuner.records import REPEATS

_SLOPES = (0.2, 1.0)  # of the line: differences may shrink towards the end, not turn round or grow
_RIDGE = 0.01  # of the variance: few points that stand alike are no slope
_FEWEST = 3  # trials that make a line; with fewer, differences are taken as they are
_FAR = 10.0  # times the middle trial's distance from the first: what stood there is on no line


def with_expected_ends(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials, with those that have not finished completed by the end that is expected of them.

    Of those that failed it is the worst of the finished ones: a model that knew nothing of them
    would propose the same again. Repetitions have what they repeat has.

    Args:
        trials: of one objective that is minimised, which reports its best value so far by epoch.

    Returns:
        The same trials in the same order; of those that failed, and of those that were stopped or
        run, have reported and have had somebody come further, copies that are COMPLETE.
    """
    ends = expected_ends(trials)
    reached = [float(t.values[0]) for t in trials if t.state == TrialState.COMPLETE]
    for trial in trials if reached else ():
        if trial.state == TrialState.FAIL and trial.params:
            twin = int(trial.user_attrs.get(REPEATS, -1))  # of one that was not run
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


class Finished:
    """Trials that have finished: what the chances of others are judged by.

    How they stood at an epoch is looked up once, so that a judgement costs little among thousands.

    Args:
        trials: that have finished, of one objective that is minimised.
    """

    def __init__(self, trials: Iterable[FrozenTrial] = ()) -> None:
        self._trials: list[FrozenTrial] = []
        self._ends: list[float] = []
        self._stood: dict[int, list[float]] = {}  # by epoch, as far as it was asked for
        for trial in trials:
            self.add(trial)

    def add(self, trial: FrozenTrial) -> None:
        """Another one has."""
        self._trials.append(trial)
        self._ends.append(float(trial.values[0]))

    def stood(self, epoch: int) -> np.ndarray:
        """Their best values up to an epoch."""
        known = self._stood.setdefault(epoch, [])
        known += [_standing(trial, epoch) for trial in self._trials[len(known) :]]
        return np.array(known)

    def why_hopeless(self, epoch: int, reached: float, wanted: int, least: float) -> str | None:
        """Why a trial is not worth its further epochs; None where it is, or too few trials tell.

        Args:
            epoch: that the trial has come to.
            reached: its best objective so far.
            wanted: so many of the best are of use.
            least: the chance to be one of them that a trial must have.

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
        """The chance of a trial that stands so to end below a target; 1 where too few trials tell.

        The line is that of :func:`expected_ends`, with the spread around it of those that have
        finished: Student's t of a new point (n - 2 degrees of freedom, so that few are trusted
        little). Who stood far behind at that epoch is left out: one such would decide where the
        line lies. Where all stood alike there is none.
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
    """The best value up to an epoch; of one that was first heard of later, its first."""
    values = trial.intermediate_values
    before = [value for step, value in values.items() if step <= epoch]
    return min(before) if before else values[min(values)]
