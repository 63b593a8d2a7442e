"""What the ledger says of trials: one to run, one that was run, one of an earlier study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from tuner import retries
from tuner.space import Value

if TYPE_CHECKING:
    from model.config import TrialConfig
    from tuner.config import StudyConfig

End = Literal["done", "pruned", "failed"]
State = Literal["running"] | End
STATE_WORDS = {
    "running": "unfinished",
    "done": "done",
    "pruned": "stopped early",
    "failed": "failed",
}
_STATES: dict[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "done",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
REPORTED = "reported_at"  # beside an epoch's metrics: when they came
REPEATS = "duplicate_of"  # attribute of a proposal that was not run: the trial that it repeats
STOPPED = "stopped"  # attribute of a trial that is to end as pruned: why
HEIR = "heir"  # attribute of a trial that began with the weights of another


@dataclass(frozen=True)
class Heir:
    """What a trial has from another whose weights it began with.

    Args:
        donor: the other's number.
        epoch: after which the weights were taken.
        location: of the checkpoint that holds them.
        replaces: the trial that gave way to it.
        changed: its parameters that are not the donor's: the value there, and here.
    """

    donor: int
    epoch: int
    location: str
    replaces: int
    changed: dict[str, list[Value]] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """Where it comes from, in a few words."""
        return f"from trial {self.donor:04d} after epoch {self.epoch}"


@dataclass(frozen=True)
class Assignment:
    """A trial to run: fresh, or one that was cut and goes on from its checkpoint.

    Args:
        donor: checkpoint of another trial that this one begins with, in the place of new weights.
        until: epoch after which the trial is handed back, if it has not ended by then.
        bequeaths: whether others may begin with what it has where it is handed out and back.
    """

    number: int
    params: dict[str, Value]
    seed: int
    checkpoint: str | None = None
    epoch: int = 0
    accumulation: int | None = None  # where memory was not enough for the configuration's own
    origin: str | None = None  # whose parameters and which seed, where they were not proposed
    donor: str | None = None
    until: int | None = None
    bequeaths: bool = False


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
    accumulation: int | None = None  # where memory was not enough for the configuration's own
    note: str = ""  # where it comes from, and what it survived
    reported: dict[int, float] = field(default_factory=dict, repr=False)  # Unix time by epoch
    heir: Heir | None = None  # where it began with another trial's weights

    @property
    def epoch(self) -> int:
        """The last epoch that was reported, by itself or the trial whose weights it has."""
        return max(self.epochs, default=self.heir.epoch if self.heir else 0)

    @property
    def metrics(self) -> dict[str, Any]:
        """What the last epoch reported."""
        return self.epochs[self.epoch] if self.epochs else {}

    @property
    def scored(self) -> dict[str, Any]:
        """What the epoch reported whose weights were scored: the best one, not always the last."""
        return next((m for _, m in sorted(self.epochs.items())
                     if m.get("objective") == self.objective), self.metrics)  # fmt: skip

    @property
    def curve(self) -> list[tuple[int, float]]:
        """The objective by epoch."""
        pairs = ((epoch, finite(m.get("objective"))) for epoch, m in sorted(self.epochs.items()))
        return [(epoch, value) for epoch, value in pairs if value is not None]

    @property
    def seconds(self) -> float | None:
        """Time spent in its epochs; waiting and interruptions do not count."""
        return self._summed("epoch_seconds")

    @property
    def gpu_seconds(self) -> float | None:
        """GPUs times the time spent in its epochs."""
        return self._summed("gpu_seconds")

    @property
    def fallbacks(self) -> float | None:
        """Scenes that the solver's SVD fallback served, over all epochs."""
        return self._summed("solver_fallbacks")

    def _summed(self, name: str) -> float | None:
        found = [finite(metrics.get(name)) for metrics in self.epochs.values()]
        values = [value for value in found if value is not None]
        return sum(values) if values else None


def trial_seed(study_seed: int, number: int) -> int:
    """The seed of a trial: independent between trials, the same on every machine."""
    sequence = np.random.SeedSequence(study_seed, spawn_key=(0, number))
    return int(sequence.generate_state(1)[0])


def config_of(study: StudyConfig, trial: Assignment | TrialRecord) -> TrialConfig:
    """The configuration that a trial of a study runs with.

    Raises:
        ConfigError: its parameters cannot be built.
    """
    params = dict(trial.params)
    if trial.accumulation is not None:
        params["training.accumulation"] = trial.accumulation
    return study.trial_config(params, trial.seed)


def ranked(
    trials: Sequence[TrialRecord], budget: int, cost: str | None = None
) -> list[TrialRecord]:
    """Finished, finite trials of a budget, best first, of equal ones the cheaper."""
    ranking = [
        trial
        for trial in trials
        if trial.state == "done" and finite(trial.objective) is not None and trial.budget == budget
    ]
    return sorted(ranking, key=lambda t: (t.objective, t.metrics[cost] if cost else 0, t.number))


def ranks(frozen: FrozenTrial, budget: int) -> bool:
    """Whether a trial is one of those that :func:`ranked` names."""
    if frozen.state != TrialState.COMPLETE or finite(frozen.values[0]) is None:
        return False
    return bool(frozen.user_attrs.get("budget") == budget)


def is_repetition(frozen: FrozenTrial) -> bool:
    """Whether it was proposed and not run, since another has had its parameters."""
    return REPEATS in frozen.user_attrs


def is_foreign(frozen: FrozenTrial) -> bool:
    """Whether it is no trial of the study's own: a repetition, or known from an earlier study."""
    return is_repetition(frozen) or "prior" in frozen.user_attrs


def heir_of(attrs: Mapping[str, Any]) -> Heir | None:
    """What a trial has from another, by its attributes; None of one that began by itself."""
    found = attrs.get(HEIR)
    return Heir(**found) if found else None


def finite(value: Any) -> float | None:
    """A finite number as one; None of all else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def record_of(frozen: FrozenTrial) -> TrialRecord:
    """A trial as Optuna keeps it, in the ledger's words."""
    attrs = frozen.user_attrs
    kept = {
        int(key.partition("/")[2]): value
        for key, value in attrs.items()
        if key.startswith("epoch/")
    }
    epochs = {
        epoch: {name: value for name, value in metrics.items() if name != REPORTED}
        for epoch, metrics in kept.items()
    }
    state = _STATES[frozen.state]
    values = frozen.intermediate_values
    reached = frozen.values[0] if state == "done" else values[max(values)] if values else None
    checkpoint = attrs.get("checkpoint")
    heir = heir_of(attrs)
    notes = [heir.words if heir else "", retries.note(attrs)]
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
        accumulation=retries.accumulation(attrs),
        note="; ".join(note for note in notes if note),
        reported={epoch: m[REPORTED] for epoch, m in kept.items() if REPORTED in m},
        heir=heir,
    )
