"""The local mode: runs the same trials one after another in this process, without Ray.

Breakpoints work, tracebacks are plain, and the ledger has the same form as with Ray, so that each
mode can resume where the other one stopped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tuner.checkpoints import StorageOut, TrialCheckpoints, starting_points, storage_error
from tuner.folder import RunFolder
from tuner.records import Assignment, End
from tuner.retries import exhausted_reason
from tuner.study import Ledger
from tuner.trial import DeviceLost, MemoryExhausted, TrialRun, place_of
from tuner.watchers import Watcher


def local_device(gpus_per_trial: float | None) -> str:
    """Return the GPU if there is one and it is not declined, else the CPU."""
    wanted = gpus_per_trial is None or gpus_per_trial > 0
    return "cuda" if wanted and torch.cuda.is_available() else "cpu"


def run_local(
    ledger: Ledger,
    folder: RunFolder,
    progress: Watcher,
    *,
    device: str,
    stop: Callable[[], bool],
    after: Callable[[], None],
) -> None:
    """Run the study in this process to its end or until `stop` returns True.

    Args:
        ledger: the study.
        folder: the run folder, to which checkpoints are written.
        progress: receives trial events.
        device: the torch device of the trials.
        stop: called before every trial and after every epoch; True ends the run and leaves the
            running trial to be resumed.
        after: called after a trial has ended.

    Raises:
        StudyError: the storage of a checkpoint from which a trial resumes does not answer.
    """
    orphans = deque(ledger.orphans())

    def settle() -> None:
        for ended in ledger.settle():
            progress.finished(ended.number, ended.state, ended.reason)
            after()

    while not stop():
        settle()
        trial = orphans.popleft() if orphans else ledger.ask()
        if trial is None:
            settle()  # it is known now that no new trial is left
            return
        again = _run_trial(ledger, folder, progress, device, trial, stop)
        if again is not None:
            orphans.appendleft(again)
        after()


def _run_trial(
    ledger: Ledger,
    folder: RunFolder,
    progress: Watcher,
    device: str,
    trial: Assignment,
    stop: Callable[[], bool],
) -> Assignment | None:
    """Run a trial to its end or until `stop`; return its retry if it ran out of memory."""
    number = trial.number
    progress.started(trial)
    try:
        config = ledger.trial_config(trial)
    except ValueError as error:
        _end(ledger, progress, number, "failed", reason=f"configuration: {error}")
        return None
    home = folder.trial(number)
    home.mkdir(parents=True, exist_ok=True)
    try:
        with (
            starting_points(trial.checkpoint, trial.donor) as (checkpoint, donor),
            closing(TrialRun(config, device, checkpoint, donor)) as run,
        ):
            _run_epochs(ledger, home, progress, device, trial, run, stop)
    except MemoryExhausted as error:
        parts = ledger.out_of_memory(number, str(error))
        if parts is None:
            _end(ledger, progress, number, "failed", reason=exhausted_reason(str(error)))
            return None
        progress.halved(number, parts, str(error))
        going_on = ledger.going_on(number)
        return replace(going_on, until=trial.until, bequeaths=trial.bequeaths)
    except (StorageOut, DeviceLost) as error:
        raise storage_error(folder.path, str(error), " --local") from error
    return None


def _run_epochs(
    ledger: Ledger,
    home: Path,
    progress: Watcher,
    device: str,
    trial: Assignment,
    run: TrialRun,
    stop: Callable[[], bool],
) -> None:
    """Step a trial until it ends, has reached its assigned epoch, or `stop` returns True."""
    number = trial.number
    kept = TrialCheckpoints(str(home))
    run.build()
    if trial.bequeaths:
        kept.spare()
    elif run.epoch:
        kept.follow(trial.checkpoint)
    while True:
        result = run.step()
        if result.pop("failed"):
            (home / "error.txt").write_text(result["traceback"], encoding="utf-8")
            details = {name: result[name] for name in ("reason", "traceback")}
            _end(ledger, progress, number, "failed", **details)
            return
        finished, stopped = result.pop("finished"), None
        if not result.pop("repeated", False):
            metrics = {**result, **place_of(result, device, float(device != "cpu"))}
            stopped = ledger.report(number, metrics, kept.write(result["epoch"], run.save))
            kept.forget()
            progress.reported(number, metrics)
        if finished:
            _end(ledger, progress, number, "done", objective=result["objective"])
            return
        if stopped:
            _end(ledger, progress, number, "pruned")
            return
        if trial.until is not None and result["epoch"] >= trial.until:
            ledger.hand_back(number)
            progress.handed_back(number)
            return
        if stop():
            return


def _end(ledger: Ledger, progress: Watcher, number: int, state: End, **details: Any) -> None:
    ended = ledger.finish(number, state, **details)
    progress.finished(number, ended, ledger.trial(number).reason)
