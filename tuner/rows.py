"""The displayed state of a trial, from live events or the ledger."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Self

from tuner.forecast import Pace
from tuner.records import State, TrialRecord
from tuner.space import Value


@dataclass
class TrialRow:
    """The known state of one trial."""

    number: int
    params: dict[str, Value]
    state: State = "running"
    epoch: int = 0
    objective: float | None = None
    curve: dict[int, float] = field(default_factory=dict)  # objective by epoch
    seconds: dict[int, float] = field(default_factory=dict)  # by epoch
    metrics: dict[str, Any] = field(default_factory=dict)  # of the last epoch
    note: str = ""
    survived: str = ""  # part of the note as long as the trial runs
    waiting_since: float | None = None  # monotonic; until the session's first reported epoch
    waits: bool = False  # whether it waits to be started or resumed
    is_next: bool = False  # whether it starts as soon as a machine has room
    ended: float | None = None  # monotonic or unix time, to sort trials by their end

    @classmethod
    def of(cls, trial: TrialRecord) -> Self:
        """Create a row from a trial of the ledger."""
        row = cls(trial.number, trial.params, trial.state, trial.epoch, trial.objective)
        row.curve = dict(trial.curve)
        for epoch, metrics in trial.epochs.items():
            if metrics.get("epoch_seconds") is not None:
                row.seconds[epoch] = float(metrics["epoch_seconds"])
        row.metrics = dict(trial.metrics)
        row.note = note_of(trial.state, trial.reason) or trial.note
        row.ended = _unix(trial.finished)
        return row

    def take(self, metrics: Mapping[str, Any]) -> None:
        """Update the row with an epoch, which may be a repeated one."""
        self.epoch = int(metrics["epoch"])
        self.objective = self.curve[self.epoch] = float(metrics["objective"])
        if metrics.get("epoch_seconds") is not None:
            self.seconds[self.epoch] = float(metrics["epoch_seconds"])
        self.metrics, self.note, self.waiting_since = dict(metrics), self.survived, None

    def wait(self, what_for: str = "") -> None:
        """Mark the trial as waiting to be started or resumed."""
        said = f"waits {what_for}".rstrip()
        self.waits, self.note = True, "; ".join([said, *([self.survived] if self.survived else [])])

    def end(self, state: State, reason: str | None) -> None:
        """Mark the trial as ended."""
        self.note = note_of(state, reason) or self.survived
        self.ended, self.waiting_since = time.time(), None
        self.state = state  # set last: after this the row does not change

    def still(self) -> Self:
        """Return a copy for a thread that draws the row while another thread changes it."""
        if self.state != "running":
            return self
        return replace(self, curve=dict(self.curve), seconds=dict(self.seconds))

    @property
    def skipped(self) -> int:
        """Optimiser steps skipped so far."""
        return int(self.metrics.get("skipped_steps", 0))

    @property
    def fallbacks(self) -> int:
        """Scenes of the last epoch that the SVD fallback solved."""
        return int(self.metrics.get("solver_fallbacks", 0))

    @property
    def epoch_seconds(self) -> float | None:
        """Duration of the last epoch."""
        return self.seconds.get(self.epoch)

    @property
    def place(self) -> str:
        """Machine and device."""
        return " ".join(str(self.metrics[k]) for k in ("node", "device") if self.metrics.get(k))

    @property
    def pace(self) -> Pace:
        """The input of a forecast."""
        return Pace(self.state, self.epoch, tuple(self.seconds.values()))


def note_of(state: State, reason: str | None) -> str:
    """Return the note on a trial's end; for a pruned trial only what its epoch does not show."""
    if state == "pruned":
        return (reason or "").partition(": ")[2]
    return reason or "" if state == "failed" else ""


def _unix(moment: datetime | None) -> float | None:
    return None if moment is None else moment.timestamp()
