"""Studies whose trials wait at rungs, without training: what the tests of them share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optuna.storages import InMemoryStorage

from tests.tuner.support import tiny_study
from tuner.config import StudyConfig
from tuner.folder import RunFolder
from tuner.local import run_local
from tuner.pausing import PausingLedger
from tuner.records import Assignment, TrialRecord
from tuner.results import drop_losers
from tuner.study import Ledger
from tuner.watchers import Watcher

EPOCHS, FACTOR, RUNGS = 9, 2, (1, 2, 4, 8)
Stretch = tuple[int, int, int | None]  # a trial, from where, and the rung at which it waits again


def study_in(folder: Path, epochs: int = EPOCHS, **search: Any) -> StudyConfig:
    changes = {
        "scheduler": "asha-pausing", "trials": 24, "sampler": "random", "grace_epochs": 1,
        "reduction_factor": FACTOR,
    } | search  # fmt: skip
    return tiny_study(folder, search=changes, training={"epochs": epochs})


class Recorder(Watcher):
    """Who went on, in order."""

    def __init__(self) -> None:
        self.stretches: list[Stretch] = []

    def started(self, assignment: Assignment) -> None:
        self.stretches.append((assignment.number, assignment.epoch, assignment.until))


def go(
    storage: InMemoryStorage,
    study: StudyConfig,
    folder: Path,
    watcher: Watcher | None = None,
) -> Ledger:
    """A session of the local mode."""
    ledger = PausingLedger(storage, study)
    home = RunFolder(folder)
    run_local(
        ledger, home, watcher or Watcher(), device="cpu", stop=lambda: False,
        after=lambda: drop_losers(home, ledger, ledger.best()),
    )  # fmt: skip
    return ledger


def story(trials: list[TrialRecord]) -> list[Any]:
    """All that a ledger says, but times and places."""
    return [(t.number, t.state, t.params, t.seed, t.curve, t.reason) for t in trials]
