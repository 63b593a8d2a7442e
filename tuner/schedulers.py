"""Ray Tune's schedulers, bound to the ledger.

Plain ones keep what they judge by in the driver's memory, and forget it with the driver. Here it
is rebuilt from the epochs that the ledger holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule
from ray.tune.schedulers.trial_scheduler import TrialScheduler

from tuner.config import MEDIAN_OVER
from tuner.study import Ledger
from tuner.trainable import NUMBER


def make_scheduler(ledger: Ledger) -> TrialScheduler:
    """The study's scheduler, with what earlier sessions reported."""
    search = ledger.config.search
    if search.scheduler == "asha":
        return LedgerASHA(ledger)
    if search.scheduler == "hyperband":
        return LedgerHyperband(ledger)
    if search.scheduler == "median":
        return LedgerMedian(ledger)
    return FIFOScheduler()


def _history(ledger: Ledger) -> Iterator[tuple[int, list[tuple[int, float]]]]:
    """Each trial's number and its objectives by epoch, as far as they are history.

    A trial that goes on from a checkpoint reports the epochs after it again, and is
    judged on them again; only the epochs before it are history.
    """
    resumed = {orphan.number: orphan.epoch for orphan in ledger.orphans()}
    for trial in ledger.trials():
        known = resumed.get(trial.number, trial.epoch)
        yield trial.number, [(epoch, value) for epoch, value in trial.curve if epoch <= known]


class LedgerASHA(AsyncHyperBandScheduler):
    """ASHA over epochs whose rungs survive the driver."""

    def __init__(self, ledger: Ledger, *, brackets: int = 1) -> None:
        search = ledger.config.search
        epochs = ledger.config.training.epochs
        super().__init__(
            time_attr="epoch",
            metric="objective",
            mode="min",
            max_t=epochs,
            grace_period=min(search.grace_epochs, epochs),
            reduction_factor=search.reduction_factor,
            brackets=brackets,
        )
        self._names: dict[int, str] = {}  # Ray's, of each trial that it has had
        self._replay(ledger)

    def bracket_of(self, number: int) -> int:
        """Which bracket judges a trial."""
        return 0

    def _replay(self, ledger: Ledger) -> None:
        """Fill the rungs with what earlier sessions reported."""
        for number, curve in _history(ledger):
            for epoch, objective in curve:
                for milestone, recorded in self._brackets[self.bracket_of(number)]._rungs:
                    if epoch >= milestone:
                        recorded.setdefault(_key(number), -objective)
                        break

    @property
    def rungs(self) -> dict[tuple[int, float], dict[str, float]]:
        """Objective of each trial at each rung of a bracket (negated: larger is better)."""
        return {
            (index, milestone): dict(recorded)
            for index, bracket in enumerate(self._brackets)
            for milestone, recorded in bracket._rungs
        }

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Give a trial its bracket, and a resumed one the rung entries that it earned before."""
        super().on_trial_add(tune_controller, trial)
        number = int(trial.config[NUMBER])
        bracket = self._trial_info[trial.trial_id] = self._brackets[self.bracket_of(number)]
        # One whose actor died while it took it goes on as another of Ray's.
        before = self._names.get(number, _key(number))
        self._names[number] = trial.trial_id
        for _, recorded in bracket._rungs:
            if before in recorded:
                recorded[trial.trial_id] = recorded.pop(before)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Judge a sound result; a failed one stops by itself and enters no rung."""
        if result.get("failed"):
            return TrialScheduler.STOP
        return super().on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Enter a sound end into the rungs."""
        if result.get("failed"):
            self._trial_info.pop(trial.trial_id, None)
            return
        super().on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Forget a trial that never ran."""
        self._trial_info.pop(trial.trial_id, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return (str, (type(self).__name__,))


class LedgerHyperband(LedgerASHA):
    """Hyperband, asynchronously: ASHA in brackets that begin to stop ever later.

    A trial's bracket follows from its number and the study's seed, in the shares of Hyperband's
    paper, so that it is the same after a resume.
    """

    def __init__(self, ledger: Ledger) -> None:
        search, epochs = ledger.config.search, ledger.config.training.epochs
        factor, grace = search.reduction_factor, min(search.grace_epochs, epochs)
        # As many as there are rungs; the last one stops nobody before the end.
        n_brackets = math.floor(math.log(epochs / grace, factor) + 1e-9) + 1
        left = range(n_brackets - 1, -1, -1)  # halvings in a bracket
        sizes = np.array([math.ceil(n_brackets * factor**s / (s + 1)) for s in left])
        self._shares = sizes / sizes.sum()
        self._seed = ledger.config.seed
        super().__init__(ledger, brackets=n_brackets)

    def bracket_of(self, number: int) -> int:
        """Which bracket judges a trial."""
        sequence = np.random.SeedSequence(self._seed, spawn_key=(2, number))
        return int(np.random.default_rng(sequence).choice(len(self._shares), p=self._shares))


class LedgerMedian(MedianStoppingRule):
    """The median stopping rule over epochs, whose results survive the driver.

    A trial is stopped whose best epoch is worse than the median of the other trials' means.
    """

    def __init__(self, ledger: Ledger) -> None:
        search, epochs = ledger.config.search, ledger.config.training.epochs
        super().__init__(
            time_attr="epoch",
            metric="objective",
            mode="min",
            grace_period=min(search.grace_epochs, epochs),
            min_samples_required=MEDIAN_OVER,
        )
        self._names: dict[int, Trial | str] = {}  # Ray's, of each trial that it has had
        for number, curve in _history(ledger):
            if curve:
                self._results[_key(number)] = [{"epoch": e, "objective": v} for e, v in curve]

    @property
    def results(self) -> dict[str, list[tuple[int, float]]]:
        """Epochs and objectives that trials are compared with, by Ray's or the ledger's name."""
        return {
            getattr(key, "trial_id", key): [(r["epoch"], r["objective"]) for r in results]
            for key, results in self._results.items()
        }

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Give a resumed trial the results that it had before."""
        super().on_trial_add(tune_controller, trial)
        number = int(trial.config[NUMBER])
        before = self._names.get(number, _key(number))
        self._names[number] = trial
        if before in self._results:
            self._results[trial] = self._results.pop(before)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Judge a sound result; a failed one stops by itself and is compared with nobody."""
        if result.get("failed"):
            return TrialScheduler.STOP
        self._forget_from(trial, result["epoch"])
        return super().on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Record a sound end."""
        if not result.get("failed"):
            self._forget_from(trial, result["epoch"])
            super().on_trial_complete(tune_controller, trial, result)

    def _forget_from(self, trial: Trial, epoch: int) -> None:
        """An epoch that is reported again, after a lost machine or at its end, counts once."""
        self._results[trial] = [r for r in self._results[trial] if r["epoch"] < epoch]

    def _on_insufficient_samples(self, tune_controller: Any, trial: Trial, time: float) -> str:
        # Ray would pause it for others' sake; here it goes on, as with the other schedulers.
        return TrialScheduler.CONTINUE

    def __reduce__(self) -> tuple[Any, ...]:
        return (str, (type(self).__name__,))


def _key(number: int) -> str:
    """A trial of an earlier session, before Ray knows it."""
    return f"trial-{number}"
