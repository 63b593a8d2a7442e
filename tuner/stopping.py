"""Who is stopped early: the schedulers' rules, each a function of what the ledger holds.

No rule remembers its verdicts: whoever runs the trials, and however often the search
was interrupted, the same ledger gives the same verdict.

Sources: for successive halving that stops at once, the asynchronous algorithm of Li, Jamieson,
Rostamizadeh et al., "A system for massively parallel hyperparameter tuning", MLSys 2020, in the
variant that ends who is not among the best of a rung in the place of pausing him, as Ray Tune and
Syne Tune have it; for the shares of Hyperband's brackets, Li, Jamieson, DeSalvo, Rostamizadeh and
Talwalkar, "Hyperband", JMLR 18 (2018), algorithm 1; for the median rule, Golovin, Solnik, Moitra
et al., "Google Vizier", KDD 2017, section 3.2.1.
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
    """Who stops trials."""

    def stops(self, number: int, epoch: int, curve: Mapping[int, float], started: Started) -> bool:
        """Whether a trial ends with an epoch that is not its last.

        Args:
            number: the trial's.
            epoch: that it has just finished.
            curve: its objectives by epoch, this one's too; less is better.
            started: gives all trials of the study that have started, this one and failed ones too.
        """


def rule_of(study: StudyConfig) -> Rule | None:
    """The rule of the study's scheduler; None of one that stops nobody, or decides by turns."""
    if study.search.scheduler in ("asha", "hyperband"):
        return Halving(study)
    return Median(study) if study.search.scheduler == "median" else None


class Halving:
    """Successive halving, asynchronously: who is not among the best of a rung ends there.

    A rung's best are one in `reduction_factor` of all that have come there before. Hyperband has
    several brackets, each of which begins at a later rung; a trial's bracket follows from its
    number and the study's seed, in the shares of Hyperband's paper.
    """

    def __init__(self, study: StudyConfig) -> None:
        search, epochs = study.search, study.training.epochs
        self._rungs = rungs_of(search, epochs)
        self._factor, self._seed = search.reduction_factor, study.seed
        n_brackets = 1
        if search.scheduler == "hyperband":
            # As many as there are rungs, and one more where a further rung would be the last epoch.
            grace = min(search.grace_epochs, epochs)
            n_brackets = math.floor(math.log(epochs / grace, self._factor) + 1e-9) + 1
        left = range(n_brackets - 1, -1, -1)  # halvings in a bracket
        sizes = np.array([math.ceil(n_brackets * self._factor**s / (s + 1)) for s in left])
        self._shares = sizes / sizes.sum()
        self._brackets: dict[int, int] = {}  # by trial, as far as they were asked for

    def bracket_of(self, number: int) -> int:
        """Which bracket judges a trial: its first rung, by index."""
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
    """The median stopping rule: who has never been as good as the others are in the middle ends.

    His best objective is compared with the median of the others' mean objectives, from
    `grace_epochs` up to this epoch, of all that have come as far.
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
        """From the grace's end up to an epoch, as far as the trial has reported."""
        found = [curve[e] for e in range(self._grace, epoch + 1) if e in curve]
        return sum(found) / len(found)


class Verdicts:
    """What becomes of a study's trials: by the scheduler's rule, and by their chance to win.

    Args:
        study: the configuration.
        started: gives the study's own trials that have started.
    """

    def __init__(self, study: StudyConfig, started: Callable[[], Sequence[FrozenTrial]]) -> None:
        self._search, self._budget = study.search, study.training.epochs
        self._rule = rule_of(study)
        self._started = started
        self._finished: Finished | None = None  # once it has been asked for

    def of(self, number: int, epoch: int, curve: Mapping[int, float]) -> str | None:
        """Why a trial ends with an epoch that is not its last, or None where it goes on.

        Args:
            number: the trial's.
            epoch: that it has just finished.
            curve: its objectives by epoch, this one's too.
        """
        why = self.hopeless(epoch, curve[epoch])
        if why is None and self._rule and self._rule.stops(number, epoch, curve, self._started):
            why = f"stopped after epoch {epoch}"
        return why

    def hopeless(self, epoch: int, objective: float) -> str | None:
        """Why a trial that stands so ends by `search.least_chance`, or None where it goes on."""
        search = self._search
        if not search.least_chance or epoch < min(search.grace_epochs, self._budget):
            return None
        if self._finished is None:
            self._finished = Finished(t for t in self._started() if ranks(t, self._budget))
        wanted = max(1, search.promote)
        return self._finished.why_hopeless(epoch, objective, wanted, search.least_chance)

    def ended(self, trial: FrozenTrial) -> None:
        """A trial has ended."""
        if self._finished is not None and ranks(trial, self._budget):
            self._finished.add(trial)
