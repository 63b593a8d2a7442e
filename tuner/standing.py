"""The status of a study, read from its run folder."""

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
_FRESH = 60.0  # a driver on another machine counts as alive if it wrote within this many seconds


@dataclass(frozen=True)
class Standing:
    """The status of a study at one moment."""

    folder: RunFolder
    study: StudyConfig
    state: StudyState
    driver: Driver | None
    trials: tuple[TrialRecord, ...]
    best: TrialRecord | None  # of the search
    promoted: Promoted | None  # the winner of its promotion, once that has ended
    n_new: int  # trials that have not started
    seconds: float  # for which trials have run, over all sessions
    seconds_left: float | None  # estimate; None while unknown
    ended: Ended | None  # why the search has nothing left to run; None if it has
    promoting: bool  # whether the search has ended and promoted runs are left
    mode: str  # option of the resume command: " --local" or ""
    now: float  # unix time

    @property
    def report_age(self) -> float | None:
        """Seconds since the last epoch was reported."""
        times = [max(trial.reported.values()) for trial in self.trials if trial.reported]
        return max(0.0, self.now - max(times)) if times else None

    @property
    def concluding(self) -> bool:
        """Whether the search has ended while its driver is still running."""
        return self.state == "running" and self.ended is not None

    @property
    def next_command(self) -> str | None:
        """The next command to run, if any."""
        where = shlex.quote(str(self.folder.path))
        if self.state == "running":
            return None
        if self.state == "finished":
            if self.promoted is not None and not self.folder.best.exists():
                return f"python -m tuner.run --resume {where}{self.mode}"  # fetches the network
            if self.promoted is not None:  # already trained at full budget
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
        """Return the status as plain values; times in seconds."""
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
    """Read the status of a run folder without changing it.

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
    """Return whether a driver on another machine is running whose lock is not visible here.

    A driver writes its clock to the ledger every second or epoch, and clears the lock at its end.
    """
    if driver.is_here:
        return False
    try:
        return now - folder.database.stat().st_mtime < _FRESH
    except OSError:
        return False


@contextmanager
def _reading(folder: RunFolder, study: StudyConfig, *, alive: bool) -> Iterator[Ledger | None]:
    """Open the ledger for reading; yield None if a driver has not created it yet."""
    if not folder.has_ledger:
        yield None
        return
    try:
        ledger = read_ledger(folder, study)
    except (StudyError, SQLAlchemyError, OptunaError, KeyError) as error:
        if alive:  # it is being created
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
