"""The ledger: the record of a study's trials, their progress and their results.

One Optuna study in a database is the only record of a search. Ray Tune and the local loop both
write to it and both resume from it, so that a crash loses only the running epoch: an epoch is
recorded together with its checkpoint, which is on disk by then. Seeds:

- the seed of a trial is one word of `SeedSequence(study seed, spawn_key=(0, number))`;
- the sampler is seeded anew for each proposal by `spawn_key=(1, number)`, so that a proposal
  depends only on the ledger and not on where a session started.
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from model.config import TrialConfig
from tuner import retries
from tuner.config import StudyConfig
from tuner.draft import Draft
from tuner.errors import LedgerLost
from tuner.folder import is_before
from tuner.owned import OwnedStorage
from tuner.records import (
    HEIR,
    REPEATS,
    REPORTED,
    STOPPED,
    Assignment,
    End,
    PriorTrial,
    TrialRecord,
    config_of,
    finite,
    is_foreign,
    is_repetition,
    ranked,
    ranks,
    record_of,
    trial_seed,
)
from tuner.samplers import proposal_sampler
from tuner.space import Value, n_points, same_point, suggest
from tuner.stopping import Verdicts
from tuner.storage import patient

logger = logging.getLogger(__name__)

_ENDS = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
_MAX_DUPLICATES = 50  # duplicate proposals in a row after which the space counts as exhausted
_MAX_TRACEBACK = 8000  # characters of a traceback in the ledger; the file has all of it


class Ledger:
    """The record of a study, and the only interface to propose, report and end trials.

    Args:
        storage: a SQLite file, created if missing, or an open storage.
        study: the configuration.
        prior: returns the trials that the sampler knows in advance; called until the first trial
            has started.
        name: name of the study in the storage; the configuration's name by default.
        home: the run folder; by default the folder of the SQLite file. Checkpoints below it are
            stored by relative path, so that the folder can be moved or copied.
        reading: whether the study is only read, possibly while another process runs it. The trials
            are a snapshot of the moment of the first access.
    """

    def __init__(
        self,
        storage: Path | BaseStorage,
        study: StudyConfig,
        prior: Callable[[], Sequence[PriorTrial]] = tuple,
        name: str | None = None,
        *,
        home: Path | None = None,
        reading: bool = False,
    ) -> None:
        self._config, self.reading = study, reading
        self._home = storage.parent if home is None and isinstance(storage, Path) else home
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.logging.set_verbosity(optuna.logging.ERROR)
            self._database = patient(storage)
        # Trials are read once: no other process writes them, or a reader gets a snapshot.
        self._storage = OwnedStorage(self._database)  # type: ignore[abstract]
        known: dict[str, Any] = {
            "storage": self._storage,
            "study_name": name or study.name,
            "sampler": proposal_sampler(study, 0),
            "pruner": optuna.pruners.NopPruner(),  # the ledger prunes
        }
        if reading:
            self._study = optuna.load_study(**known)
        else:
            directions = [StudyDirection.MINIMIZE] * (1 if study.search.cost is None else 2)
            self._study = optuna.create_study(**known, directions=directions, load_if_exists=True)
        self._verdicts = Verdicts(study, lambda: self._started(self._frozen()))
        self._ids: dict[int, int] = {}
        self._handed_back: deque[int] = deque()
        if not reading and not self._started(self._frozen()):
            self._enqueue()
            self._learn(prior())
        for trial in () if reading else self._frozen():
            if trial.state == TrialState.RUNNING and STOPPED in trial.user_attrs:
                logger.info("trial %d is ended, which its driver could not do", trial.number)
                self.finish(trial.number, "pruned")

    @property
    def config(self) -> StudyConfig:
        """The study's configuration."""
        return self._config

    @property
    def optuna_study(self) -> optuna.Study:
        """The Optuna study as samplers see it, including trials of an earlier study."""
        return self._study

    def _enqueue(self) -> None:
        search = self._config.search
        points = [self._config.base_point()] if search.include_base else []
        for point in [*points, *search.enqueue]:
            if point:
                self._study.enqueue_trial(dict(point), skip_if_exists=True)

    def _learn(self, prior: Sequence[PriorTrial]) -> None:
        """Add the trials of an earlier study; continues where an interrupted driver left off."""
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

    # Proposing

    def ask(self) -> Assignment | None:
        """Return a trial that was taken back, or a new one; None if budget or space is used up."""
        if self._handed_back:
            return self.going_on(self._handed_back.popleft())
        for _ in range(_MAX_DUPLICATES):
            before = self._frozen()
            started = self._started(before)
            if not self._n_left(started):
                return None
            self._take_sampler(before)
            draft, study = Draft.of(self._study)
            trial = study.ask()
            params = suggest(self._config.search.space, trial)
            twin = self._twin(params, started)
            if twin is None:
                seed = self._prepare(trial)
                draft.write()
                return Assignment(trial.number, params, seed)
            draft.write()
            self._reject(trial.number, twin)
        logger.warning("the search space holds nothing new: no further trials")
        return None

    def _take_sampler(self, before: list[FrozenTrial]) -> None:
        """Set the sampler for the proposal that follows these trials."""
        n_asked = sum(trial.state != TrialState.WAITING for trial in before)
        prior = [trial for trial in before if "prior" in trial.user_attrs]
        repeated = sum(1 for _ in takewhile(is_repetition, reversed(before)))
        self._study.sampler = proposal_sampler(self._config, n_asked, prior, repeated)

    def _twin(self, params: dict[str, Value], started: list[FrozenTrial]) -> int | None:
        """Return the number of a trial with these parameters; None if there is none."""
        is_twin = same_point(self._config.search.space, params)
        # A successor in a population has had its parameters only for part of its training.
        own = (trial for trial in started if HEIR not in trial.user_attrs)
        return next((trial.number for trial in own if is_twin(trial.params)), None)

    def _reject(self, number: int, twin: int) -> None:
        """Mark a proposal as a repetition of another trial and end it."""
        self._storage.set_trial_user_attr(self._id(number), REPEATS, twin)
        self._study.tell(number, state=TrialState.FAIL)
        logger.info("proposal %d repeats trial %d: not run", number, twin)

    def _prepare(self, trial: optuna.Trial) -> int:
        """Record a trial's seed and budget before it runs, and return the seed."""
        seed = trial_seed(self._config.seed, trial.number)
        trial.set_user_attr("seed", seed)
        trial.set_user_attr("budget", self._config.training.epochs)
        return seed

    def _propose_on(self, frozen: FrozenTrial) -> bool:
        """Complete a proposal that the driver's death interrupted; return False for a repetition.

        The trial gets the same parameters as without the interruption: the sampler's draws for
        parameters that are already known are repeated and discarded. Only the Gaussian process may
        propose a different point, as it treats its own interrupted proposal as a running trial.
        """
        others = [trial for trial in self._frozen() if trial.number != frozen.number]
        self._take_sampler(others)
        trial = optuna.Trial(self._study, frozen._trial_id)
        space = self._config.search.space
        for path in (path for path in space if path in frozen.distributions):
            known = frozen.distributions[path]
            fixed = trial._is_fixed_param(path, known) or known.single()
            if not fixed and not trial._is_relative_param(path, known):
                self._study.sampler.sample_independent(self._study, frozen, path, known)
        twin = self._twin(suggest(space, trial), self._started(others))
        if twin is not None:
            self._reject(trial.number, twin)
            return False
        self._prepare(trial)
        return True

    @property
    def has_work(self) -> bool:
        """Whether a trial has to continue, or a new one may be proposed."""
        started = self._started(self._frozen())
        running = any(trial.state == TrialState.RUNNING for trial in started)
        return running or self._n_left(started) > 0

    @property
    def n_new(self) -> int:
        """The number of trials that may still be proposed."""
        return int(self._n_left(self._started(self._frozen())))

    def _n_left(self, started: Sequence[FrozenTrial]) -> float:
        """Return how many trials may still be proposed, limited by the study and its space."""
        search = self._config.search
        return max(0, min(search.trials, n_points(search.space)) - len(started))

    @staticmethod
    def _started(trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Return the study's own started trials: no repetitions, none of an earlier study."""
        return [t for t in trials if t.state != TrialState.WAITING and not is_foreign(t)]

    def settle(self) -> list[TrialRecord]:
        """Make pending decisions before the next proposal; return the trials they end."""
        return []

    def hand_back(self, number: int) -> None:
        """Take back a running trial; :meth:`ask` returns it next."""
        self._handed_back.append(number)

    def orphans(self) -> list[Assignment]:
        """Return the trials that were running when the last session ended, to be resumed."""
        found = []
        for frozen in self._frozen():
            if frozen.state != TrialState.RUNNING:
                continue
            # The budget is the last attribute written before a trial runs.
            if "budget" not in frozen.user_attrs and not self._propose_on(frozen):
                continue
            found.append(self.going_on(frozen.number))
        return found

    def going_on(self, number: int) -> Assignment:
        """Return the assignment that resumes a running trial from its last checkpoint."""
        frozen = self._storage.get_trial(self._id(number))
        attrs = frozen.user_attrs
        kept = attrs.get("checkpoint") or {"location": None, "epoch": 0}
        return Assignment(
            number,
            dict(frozen.params),
            attrs["seed"],
            self._placed(kept["location"]),
            kept["epoch"],
            retries.accumulation(attrs),
            self._origin(attrs),
        )

    def _origin(self, attrs: Mapping[str, Any]) -> str | None:
        """Return the origin of a trial's parameters; None if they were proposed for it."""
        return None

    def trial_config(self, trial: Assignment | TrialRecord) -> TrialConfig:
        """Return the configuration that a trial runs with.

        Raises:
            ConfigError: its parameters cannot be built.
        """
        return config_of(self._config, trial)

    # Reporting

    def report(
        self, number: int, metrics: Mapping[str, Any], checkpoint: str | None = None
    ) -> str | None:
        """Record one epoch with the pruning decision and the checkpoint to resume from.

        All of it is written atomically. An epoch that is run again replaces its record; its pruning
        decision is kept.

        Returns:
            Why the trial must end with this epoch (:meth:`finish` it as pruned), or None.
        """
        epoch = int(metrics["epoch"])
        objective = finite(metrics.get("objective"))
        values = {} if objective is None else {epoch: objective}
        kept = {k: v for k, v in metrics.items() if isinstance(v, bool | int | float | str)}
        record = f"epoch/{epoch:05d}"
        attrs: dict[str, Any] = {record: kept | {REPORTED: time.time()}}
        if checkpoint is not None:
            attrs |= self._checkpoint_attrs(epoch, checkpoint)
        identifier = self._id(number)
        known = self._storage.get_trial(identifier)
        stopped: str | None = known.user_attrs.get(STOPPED)
        last = epoch >= self._config.training.epochs or bool(metrics.get("early_stopped"))
        if values and not (stopped or last or record in known.user_attrs):
            stopped = self._verdicts.of(number, epoch, known.intermediate_values | values)
            attrs |= {STOPPED: stopped} if stopped else {}
        self._storage.write_together(identifier, values, attrs)
        return stopped

    def _checkpoint_attrs(self, epoch: int, location: str) -> dict[str, Any]:
        """Return the attributes that record a trial's last checkpoint."""
        return {"checkpoint": {"location": self._kept(location), "epoch": epoch}}

    def _kept(self, location: str) -> str:
        """Return a checkpoint's location in the form stored in the ledger."""
        return location.removeprefix(f"{self._home}/") if self._home else location

    def _placed(self, location: str | None) -> str | None:
        """Return the current location for one stored in the ledger."""
        inside = location is not None and "://" not in location and not location.startswith("/")
        return f"{self._home}/{location}" if self._home and inside else location

    def lost(self, number: int, reason: str) -> None:
        """Record that a trial lost its machine."""
        identifier = self._id(number)
        attrs = self._storage.get_trial(identifier).user_attrs
        self._storage.set_trial_user_attr(identifier, *retries.one_more_loss(attrs, reason))

    def out_of_memory(self, number: int, message: str) -> int | None:
        """Record that a trial ran out of memory.

        Returns:
            The number of parts into which its batches are split for a retry; None if that has been
            tried before, or if the parts are single scenes.
        """
        training = self.trial_config(self.going_on(number)).training
        identifier = self._id(number)
        attrs = self._storage.get_trial(identifier).user_attrs
        if retries.accumulation(attrs) is not None or training.accumulation >= training.batch_size:
            return None
        parts = 2 * training.accumulation
        record = retries.halved(self.trial(number).epoch + 1, parts, message)
        self._storage.set_trial_user_attr(identifier, *record)
        return parts

    def hopeless(self, epoch: int, objective: float) -> str | None:
        """Return why `search.least_chance` stops a trial at this objective; None if it does not."""
        return self._verdicts.hopeless(epoch, objective)

    def finish(
        self,
        number: int,
        state: End,
        *,
        objective: float | None = None,
        reason: str | None = None,
        traceback: str | None = None,
    ) -> End:
        """End a trial; a non-finite objective is always a failure.

        The reason of a pruned trial is that of the pruning decision, unless another one is given.
        """
        scores = self._scores(number, objective) if state == "done" else {}
        for name, score in scores.items():
            if finite(score) is None:
                state, reason = "failed", reason or f"{name} is {score}"
        identifier = self._id(number)
        if state == "pruned":
            reason = reason or self._storage.get_trial(identifier).user_attrs.get(STOPPED)
        attrs = {"reason": reason, "traceback": traceback and traceback[-_MAX_TRACEBACK:]}
        if said := {name: text for name, text in attrs.items() if text}:
            self._storage.write_together(identifier, {}, said)
        values = list(scores.values()) if state == "done" else None
        self._study.tell(number, values, state=_ENDS[state])
        self._verdicts.ended(self._storage.get_trial(identifier))
        return state

    def _scores(self, number: int, objective: float | None) -> dict[str, Any]:
        """Return the minimised values by name: the objective, and the cost if the study has one."""
        scores: dict[str, Any] = {"objective": objective}
        if (cost := self._config.search.cost) is not None:
            scores[cost] = self.trial(number).metrics.get(cost)
        return scores

    def keep_seconds(self, seconds: float) -> None:
        """Record how long the study's trials have run over all sessions."""
        self._study.set_user_attr("seconds", seconds)

    # Reading

    @property
    def seconds(self) -> float:
        """How long the study's trials have run, as last recorded."""
        return float(self._study.user_attrs.get("seconds", 0.0))

    def trials(self) -> list[TrialRecord]:
        """All trials that were started, by number."""
        return [self._record(frozen) for frozen in self._started(self._frozen())]

    def trial(self, number: int) -> TrialRecord:
        """One trial."""
        return self._record(self._storage.get_trial(self._id(number)))

    def _record(self, frozen: FrozenTrial) -> TrialRecord:
        found = record_of(frozen)
        return replace(found, checkpoint=self._placed(found.checkpoint))

    def unneeded(self, checkpoints: Iterable[tuple[int, str]]) -> list[str]:
        """Return the locations among these (trial, location) pairs from which no trial will resume.

        For a running trial these are the checkpoints before the one it would resume from; newer
        ones may not be recorded in the ledger yet.
        """
        reached = self._reached()
        return [
            location
            for number, location in checkpoints
            if number not in reached or is_before(location, reached[number])
        ]

    def _reached(self) -> dict[int, int]:
        """Return the epochs from which running trials would resume."""
        return {
            t.number: (t.user_attrs.get("checkpoint") or {"epoch": 0})["epoch"]
            for t in self._started(self._frozen())
            if t.state == TrialState.RUNNING
        }

    def finished_study(self) -> optuna.Study:
        """Return the study's own finished trials as an in-memory Optuna study for plots.

        Trials that started from another trial's weights are excluded, as their objective does not
        depend on their parameters alone.
        """
        study = optuna.create_study(direction="minimize")
        for trial in self._started(self._frozen()):
            if trial.state == TrialState.COMPLETE and HEIR not in trial.user_attrs:
                alone = copy.copy(trial)  # without its cost
                alone.values = trial.values[:1]
                study.add_trial(alone)
        return study

    def ranking(self) -> list[TrialRecord]:
        """Return finished trials of the study's budget with finite objectives, best first.

        Ties are broken by cost if the study has one, then by number. No other trials are ranked.
        """
        own = self._started(self._frozen())
        done = [self._record(trial) for trial in own if trial.state == TrialState.COMPLETE]
        return ranked(done, self._config.training.epochs, self._config.search.cost)

    def best(self) -> TrialRecord | None:
        """Return the winner; None if no trial has finished."""
        # The first of ranking(), without creating all records, as this is called after every trial.
        own = (t for t in self._started(self._frozen()) if ranks(t, self._config.training.epochs))
        first = min(own, key=lambda trial: (*trial.values, trial.number), default=None)
        return None if first is None else self._record(first)

    def close(self) -> None:
        """Close the connection to the database."""
        self._database.remove_session()

    def announce(self, say: Callable[[str, int], None]) -> None:
        """Set `say(text, level)`, which tells the user when the database fails and recovers."""
        self._database.say = say

    @property
    def database_lost(self) -> LedgerLost | None:
        """The error if the database was unavailable for too long; nothing is recorded after it."""
        return self._database.lost

    def _frozen(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _id(self, number: int) -> int:
        if number not in self._ids:
            study = self._study._study_id
            self._ids[number] = self._storage.get_trial_id_from_study_id_trial_number(study, number)
        return self._ids[number]
