"""How a study stands, read from its run folder by whoever can read it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optuna.exceptions import OptunaError
from sqlalchemy.exc import SQLAlchemyError

from tuner.config import StudyConfig, load_study
from tuner.errors import StudyError
from tuner.folder import Driver, RunFolder
from tuner.forecast import seconds_left
from tuner.ledger import mode_of, read_ledger
from tuner.limits import Ended, Limits, why_ended
from tuner.promotion import Promoted, open_promotion
from tuner.records import TrialRecord
from tuner.study import Ledger

StudyState = Literal["running", "finished", "interrupted", "never started"]
_FRESH = 60.0  # seconds since a driver elsewhere wrote, below which it is taken to be alive


@dataclass(frozen=True)
class Standing:
    """A study at one moment."""

    folder: RunFolder
    study: StudyConfig
    state: StudyState
    driver: Driver | None
    trials: tuple[TrialRecord, ...]
    best: TrialRecord | None  # of the search
    promoted: Promoted | None  # the winner of its promotion, once that has ended
    n_new: int  # trials that have not started
    seconds: float  # that trials have run, over all sessions
    seconds_left: float | None  # about; None while nothing tells it
    ended: Ended | None  # why the search has nothing to run, if that is so
    promoting: bool  # whether the search has ended and promoted runs are left
    mode: str  # of a command that goes on: " --local", or nothing
    now: float  # unix time

    @property
    def report_age(self) -> float | None:
        """Seconds since the last epoch was reported."""
        times = [max(trial.reported.values()) for trial in self.trials if trial.reported]
        return max(0.0, self.now - max(times)) if times else None

    @property
    def concluding(self) -> bool:
        """Whether the search has ended and its driver is still at work."""
        return self.state == "running" and self.ended is not None

    @property
    def next_command(self) -> str | None:
        """What to type now."""
        where = shlex.quote(str(self.folder.path))
        if self.state == "running":
            return None
        if self.state == "finished":
            if self.promoted is not None and not self.folder.best.exists():
                return f"python -m tuner.run --resume {where}{self.mode}"  # fetches it
            if self.promoted is not None:  # it has been trained at full budget
                return f"python -m model.locate SNAPSHOTS --checkpoint {where}/best"
            if self.best is not None:
                return f"python -m tuner.train --from {where}"
            more = self.ended.remedy if self.ended else None
            return f"python -m tuner.run --resume {where}{self.mode} {more}" if more else None
        return f"python -m tuner.run --resume {where}{self.mode}"

    def counts(self) -> dict[str, int]:
        """Trials by state, and those that have not started."""
        states = [trial.state for trial in self.trials]
        known = {name: states.count(name) for name in ("running", "done", "pruned", "failed")}
        return known | {"to_start": self.n_new}

    def as_json(self) -> dict[str, Any]:
        """The same in plain values; times in seconds."""
        best, driver, won = self.best, self.driver, self.promoted
        return {
            "run_dir": str(self.folder.path),
            "study": self.study.name,
            "state": self.state,
            "driver": driver and {"pid": driver.pid, "host": driver.host, "since": driver.since},
            "objective": self.study.objective,
            "trials": self.counts(),
            "best": best and {
                "trial": best.number,
                "objective": best.objective,
                "epoch": best.scored.get("epoch", best.epoch),
                "params": best.params,
            },
            "promoted": won and won.best and {
                "trial": won.trial.number,
                "mean": won.mean,
                "std": won.std,
                "seed": won.best.seed,
                "objective": won.best.objective,
            },
            "failures": [
                {"trial": t.number, "epoch": t.epoch, "reason": t.reason}
                for t in self.trials
                if t.state == "failed"
            ],
            "report_age": self.report_age,
            "seconds": self.seconds,
            "seconds_left": self.seconds_left,
            "ended": self.ended and self.ended.reason,
            "promoting": self.promoting,
            "next": self.next_command,
        }  # fmt: skip


def standing(path: Path) -> Standing:
    """Look at a run folder, and change nothing in it.

    Raises:
        StudyError: there is no study, or its ledger cannot be read.
    """
    folder = RunFolder.existing(path, lock=False)
    study = load_study(folder.config)
    driver, now = folder.driver, time.time()
    alive = driver is not None and (driver.locked or _seems_alive(folder, driver, now))
    with _reading(folder, study, alive=alive) as ledger:
        if ledger is None:
            state: StudyState = "running" if alive else "never started"
            new = study.search.planned_trials(study.training.epochs)
            return Standing(
                folder, study, state, driver, (), None, None, new, 0.0, None, None, False, "", now
            )
        trials, n_new = tuple(ledger.trials()), ledger.n_new
        ended = why_ended(ledger, Limits(ledger))
        promotion = open_promotion(ledger) if ended is not None else None
        promoting = promotion is not None and promotion.has_work
        return Standing(
            folder=folder,
            study=study,
            state=_state(trials, alive=alive, ended=ended is not None and not promoting),
            driver=driver,
            trials=trials,
            best=ledger.best(),
            promoted=None if promotion is None else promotion.winner(),
            n_new=n_new,
            seconds=ledger.seconds,
            seconds_left=seconds_left(promotion if promotion and promoting else ledger),
            ended=ended,
            promoting=promoting,
            mode=mode_of(ledger),
            now=now,
        )


def _state(trials: tuple[TrialRecord, ...], *, alive: bool, ended: bool) -> StudyState:
    if alive:
        return "running"
    if ended:
        return "finished"
    return "interrupted" if trials else "never started"


def _seems_alive(folder: RunFolder, driver: Driver, now: float) -> bool:
    """Whether a driver on another machine is at work whose lock the storage does not show here.

    It writes its clock into the ledger every second or epoch, and clears the lock when it ends.
    """
    if driver.is_here:
        return False
    try:
        return now - folder.database.stat().st_mtime < _FRESH
    except OSError:
        return False


@contextmanager
def _reading(folder: RunFolder, study: StudyConfig, *, alive: bool) -> Iterator[Ledger | None]:
    """The ledger, to be read; None where a driver has not come to make it."""
    if not folder.has_ledger:
        yield None
        return
    try:
        ledger = read_ledger(folder, study)
    except (StudyError, SQLAlchemyError, OptunaError, KeyError) as error:
        if alive:  # it is being made
            yield None
            return
        if isinstance(error, StudyError):
            raise
        line = " ".join(str(error).split())[:200]
        raise StudyError(f"{folder.path}: its ledger cannot be read: {line}") from error
    try:
        yield ledger
    finally:
        ledger.close()
