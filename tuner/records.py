"""Records of trials: an assignment to run, a trial in the ledger, a trial of an earlier study."""

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
REPORTED = "reported_at"  # key among an epoch's metrics: when they were reported
REPEATS = "duplicate_of"  # attribute of a proposal that was not run: the trial it duplicates
STOPPED = "stopped"  # attribute of a trial to be pruned: the reason
HEIR = "heir"  # attribute of a trial that started from another trial's weights


@dataclass(frozen=True)
class Heir:
    """The origin of a trial that started from another trial's weights.

    Args:
        donor: number of the other trial.
        epoch: the epoch after which the weights were taken.
        location: location of the checkpoint that holds them.
        replaces: number of the trial that it replaced.
        changed: parameters that differ from the donor's: the donor's value and the new value.
    """

    donor: int
    epoch: int
    location: str
    replaces: int
    changed: dict[str, list[Value]] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """The trial's origin as text."""
        return f"from trial {self.donor:04d} after epoch {self.epoch}"


@dataclass(frozen=True)
class Assignment:
    """A trial to run: a new one, or an interrupted one that resumes from its checkpoint.

    Args:
        donor: checkpoint of another trial to start from instead of new weights.
        until: epoch after which the trial is returned to the ledger, if it has not ended by then.
        bequeaths: whether other trials may start from its checkpoints at the epochs where it is
            assigned and returned.
    """

    number: int
    params: dict[str, Value]
    seed: int
    checkpoint: str | None = None
    epoch: int = 0
    accumulation: int | None = None  # where memory was not enough for the configuration's own
    origin: str | None = None  # source of parameters and seed if not proposed
    donor: str | None = None
    until: int | None = None
    bequeaths: bool = False


@dataclass(frozen=True)
class PriorTrial:
    """A finished trial of an earlier study, known to the sampler but not part of this study."""

    source: str
    params: dict[str, Value]
    objective: float


@dataclass(frozen=True)
class TrialRecord:
    """A trial as recorded in the ledger."""

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
    note: str = ""  # its origin, and failures that it recovered from
    reported: dict[int, float] = field(default_factory=dict, repr=False)  # Unix time by epoch
    heir: Heir | None = None  # set if it started from another trial's weights

    @property
    def epoch(self) -> int:
        """The last epoch reported by this trial, or by the donor of its initial weights."""
        return max(self.epochs, default=self.heir.epoch if self.heir else 0)

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of the last epoch."""
        return self.epochs[self.epoch] if self.epochs else {}

    @property
    def scored(self) -> dict[str, Any]:
        """The metrics of the epoch whose weights were scored: the best one, not always the last."""
        return next((m for _, m in sorted(self.epochs.items())
                     if m.get("objective") == self.objective), self.metrics)  # fmt: skip

    @property
    def curve(self) -> list[tuple[int, float]]:
        """The objective by epoch."""
        pairs = ((epoch, finite(m.get("objective"))) for epoch, m in sorted(self.epochs.items()))
        return [(epoch, value) for epoch, value in pairs if value is not None]

    @property
    def seconds(self) -> float | None:
        """Time spent in epochs, without waiting and interruptions."""
        return self._summed("epoch_seconds")

    @property
    def gpu_seconds(self) -> float | None:
        """GPUs times the time spent in its epochs."""
        return self._summed("gpu_seconds")

    @property
    def fallbacks(self) -> float | None:
        """Scenes solved by the SVD fallback, over all epochs."""
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
    """Return finished trials of a budget with finite objectives, best first; ties by lower cost."""
    ranking = [
        trial
        for trial in trials
        if trial.state == "done" and finite(trial.objective) is not None and trial.budget == budget
    ]
    return sorted(ranking, key=lambda t: (t.objective, t.metrics[cost] if cost else 0, t.number))


def ranks(frozen: FrozenTrial, budget: int) -> bool:
    """Return whether :func:`ranked` includes a trial."""
    if frozen.state != TrialState.COMPLETE or finite(frozen.values[0]) is None:
        return False
    return bool(frozen.user_attrs.get("budget") == budget)


def is_repetition(frozen: FrozenTrial) -> bool:
    """Return whether a proposal was not run because another trial has the same parameters."""
    return REPEATS in frozen.user_attrs


def is_foreign(frozen: FrozenTrial) -> bool:
    """Return whether a trial is a repetition or from an earlier study, not the study's own."""
    return is_repetition(frozen) or "prior" in frozen.user_attrs


def heir_of(attrs: Mapping[str, Any]) -> Heir | None:
    """Return the origin of a trial from its attributes; None if it started from new weights."""
    found = attrs.get(HEIR)
    return Heir(**found) if found else None


def finite(value: Any) -> float | None:
    """Return a finite number as a float, and None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def record_of(frozen: FrozenTrial) -> TrialRecord:
    """Convert an Optuna trial to a ledger record."""
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
