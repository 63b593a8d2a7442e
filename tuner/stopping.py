"""Early stopping: the schedulers' rules, each a function of the ledger's content.

The rules keep no state of their own: the same ledger always gives the same decision, regardless of
how trials are run and how often the search was interrupted.

Sources: for asynchronous successive halving, Li, Jamieson, Rostamizadeh et al., "A system for
massively parallel hyperparameter tuning", MLSys 2020, in the variant of Ray Tune and Syne Tune,
which stops a trial that is not among the best of a rung instead of pausing it; for the shares of
Hyperband's brackets, Li, Jamieson, DeSalvo, Rostamizadeh and Talwalkar, "Hyperband", JMLR 18
(2018), algorithm 1; for the median rule, Golovin, Solnik, Moitra et al., "Google Vizier", KDD 2017,
section 3.2.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from optuna.trial import FrozenTrial

from tuner.config import MEDIAN_OVER, StudyConfig
from tuner.extrapolation import Finished
from tuner.records import ranks
from tuner.rungs import cut_off, rungs_of

Started = Callable[[], Sequence[FrozenTrial]]


class Rule(Protocol):
    """A stopping rule."""

    def stops(self, number: int, epoch: int, curve: Mapping[int, float], started: Started) -> bool:
        """Return whether a trial stops at an epoch that is not its last.

        Args:
            number: number of the trial.
            epoch: the epoch that it has just finished.
            curve: its objectives by epoch, including this one; lower is better.
            started: returns all started trials of the study in any state, including this one.
        """


def rule_of(study: StudyConfig) -> Rule | None:
    """Return the rule of the study's scheduler; None for `none`, `asha-pausing` and `pbt`."""
    if study.search.scheduler in ("asha", "hyperband"):
        return Halving(study)
    return Median(study) if study.search.scheduler == "median" else None


class Halving:
    """Asynchronous successive halving: a trial that is not among the best of a rung stops there.

    The best of a rung are one in `reduction_factor` of all trials that have reached it before.
    Hyperband has several brackets, each of which starts at a later rung; a trial's bracket is drawn
    from its number and the study's seed, with the shares of the Hyperband paper.
    """

    def __init__(self, study: StudyConfig) -> None:
        search, epochs = study.search, study.training.epochs
        self._rungs = rungs_of(search, epochs)
        self._factor, self._seed = search.reduction_factor, study.seed
        n_brackets = 1
        if search.scheduler == "hyperband":
            # One bracket per rung, and one more if a further rung would be the last epoch.
            grace = min(search.grace_epochs, epochs)
            n_brackets = math.floor(math.log(epochs / grace, self._factor) + 1e-9) + 1
        left = range(n_brackets - 1, -1, -1)  # halvings in a bracket
        sizes = np.array([math.ceil(n_brackets * self._factor**s / (s + 1)) for s in left])
        self._shares = sizes / sizes.sum()
        self._brackets: dict[int, int] = {}  # by trial, filled on request

    def bracket_of(self, number: int) -> int:
        """Return the bracket of a trial, which is the index of its first rung."""
        if len(self._shares) == 1:
            return 0
        if number not in self._brackets:
            sequence = np.random.SeedSequence(self._seed, spawn_key=(2, number))
            drawn = np.random.default_rng(sequence).choice(len(self._shares), p=self._shares)
            self._brackets[number] = int(drawn)
        return self._brackets[number]

    def stops(self, number: int, epoch: int, curve: Mapping[int, float], started: Started) -> bool:
        """See :class:`Rule`."""
        bracket = self.bracket_of(number)
        if epoch not in self._rungs[bracket:]:
            return False
        reached = [
            trial.intermediate_values[epoch]
            for trial in started()
            if trial.number != number
            and epoch in trial.intermediate_values
            and self.bracket_of(trial.number) == bracket
        ]
        wanted = cut_off(reached, self._factor)
        return wanted is not None and curve[epoch] > wanted


class Median:
    """The median stopping rule.

    A trial stops if its best objective is worse than the median of the mean objectives, from
    `grace_epochs` up to this epoch, of all other trials that have reached this epoch.
    """

    def __init__(self, study: StudyConfig) -> None:
        self._grace = min(study.search.grace_epochs, study.training.epochs)

    def stops(self, number: int, epoch: int, curve: Mapping[int, float], started: Started) -> bool:
        """See :class:`Rule`."""
        if epoch < self._grace:
            return False
        others = (trial.intermediate_values for trial in started() if trial.number != number)
        means = [self._mean(known, epoch) for known in others if epoch in known]
        return len(means) >= MEDIAN_OVER and min(curve.values()) > float(np.median(means))

    def _mean(self, curve: Mapping[int, float], epoch: int) -> float:
        """Return the mean objective from the end of the grace period up to an epoch."""
        found = [curve[e] for e in range(self._grace, epoch + 1) if e in curve]
        return sum(found) / len(found)


class Verdicts:
    """Decides which trials of a study stop, by the scheduler's rule and by their chance to win.

    Args:
        study: the configuration.
        started: returns the study's own started trials.
    """

    def __init__(self, study: StudyConfig, started: Callable[[], Sequence[FrozenTrial]]) -> None:
        self._search, self._budget = study.search, study.training.epochs
        self._rule = rule_of(study)
        self._started = started
        self._finished: Finished | None = None  # created on first use

    def of(self, number: int, epoch: int, curve: Mapping[int, float]) -> str | None:
        """Return why a trial stops at an epoch that is not its last; None if it continues.

        Args:
            number: number of the trial.
            epoch: the epoch that it has just finished.
            curve: its objectives by epoch, including this one.
        """
        why = self.hopeless(epoch, curve[epoch])
        if why is None and self._rule and self._rule.stops(number, epoch, curve, self._started):
            why = f"stopped after epoch {epoch}"
        return why

    def hopeless(self, epoch: int, objective: float) -> str | None:
        """Return why `search.least_chance` stops a trial at this objective; None if it does not."""
        search = self._search
        if not search.least_chance or epoch < min(search.grace_epochs, self._budget):
            return None
        if self._finished is None:
            self._finished = Finished(t for t in self._started() if ranks(t, self._budget))
        wanted = max(1, search.promote)
        return self._finished.why_hopeless(epoch, objective, wanted, search.least_chance)

    def ended(self, trial: FrozenTrial) -> None:
        """Add a trial that has ended."""
        if self._finished is not None and ranks(trial, self._budget):
            self._finished.add(trial)
