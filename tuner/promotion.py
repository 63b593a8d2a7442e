"""Promotion: trains the best trials of a search again, at full budget and with several seeds.

A search's winner is the best of many trials, each trained once: part of its lead is due to its seed
and to selection. Therefore the best few are trained again from scratch, each with seeds that the
search never used, and ranked by their mean over these seeds.

The runs are stored in a separate Optuna study in the same database. It is a ledger like that of the
search, except that its trials follow from the ranking instead of a sampler, so that the same code
runs, resumes and records trials and promoted runs. The seed of a run is one word of
`SeedSequence(study seed, spawn_key=(2, number of the trial, index of the seed))`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from model.wording import counted
from tuner.config import StudyConfig
from tuner.errors import StudyError
from tuner.records import Assignment, TrialRecord
from tuner.study import Ledger

_PARENT, _REPEAT = "parent", "repeat"  # attributes of a run: search trial, seed index


def promoted_seed(study_seed: int, number: int, repeat: int) -> int:
    """Return the seed of a promoted run, independent of other runs and of the search's trials."""
    sequence = np.random.SeedSequence(study_seed, spawn_key=(2, number, repeat))
    return int(sequence.generate_state(1)[0])


def promotion_study(study: StudyConfig) -> StudyConfig:
    """Return the study of the promoted runs: that of the search at full budget without stopping."""
    search = study.search
    return study.replaced(
        {
            "name": f"{study.name}-promoted",
            "training.epochs": search.full_epochs or study.training.epochs,
            "search.trials": max(1, search.promote * search.promote_seeds),
            "search.scheduler": "none",
            "search.least_chance": 0.0,
            "search.time_budget": None,
            "search.target": None,
            "search.warm_start": None,
            "search.cost": None,
            "search.include_base": False,
            "search.enqueue": (),
        }
    )


@dataclass(frozen=True)
class Promoted:
    """A promoted configuration.

    Args:
        trial: the trial of the search with this configuration.
        runs: the runs that have started, in the order of their seeds.
        seeds: planned number of seeds; runs that have started count even if fewer are requested
            now.
    """

    trial: TrialRecord
    runs: tuple[TrialRecord, ...] = field(repr=False)
    seeds: int

    @property
    def finished(self) -> list[TrialRecord]:
        """Runs of the full budget with a finite objective."""
        return [run for run in self.runs if run.state == "done"]

    @property
    def failed(self) -> list[TrialRecord]:
        """Runs that ended without a score."""
        return [run for run in self.runs if run.state == "failed"]

    @property
    def objectives(self) -> list[float]:
        """Objectives of the finished runs."""
        return [run.objective for run in self.finished if run.objective is not None]

    @property
    def mean(self) -> float | None:
        """Mean objective of the finished runs."""
        return statistics.fmean(self.objectives) if self.objectives else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the finished runs, n - 1 in its denominator."""
        return statistics.stdev(self.objectives) if len(self.objectives) > 1 else None

    @property
    def best(self) -> TrialRecord | None:
        """The run whose network is the best on the validation scenes."""
        return min(self.finished, key=lambda run: (run.objective, run.number), default=None)

    @property
    def words(self) -> str:
        """Mean, spread and failures in one line."""
        if self.mean is None:
            scored = "no score"
        else:
            spread = "" if self.std is None else f" ± {self.std:.5f}"
            scored = f"{self.mean:.5f}{spread}"
        count = f"{len(self.finished)} of {self.seeds}" if self.unequal else str(self.seeds)
        seeds = "seed" if self.seeds == 1 else "seeds"
        text = f"{scored} ({count} {seeds}); {self.trial.objective:.5f} in the search"
        for run in self.failed:
            text += f"; seed {run.seed} failed: {run.reason}"
        return text

    @property
    def unequal(self) -> bool:
        """Whether the mean is over fewer seeds than planned."""
        return len(self.finished) != self.seeds

    @property
    def _order(self) -> tuple[int, int, float, int]:
        # The mean over successful seeds is too favourable for a configuration that also fails.
        left = self.seeds - len(self.finished) - len(self.failed)
        mean = float("inf") if self.mean is None else self.mean
        return len(self.failed), left, mean, self.trial.number


class Promotion(Ledger):
    """The ledger of the promoted runs.

    Args:
        search: the ledger of the search. Its database stores the runs; its ranking and
            configuration determine which trials are promoted. If the search is opened read-only, so
            is the promotion; a promotion that has not started is then empty, and the database is
            not changed.
    """

    def __init__(self, search: Ledger) -> None:
        name = f"{search.optuna_study.study_name}-promoted"
        study, reading = promotion_study(search.config), search.reading
        home = search._home
        try:
            super().__init__(search._database, study, name=name, home=home, reading=reading)
        except KeyError:
            if not reading:
                raise
            super().__init__(InMemoryStorage(), study, name=name, home=home)
        self._search = search
        begun = {trial.user_attrs["budget"] for trial in self._frozen()}
        if not reading and begun - {study.training.epochs}:
            raise StudyError(
                f"search.full_epochs: promoted runs of {max(begun)} epochs have begun, and "
                f"{study.training.epochs} are asked for now; put it back: runs of two budgets "
                "cannot be ranked with each other"
            )

    @property
    def search(self) -> Ledger:
        """The ledger of the search whose best trials are promoted."""
        return self._search

    def ask(self) -> Assignment | None:
        """Return a run that was taken back, or the next seed's run in ranking order; else None."""
        if self._handed_back:
            return self.going_on(self._handed_back.popleft())
        parent, repeat = next(self._left(), (None, 0))
        if parent is None:
            return None
        study, tried = self._search.config, self._search.optuna_study.get_trials(deepcopy=False)
        frozen = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=parent.params,
            distributions=tried[parent.number].distributions,
            user_attrs={
                _PARENT: parent.number,
                _REPEAT: repeat,
                "seed": promoted_seed(study.seed, parent.number, repeat),
                "budget": self.config.training.epochs,
            },
        )
        identifier = self._storage.create_new_trial(self._study._study_id, frozen)
        return self.going_on(self._storage.get_trial_number_from_id(identifier))

    @property
    def has_work(self) -> bool:
        """Whether a run has to continue or to start."""
        return any(run.state == "running" for run in self.trials()) or any(self._left())

    @property
    def n_new(self) -> int:
        """The number of runs that have not started."""
        return sum(1 for _ in self._left())

    def configurations(self) -> list[Promoted]:
        """Return the promoted configurations by mean; those with a failed run come last."""
        trials = {trial.number: trial for trial in self._search.ranking()}
        runs: dict[int, list[TrialRecord]] = {}
        for frozen in self._by_repeat():
            runs.setdefault(frozen.user_attrs[_PARENT], []).append(self.trial(frozen.number))
        seeds = self._search.config.search.promote_seeds
        found = [
            Promoted(trials[parent], tuple(those), max(seeds, len(those)))
            for parent, those in runs.items()
        ]
        return sorted(found, key=lambda promoted: promoted._order)

    def winner(self) -> Promoted | None:
        """Return the best configuration once all runs have ended; None if no run has a score."""
        if self.has_work:
            return None
        return next((found for found in self.configurations() if found.best is not None), None)

    def summary(self) -> list[str]:
        """Return the outcome as lines for a terminal, best first."""
        found = self.configurations()
        if not found:
            return []
        epochs, winner = self.config.training.epochs, self.winner()
        lines = [f"promoted, {counted(epochs, 'epoch')}; mean ± standard deviation over seeds:"]
        lines += [
            f"{rank}. trial {promoted.trial.number:04d}: {promoted.words}"
            for rank, promoted in enumerate(found, start=1)
        ]
        if winner is not None and winner.best is not None:
            best = winner.best
            lines.append(
                f"winner: trial {winner.trial.number:04d}; best/ is its network of seed "
                f"{best.seed}, objective {best.objective:.5f}, the best of its seeds"
            )
        elif self.has_work:
            lines.append("runs are left: until they have ended best/ is the search's winner")
        else:
            lines.append("no promoted run has a score: best/ is the search's winner")
        return lines

    def _left(self) -> Iterator[tuple[TrialRecord, int]]:
        """Yield pairs of a search trial and a seed index whose runs have not started.

        No two trials of a search have the same parameters, so the ranking is one of configurations.
        """
        search = self._search.config.search
        begun = {(t.user_attrs[_PARENT], t.user_attrs[_REPEAT]) for t in self._frozen()}
        for trial in self._search.ranking()[: search.promote]:
            for repeat in range(search.promote_seeds):
                if (trial.number, repeat) not in begun:
                    yield trial, repeat

    def _by_repeat(self) -> list[FrozenTrial]:
        return sorted(self._frozen(), key=lambda frozen: frozen.user_attrs[_REPEAT])

    def _origin(self, attrs: Mapping[str, Any]) -> str:
        seed = attrs[_REPEAT] + 1
        seeds = max(seed, self._search.config.search.promote_seeds)
        return f"trial {attrs[_PARENT]:04d}, seed {seed} of {seeds}"


def open_promotion(search: Ledger) -> Promotion | None:
    """Open the promotion of a search, closed with its ledger; None if none is requested."""
    return Promotion(search) if search.config.search.promote else None
