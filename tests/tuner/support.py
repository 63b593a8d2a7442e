"""A study small enough to run for real many times, and how to start and kill it."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial

from model.config import TrialConfig
from tuner.command import execute
from tuner.config import StudyConfig, load_study
from tuner.folder import RunFolder
from tuner.ledger import open_ledger, read_ledger
from tuner.records import Assignment, TrialRecord
from tuner.run import app
from tuner.study import Ledger
from tuner.trainable import CONFIG, DEVICE, HOME, NUMBER, RESUME, STUDY
from tuner.yamlfile import dump_yaml

ROOT = Path(__file__).resolve().parents[2]

TINY: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "array": {"n_horizontal": 4, "n_vertical": 3},
    "scene": {"n_antennas": 4, "n_snapshots": 4, "max_sources": 2},
    "data": {"train_scenes": 16, "val_scenes": 8},
    "network": {
        "width": 8,
        "depth": 1,
        "heads": 2,
        "conv_channels": 4,
        "image_channels": 4,
        "rank": 3,
        "azimuth_cells": 4,
        "elevation_cells": 3,
        "range_cells": 2,
    },
    "training": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "ema_decay": 0.5},
    "search": {
        "trials": 3,
        "startup_trials": 2,
        "space": {
            "training.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
            "network.heads": {"type": "categorical", "choices": [1, 2, 4]},
            "blend.beta": {"type": "float", "low": 0.0, "high": 0.6},
        },
    },
}


class FakeRun:
    """A trial in no time: its objective follows from its parameters and falls with its epochs.

    In the place of tuner.local.TrialRun, where a test is about the search alone.
    """

    def __init__(
        self, config: TrialConfig, device: str, checkpoint: Path | None, donor: Path | None = None
    ) -> None:
        self.config = config
        begun = checkpoint or donor
        self.epoch = int((begun / "epoch").read_text()) if begun else 0
        self.epochs = config.training.epochs

    def build(self) -> None:
        pass

    def step(self) -> dict[str, Any]:
        repeated = self.epoch >= self.epochs  # cut between the last epoch and the ledger's line
        self.epoch += not repeated
        lost = abs(math.log10(self.config.training.learning_rate) + 3) + self.config.blend.beta
        return {
            "epoch": self.epoch,
            "objective": lost + 1 / self.epoch,
            "finished": self.epoch >= self.epochs,
            "failed": False,
            **({"repeated": True} if repeated else {}),
        }

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "epoch").write_text(str(self.epoch))

    def close(self) -> None:
        pass


class Clock:
    """Time that passes with the epochs: a minute each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        report = Ledger.report

        def reported(ledger: Ledger, *of_epoch: Any) -> str | None:
            stopped = report(ledger, *of_epoch)
            self.now += 60.0
            return stopped

        monkeypatch.setattr(Ledger, "report", reported)
        monkeypatch.setattr("tuner.limits.monotonic", lambda: self.now)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The base with sections merged; dotted keys (of a space) are plain keys."""
    result = dict(base)
    for key, value in changes.items():
        held = result.get(key)
        both = isinstance(held, Mapping) and isinstance(value, Mapping) and key != "space"
        result[key] = merged(held, value) if both else value  # type: ignore[arg-type]
    return result


def write_study(folder: Path, **changes: Any) -> Path:
    """The tiny study, changed, as a file."""
    path = folder / "study.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_yaml(merged(TINY, changes)), encoding="utf-8")
    return path


def tiny_study(folder: Path, **changes: Any) -> StudyConfig:
    """The tiny study, changed, as read from its file."""
    return load_study(write_study(folder, **changes))


def order(folder: Path, number: int, **changes: Any) -> dict[str, Any]:
    """What Ray hands to an actor: a trial of the tiny study, changed."""
    config = tiny_study(folder, **changes).trial_config({}, seed=number)
    (folder / "trials").mkdir(exist_ok=True)
    return {
        NUMBER: number,
        STUDY: "tiny",
        CONFIG: config.model_dump(mode="json"),
        DEVICE: "cpu",
        HOME: str(folder / "trials" / f"{number:04d}"),
        RESUME: None,
    }


def environment(**extra: str) -> dict[str, str]:
    """What a started command sees: one thread, Ray without tokens, no cluster from outside."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TUNE_"))}
    return kept | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", **extra}


def command(*arguments: object, module: str = "tuner.run") -> list[str]:
    """The command line of one of the project's commands."""
    return [sys.executable, "-m", module, *(str(argument) for argument in arguments)]


def run(
    *arguments: object, module: str = "tuner.run", timeout: float = 120, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command(*arguments, module=module),
        cwd=ROOT,
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_here(*arguments: object) -> int:
    """Run a study in this process; its exit code."""
    return execute(app, [str(argument) for argument in arguments])


def start(*arguments: object, module: str = "tuner.run", **extra: str) -> subprocess.Popen[str]:
    """Start a command and let it run."""
    return subprocess.Popen(
        command(*arguments, module=module),
        cwd=ROOT,
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read_until(process: subprocess.Popen[str], wanted: str, timeout: float = 90) -> list[str]:
    """The lines of a command up to the one that holds `wanted`."""
    assert process.stdout is not None
    lines: list[str] = []
    deadline = time.monotonic() + timeout
    for line in process.stdout:
        lines.append(line)
        if wanted in line:
            return lines
        if time.monotonic() > deadline:
            break
    raise AssertionError(f"{wanted!r} never came:\n{''.join(lines)}")


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9 and reap."""
    process.send_signal(signal.SIGKILL)
    process.communicate()


def processes_with(mark: str, name: str) -> list[int]:
    """Processes of ours (by a mark in their environment) with a word in their title."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            title = (folder / "cmdline").read_bytes().decode(errors="replace")
            if name in title and mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def wait_for(happened: Callable[[], bool], timeout: float = 60) -> None:
    """Poll until something is so."""
    deadline = time.monotonic() + timeout
    while not happened():
        if time.monotonic() > deadline:
            raise AssertionError("it did not happen in time")
        time.sleep(0.05)


def trials_of(folder: Path) -> list[TrialRecord]:
    """The trials of a run folder, wherever its ledger lies."""
    run_folder = RunFolder.existing(folder, lock=False)
    ledger = read_ledger(run_folder, load_study(run_folder.config))
    try:
        return ledger.trials()
    finally:
        ledger.close()


def outcome(folder: Path) -> list[Any]:
    """What has to be the same in every run of one study."""
    return [(t.number, t.state, t.seed, t.params, t.curve) for t in trials_of(folder)]


def driver(folder: Path, url: str | None, **changes: Any) -> Ledger:
    """A driver's ledger of the tiny study, in a run folder of its own."""
    study = tiny_study(folder, **changes)
    if url is not None:
        study = study.replaced({"search.storage": url})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(study.to_yaml())
    return open_ledger(RunFolder(folder), study)


def ran(ledger: Ledger, trial: Assignment, epochs: int = 2) -> None:
    """Report a trial's epochs and end it."""
    objective = 1.0
    for epoch in range(1, epochs + 1):
        objective = trial.params["blend.beta"] + 1 / epoch  # type: ignore[operator]
        ledger.report(trial.number, {"epoch": epoch, "objective": objective}, "/nowhere")
    ledger.finish(trial.number, "done", objective=objective)


def shown(trials: list[FrozenTrial]) -> list[str]:
    """All fields in words: NaN differs from itself, but not from what is written of it."""
    rows = [
        {
            name: sorted(value.items()) if isinstance(value, dict) else value
            for name, value in vars(trial).items()
        }
        for trial in trials
    ]
    return [str(sorted(row.items())) for row in rows]
