"""The ledger: what was tried, how far it came and how it ended.

One Optuna study in SQLite is the only record of a search. Ray Tune and the local
loop both write to it and both go on from it, so that a crash costs little: the
epoch under way, and one whose checkpoint was not on disk yet. Numbers:

- a trial's seed is `SeedSequence(study seed, spawn_key=(0, number))`, one word of it;
- the sampler is seeded anew for each proposal by `spawn_key=(1, number)`, so that a
  proposal depends on the ledger alone and not on where a session began.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from tuner.config import StudyConfig
from tuner.pruners import make_pruner
from tuner.samplers import make_sampler
from tuner.space import Value, n_points, suggest

logger = logging.getLogger(__name__)

End = Literal["done", "pruned", "failed"]
State = Literal["running"] | End
_STATES: dict[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
_ENDS = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
_MAX_DUPLICATES = 50  # proposals in a row that were tried before: the space is exhausted
_MAX_TRACEBACK = 8000  # characters of a traceback in the ledger; the file has the whole


@dataclass(frozen=True)
class Assignment:
    """A trial to run: fresh, or one that was cut and goes on from its checkpoint."""

    number: int
    params: dict[str, Value]
    seed: int
    checkpoint: str | None = None
    epoch: int = 0


@dataclass(frozen=True)
class PriorTrial:
    """A finished trial of an earlier study: known to the sampler, and no trial of this study."""

    source: str
    params: dict[str, Value]
    objective: float


@dataclass(frozen=True)
class TrialRecord:
    """A trial as the ledger knows it."""

    number: int
    state: State
    params: dict[str, Value]
    seed: int
    objective: float | None
    epochs: dict[int, dict[str, Any]] = field(repr=False)
    budget: int | None = None
    reason: str | None = None
    traceback: str | None = field(default=None, repr=False)
    checkpoint: str | None = None
    started: datetime | None = None
    finished: datetime | None = None

    @property
    def epoch(self) -> int:
        """The last epoch that was reported."""
        return max(self.epochs, default=0)

    @property
    def metrics(self) -> dict[str, Any]:
        """What the last epoch reported."""
        return self.epochs[self.epoch] if self.epochs else {}

    @property
    def curve(self) -> list[tuple[int, float]]:
        """The objective by epoch."""
        pairs = ((epoch, _finite(m.get("objective"))) for epoch, m in sorted(self.epochs.items()))
        return [(epoch, value) for epoch, value in pairs if value is not None]

    @property
    def seconds(self) -> float | None:
        """Time spent in its epochs; waiting and interruptions do not count."""
        spent = [_finite(metrics.get("epoch_seconds")) for metrics in self.epochs.values()]
        return sum(value for value in spent if value is not None) if spent else None


def trial_seed(study_seed: int, number: int) -> int:
    """The seed of a trial: independent between trials, the same on every machine."""
    sequence = np.random.SeedSequence(study_seed, spawn_key=(0, number))
    return int(sequence.generate_state(1)[0])


class Ledger:
    """The study's record, and the only way to propose, report and end trials.

    Args:
        database: SQLite file, made where there is none; or an Optuna storage, as it is.
        study: the configuration.
        prior: asked, until the first trial has started, for what the sampler knows before it.
    """

    def __init__(
        self,
        database: Path | optuna.storages.BaseStorage,
        study: StudyConfig,
        prior: Callable[[], Sequence[PriorTrial]] = tuple,
    ) -> None:
        self._config = study
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.logging.set_verbosity(optuna.logging.ERROR)
            if isinstance(database, Path):
                database = optuna.storages.RDBStorage(
                    f"sqlite:///{database}", engine_kwargs={"connect_args": {"timeout": 60}}
                )
            self._storage = optuna.storages.get_storage(database)
        self._study = optuna.create_study(
            storage=self._storage,
            study_name=study.name,
            direction="minimize",
            load_if_exists=True,
            sampler=self._sampler(0, ()),
            # Samplers must not see a pruner: they would keep to the trial's own bracket.
            pruner=optuna.pruners.NopPruner(),
        )
        self._pruner = make_pruner(study.search, study.training.epochs)
        self._ids: dict[int, int] = {}
        if not self._started(self._frozen()):
            self._enqueue()
            self._learn(prior())

    @property
    def config(self) -> StudyConfig:
        """The study's configuration."""
        return self._config

    @property
    def optuna_study(self) -> optuna.Study:
        """The Optuna study with all that samplers know, trials of an earlier study too."""
        return self._study

    def _enqueue(self) -> None:
        search = self._config.search
        points = [self._config.base_point()] if search.include_base else []
        for point in [*points, *search.enqueue]:
            if point:
                self._study.enqueue_trial(dict(point), skip_if_exists=True)

    def _learn(self, prior: Sequence[PriorTrial]) -> None:
        """Add what is known before; a driver that died amid it goes on where it was."""
        known = {trial.user_attrs.get("prior") for trial in self._frozen()}
        for trial in prior:
            if trial.source not in known:
                fixed = optuna.trial.FixedTrial(trial.params)
                suggest(self._config.search.space, fixed)
                self._study.add_trial(
                    optuna.trial.create_trial(
                        value=trial.objective,
                        params=fixed.params,
                        distributions=fixed.distributions,
                        user_attrs={"prior": trial.source},
                    )
                )

    def _sampler(self, number: int, prior: Sequence[FrozenTrial]) -> optuna.samplers.BaseSampler:
        sequence = np.random.SeedSequence(self._config.seed, spawn_key=(1, number))
        seed = int(sequence.generate_state(1)[0])
        return make_sampler(self._config.search, seed, prior)

    # Proposing

    def ask(self) -> Assignment | None:
        """A new trial, or None when the budget of trials or the space is used up."""
        for _ in range(_MAX_DUPLICATES):
            before = self._frozen()
            started = self._started(before)
            if not self._n_left(len(started)):
                return None
            n_asked = sum(t.state != TrialState.WAITING for t in before)
            prior = [trial for trial in before if "prior" in trial.user_attrs]
            self._study.sampler = self._sampler(n_asked, prior)
            trial = self._study.ask()
            params = suggest(self._config.search.space, trial)
            twin = next((t for t in started if t.params == params), None)
            if twin is None:
                return self._assign(trial.number, params)
            trial.set_user_attr("duplicate_of", twin.number)
            self._study.tell(trial, state=TrialState.FAIL)
            logger.info("proposal %d repeats trial %d: not run", trial.number, twin.number)
        logger.warning("the search space holds nothing new: no further trials")
        return None

    @property
    def has_work(self) -> bool:
        """Whether a trial is to be run on, or a new one may be proposed."""
        started = self._started(self._frozen())
        running = any(trial.state == TrialState.RUNNING for trial in started)
        return running or self._n_left(len(started)) > 0

    def _n_left(self, n_started: int) -> float:
        """Trials that may still be proposed: of the study's number and of the space."""
        search = self._config.search
        return max(0, min(search.trials, n_points(search.space)) - n_started)

    @staticmethod
    def _started(trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """The study's own trials: not waiting, no repetitions, and none of an earlier study."""
        return [t for t in trials if t.state != TrialState.WAITING and not _is_foreign(t)]

    def _assign(self, number: int, params: dict[str, Value]) -> Assignment:
        seed = trial_seed(self._config.seed, number)
        identifier = self._id(number)
        self._storage.set_trial_user_attr(identifier, "seed", seed)
        self._storage.set_trial_user_attr(identifier, "budget", self._config.training.epochs)
        return Assignment(number, params, seed)

    def orphans(self) -> list[Assignment]:
        """Trials that were running when the last session ended, to be run on."""
        found = []
        for frozen in self._frozen():
            if frozen.state != TrialState.RUNNING:
                continue
            space, params = self._config.search.space, dict(frozen.params)
            if params.keys() != space.keys():
                # A crash while proposing leaves some parameters unset: they are drawn now.
                params = suggest(space, optuna.Trial(self._study, frozen._trial_id))
            fresh = self._assign(frozen.number, params)
            kept = frozen.user_attrs.get("checkpoint")
            found.append(
                Assignment(
                    fresh.number,
                    fresh.params,
                    fresh.seed,
                    kept and kept["location"],
                    kept["epoch"] if kept else 0,
                )
            )
        return found

    # Reporting

    def report(self, number: int, metrics: Mapping[str, Any]) -> None:
        """Record one epoch; an epoch that is run again replaces its record."""
        epoch = int(metrics["epoch"])
        objective = _finite(metrics.get("objective"))
        identifier = self._id(number)
        if objective is not None:
            self._storage.set_trial_intermediate_value(identifier, epoch, objective)
        kept = {k: v for k, v in metrics.items() if isinstance(v, bool | int | float | str)}
        self._storage.set_trial_user_attr(identifier, f"epoch/{epoch:05d}", kept)

    def checkpointed(self, number: int, location: str, epoch: int) -> None:
        """Record the checkpoint from which the trial can go on."""
        kept = {"location": location, "epoch": epoch}
        self._storage.set_trial_user_attr(self._id(number), "checkpoint", kept)

    def should_prune(self, number: int) -> bool:
        """Whether Optuna's pruner stops the trial now, for the local loop."""
        # Not by way of optuna.Trial, which asks the sampler again.
        return self._pruner.prune(self._study, self._storage.get_trial(self._id(number)))

    def finish(
        self,
        number: int,
        state: End,
        *,
        objective: float | None = None,
        reason: str | None = None,
        traceback: str | None = None,
    ) -> End:
        """End a trial; a non-finite objective is a failure whatever the caller says."""
        if state == "done" and _finite(objective) is None:
            state, reason = "failed", reason or f"objective is {objective}"
        identifier = self._id(number)
        if reason:
            self._storage.set_trial_user_attr(identifier, "reason", reason)
        if traceback:
            text = traceback[-_MAX_TRACEBACK:]
            self._storage.set_trial_user_attr(identifier, "traceback", text)
        values = objective if state == "done" else None
        self._study.tell(number, values, state=_ENDS[state])
        return state

    def keep_seconds(self, seconds: float) -> None:
        """Record how long the study's trials have run, over all sessions."""
        self._study.set_user_attr("seconds", seconds)

    # Reading

    @property
    def seconds(self) -> float:
        """How long the study's trials have run, as last recorded."""
        return float(self._study.user_attrs.get("seconds", 0.0))

    def trials(self) -> list[TrialRecord]:
        """All trials that were started, by number."""
        return [_record(frozen) for frozen in self._started(self._frozen())]

    def running(self) -> set[int]:
        """Numbers of the trials that have not ended."""
        own = self._started(self._frozen())
        return {trial.number for trial in own if trial.state == TrialState.RUNNING}

    def trial(self, number: int) -> TrialRecord:
        """One trial."""
        return _record(self._storage.get_trial(self._id(number)))

    def finished_study(self) -> optuna.Study:
        """The study's own finished trials as an Optuna study in memory, for plots."""
        study = optuna.create_study(direction="minimize")
        own = self._started(self._frozen())
        study.add_trials([trial for trial in own if trial.state == TrialState.COMPLETE])
        return study

    def ranking(self) -> list[TrialRecord]:
        """Finished, finite trials of the study's own budget, best first; nothing else ranks."""
        own = self._started(self._frozen())
        done = (_record(trial) for trial in own if trial.state == TrialState.COMPLETE)
        ranked = [
            trial
            for trial in done
            if _finite(trial.objective) is not None and trial.budget == self._config.training.epochs
        ]
        return sorted(ranked, key=lambda trial: (trial.objective, trial.number))

    def best(self) -> TrialRecord | None:
        """The winner, if any trial finished."""
        return next(iter(self.ranking()), None)

    def close(self) -> None:
        """Let go of the database."""
        self._storage.remove_session()

    def _frozen(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _id(self, number: int) -> int:
        if number not in self._ids:
            self._ids[number] = self._storage.get_trial_id_from_study_id_trial_number(
                self._study._study_id, number
            )
        return self._ids[number]


def _is_foreign(trial: FrozenTrial) -> bool:
    return "duplicate_of" in trial.user_attrs or "prior" in trial.user_attrs


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _record(frozen: FrozenTrial) -> TrialRecord:
    attrs = frozen.user_attrs
    epochs = {
        int(key.partition("/")[2]): value
        for key, value in attrs.items()
        if key.startswith("epoch/")
    }
    state = _STATES[frozen.state]
    values = frozen.intermediate_values
    reached = frozen.value if state == "done" else values[max(values)] if values else None
    checkpoint = attrs.get("checkpoint")
    return TrialRecord(
        number=frozen.number,
        state=state,
        params=dict(frozen.params),
        seed=attrs.get("seed", -1),
        objective=reached,
        epochs=epochs,
        budget=attrs.get("budget"),
        reason=attrs.get("reason"),
        traceback=attrs.get("traceback"),
        checkpoint=checkpoint["location"] if checkpoint else None,
        started=frozen.datetime_start,
        finished=frozen.datetime_complete,
    )
