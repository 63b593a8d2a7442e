"""Faults on purpose, against real studies: how often each was tried, and what was lost by it.

    python -m benchmarks.faults                        # every fault, some ten times each
    python -m benchmarks.faults --only "driver" --times 50 --seed 1

A study of three trials runs once in peace. Then it runs again and again, and each time something
happens to it; it is gone on with `--resume` until it ends, and its ledger is compared with the
peaceful one: trials, states, seeds, parameters and every epoch's objective, bit for bit. A trial
that had ended before the fault must be left alone, none may stay running, and no configuration
may be tried twice. Only the winner's evaluation is left out: it is no part of the study.

Processes are forked from one that has imported everything, so that a run takes seconds. A kill
that came too late, after the run had ended, is not counted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from model.checkpoint import Checkpoint, CheckpointError
from model.files import PART
from model.training import Trainer
from tests.tuner.clusters import Head, actors, started_head
from tests.tuner.support import write_study
from tuner.command import BAD_INPUT, DONE, execute
from tuner.config import load_study
from tuner.records import TrialRecord
from tuner.study import Ledger

_FORKS = multiprocessing.get_context("forkserver")
_PRELOADED = ["tuner.run", "tuner.session", "tuner.distributed", "tuner.cluster", "model.training"]
STUDY: dict[str, Any] = {
    "training": {"epochs": 3},
    "data": {"train_scenes": 32},
    "search": {"trials": 3, "scheduler": "none"},
    "resources": {"concurrent": 1},
}
_LATEST = 300.0  # seconds after which a run hangs

Outcome = list[tuple[Any, ...]]


# Processes


def _be_tuner(arguments: list[str], output: Path, fault: str | None, limit_mb: int | None) -> None:
    """Run `python -m tuner.run` in a forked process."""
    with output.open("a", encoding="utf-8", buffering=1) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    import tuner.conclusion
    from tuner.run import app

    tuner.conclusion._score_winner = lambda folder, study, progress: None
    if fault == "exception":
        _raise_in_a_trial()
    if limit_mb is not None:
        from benchmarks._confined import confine_memory

        confine_memory(limit_mb)
    os._exit(execute(app, arguments))


def _raise_in_a_trial() -> None:
    """Simulate an error in user code, in the third epoch of the second trial."""
    whole = Trainer.run_epoch

    def wrong(self: Trainer) -> dict[str, Any]:
        if self.config.seed == _seed_of_second() and self.epoch == 2:
            raise ZeroDivisionError("the user's own")
        return whole(self)

    Trainer.run_epoch = wrong  # type: ignore[method-assign]


@cache
def _seed_of_second() -> int:
    from tuner.records import trial_seed

    return trial_seed(3, 1)


@dataclass(frozen=True)
class Run:
    """A study's folder, and how to start the tuner on it."""

    folder: Path
    config: Path
    mode: tuple[str, ...] = ("--local",)

    @property
    def output(self) -> Path:
        return self.folder.with_name(self.folder.name + ".txt")

    def start(self, *, fault: str | None = None, limit_mb: int | None = None) -> Any:
        """Start the study, or resume it."""
        begun = (self.folder / "config.yaml").exists()
        source = ("--resume", self.folder) if begun else ("--config", self.config)
        target = () if begun else ("--out", self.folder)
        arguments = [str(part) for part in (*source, *target, *self.mode)]
        process = _FORKS.Process(
            target=_be_tuner, args=(arguments, self.output, fault, limit_mb), daemon=True
        )
        process.start()
        return process

    def finish(self, **faults: Any) -> int:
        """Run to the end and return the exit code."""
        process = self.start(**faults)
        process.join(_LATEST)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"a run hangs; see {self.output}")
        return int(process.exitcode)

    def said(self) -> str:
        """The output so far."""
        return self.output.read_text(encoding="utf-8") if self.output.exists() else ""

    def trials(self) -> list[TrialRecord]:
        """The trials in the ledger; empty if there is no ledger yet."""
        if not (self.folder / "study.db").exists() or not (self.folder / "config.yaml").exists():
            return []
        ledger = Ledger(self.folder / "study.db", load_study(self.folder / "config.yaml"))
        try:
            return ledger.trials()
        finally:
            ledger.close()


def outcome(trials: list[TrialRecord]) -> Outcome:
    """The data that must be the same with and without a fault."""
    return [(t.number, t.state, t.seed, t.params, t.curve) for t in trials]


# Losses


def losses(before: list[TrialRecord], after: list[TrialRecord], calm: Outcome) -> list[str]:
    """Differences between a study with a fault and one without."""
    found = []
    if any(trial.state == "running" for trial in after):
        found.append("a trial is left running")
    if len({repr(trial.params) for trial in after}) < len(after):
        found.append("a configuration was tried twice")
    ends = {trial.number: (trial.state, trial.finished) for trial in after}
    found += [
        f"finished trial {trial.number} was lost or run again"
        for trial in before
        if trial.state != "running" and ends.get(trial.number) != (trial.state, trial.finished)
    ]
    found += [f"trial {a[0]} differs" for a, b in zip(outcome(after), calm, strict=False) if a != b]
    if len(after) != len(calm):
        found.append(f"{len(after)} trials instead of {len(calm)}")
    return found


def _resumed(run: Run, calm: Outcome) -> list[str]:
    before = run.trials()
    code = run.finish()
    found = [] if code == DONE else [f"--resume ended with {code}"]
    return found + losses(before, run.trials(), calm)


# Faults: each is tried once and returns the losses, or None if it came too late


class Bench:
    """The undisturbed run, and all faults."""

    def __init__(self, folder: Path, random_: random.Random) -> None:
        self.folder, self.random = folder, random_
        self.config = write_study(folder / "study", **STUDY)
        self._count = 0
        started = time.monotonic()
        calm = self._run()
        assert calm.finish() == DONE, calm.said()
        self.seconds = time.monotonic() - started
        self.calm = outcome(calm.trials())
        self.head: Head | None = None

    def _run(self, config: Path | None = None, folder: Path | None = None) -> Run:
        self._count += 1
        return Run((folder or self.folder) / f"run-{self._count}", config or self.config)

    def _on_ray(self) -> Run:
        assert self.head is not None
        run = self._run()
        return Run(run.folder, run.config, ("--address", self.head.address))

    def driver_killed(self) -> list[str] | None:
        run = self._run()
        process = run.start()
        process.join(self.random.uniform(0.0, self.seconds))
        if process.exitcode is not None:
            return None
        process.kill()
        process.join()
        return _resumed(run, self.calm)

    def driver_on_ray_killed(self) -> list[str] | None:
        run = self._on_ray()
        process = run.start()
        process.join(self.random.uniform(0.5, 2.0) * self.seconds)
        if process.exitcode is not None:
            return None
        process.kill()
        process.join()
        return _resumed(run, self.calm)

    def worker_killed(self) -> list[str] | None:
        """Kill the workers at a random moment of the trials; the driver must continue by itself."""
        assert self.head is not None
        run = self._on_ray()
        process = run.start()
        while process.exitcode is None and "starts" not in run.said():
            process.join(0.1)
        process.join(self.random.uniform(0.0, self.seconds))
        victims = actors(self.head)
        if process.exitcode is not None or not victims:
            process.join(_LATEST)
            return None
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        process.join(_LATEST)
        found = [] if process.exitcode == DONE else [f"the driver ended with {process.exitcode}"]
        return found + losses([], run.trials(), self.calm)

    def killed_in_checkpoint(self) -> list[str] | None:
        """Kill a process that saves checkpoints; counted if it left an unfinished file."""
        folder = self.folder / f"checkpoint-{self._count}"
        self._count += 1
        process = _FORKS.Process(target=_save_for_ever, args=(folder, self.config), daemon=True)
        process.start()
        while process.exitcode is None and not (folder / "checkpoint.safetensors").exists():
            time.sleep(0.005)
        time.sleep(self.random.uniform(0.0, 0.05))
        process.kill()
        process.join()
        if not list(folder.glob(f".*{PART}")):
            return None
        try:
            Checkpoint.load(folder)
        except CheckpointError as error:
            return [str(error)]
        return []

    def disk_full(self) -> list[str] | None:
        """Run on a disk of a random size, which is enlarged before the study is resumed."""
        with _small_disk(self.folder / f"disk-{self._count}", self.random.randint(80, 400)) as disk:
            if disk is None:
                raise PermissionError("no file system may be mounted here")
            folder, grow = disk
            run = self._run(folder=folder)
            code = run.finish()
            if code == DONE:
                return None
            said = run.said()
            found = (
                [] if code == BAD_INPUT and "the disk cannot be written" in said else [said[-500:]]
            )
            grow()
            return found + _resumed(run, self.calm)

    def file_too_large(self) -> list[str] | None:
        """Limit the size of files with a resource limit, which needs no privileges."""
        run = self._run()
        process = run.start()
        limit = self.random.randint(8, 300) * 1024
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        process.join(_LATEST)
        if process.exitcode == DONE:
            return None
        said = run.said()
        found = (
            []
            if process.exitcode == BAD_INPUT and "the disk cannot be written" in said
            else [said[-500:]]
        )
        return found + _resumed(run, self.calm)

    def own_exception(self) -> list[str] | None:
        run = self._run()
        code = run.finish(fault="exception")
        trials = run.trials()
        found = [] if code == DONE else [f"the run ended with {code}"]
        failed = [trial for trial in trials if trial.state == "failed"]
        if [(t.number, t.reason) for t in failed] != [(1, "ZeroDivisionError: the user's own")]:
            found.append("another end of the trial than its exception")
        found += [] if failed and "Traceback" in str(failed[0].traceback) else ["no traceback"]
        found += _resumed(run, outcome(trials))  # resuming runs no trial again
        if outcome(trials)[0] != self.calm[0]:
            found.append("another trial differs")
        return found

    def diverged(self) -> list[str] | None:
        rates = {"type": "float", "low": 1e-4, "high": 1e31, "log": True}
        wild = {
            "training": {"epochs": 3, "gradient_clip": 1e30, "max_skipped_steps": 2},
            "search": STUDY["search"]
            | {"space": {"training.learning_rate": rates}}
            | {"enqueue": [{"training.learning_rate": 10.0 ** self.random.randint(27, 31)}]},
            "data": STUDY["data"],
        }
        run = self._run(write_study(self.folder / f"wild-{self._count}", **wild))
        code = run.finish()
        trials = run.trials()
        found = [] if code == DONE else [f"the run ended with {code}"]
        if trials[1].state != "failed" or not str(trials[1].reason).startswith("diverged: "):
            found.append("a divergence was not told as such")
        return found + _resumed(run, outcome(trials))

    def out_of_memory(self) -> list[str] | None:
        """Limit the memory; compare to one part in a million, as batch parts change the summation.

        Dropout is off, since its draws differ between a batch and its parts.
        """
        big = {
            "data": {"train_scenes": 512, "val_scenes": 8},
            "scene": {"n_snapshots": 16},
            "network": {"width": 64, "depth": 4, "conv_channels": 32, "dropout": 0.0},
            "training": {"batch_size": 512, "epochs": 3},
            "search": {"trials": 1, "scheduler": "none"},
        }
        config = write_study(self.folder / "big", **big)
        calm = Run(self.folder / "big-calm", config)
        if not calm.folder.exists():
            assert calm.finish() == DONE, calm.said()
        run = self._run(config)
        code = run.finish(limit_mb=self.random.randint(220, 320))
        (trial,), (peaceful,) = run.trials(), calm.trials()
        if trial.accumulation is None and code == DONE:
            return None
        found = [] if code == DONE else [f"the run ended with {code}: {trial.reason}"]
        pairs = zip(trial.curve, peaceful.curve, strict=False)
        if len(trial.curve) != 3 or any(abs(a[1] - b[1]) > 1e-6 * b[1] for a, b in pairs):
            found.append("the trial differs")
        return found


def _save_for_ever(folder: Path, config: Path) -> None:
    trainer = Trainer(load_study(config).trial_config({}, seed=1))
    while True:
        trainer.save(folder)


@contextmanager
def _small_disk(place: Path, size_kb: int) -> Iterator[tuple[Path, Callable[[], None]] | None]:
    """Yield a file system in memory and a function that enlarges it; None if mounting fails."""
    place.mkdir(parents=True)
    size = f"size={size_kb}k"
    mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield place, lambda: _remount(place)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def _remount(place: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)


# The table

_FAULTS: dict[str, tuple[Callable[[Bench], list[str] | None], int]] = {
    "kill -9 of the driver at a random moment, --local": (Bench.driver_killed, 20),
    "kill -9 while a checkpoint is written": (Bench.killed_in_checkpoint, 50),
    "full disk (a tmpfs of random size)": (Bench.disk_full, 10),
    "files that may not grow (RLIMIT_FSIZE)": (Bench.file_too_large, 10),
    "out of memory (RLIMIT_AS)": (Bench.out_of_memory, 3),
    "exception in the user's own code": (Bench.own_exception, 5),
    "divergence to NaN": (Bench.diverged, 5),
    "kill -9 of the driver at a random moment, on Ray": (Bench.driver_on_ray_killed, 10),
    "kill -9 of a trial's process at a random moment, on Ray": (Bench.worker_killed, 10),
}


def tried(fault: Callable[[Bench], list[str] | None], bench: Bench, times: int) -> list[list[str]]:
    """The losses of each try; tries that came too late do not count."""
    found: list[list[str]] = []
    for _ in range(10 * times):
        if len(found) == times:
            break
        lost = fault(bench)
        if lost is not None:
            found.append(lost)
    return found


def main() -> int:
    """Print the table; return 1 if anything was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="faults whose name holds this")
    parser.add_argument("--times", type=int, help="tries of each (default: its own number)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and sizes")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    os.environ["RAY_AUTH_MODE"] = "disabled"
    _FORKS.set_forkserver_preload(_PRELOADED)
    worst = 0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ristune-faults-")))
        bench = Bench(folder, random.Random(asked.seed))
        print("| fault | times | lost |\n|---|---|---|", flush=True)
        for name, (fault, times) in _FAULTS.items():
            if asked.only not in name:
                continue
            if "on Ray" in name and bench.head is None:
                bench.head = stack.enter_context(started_head())
            found = tried(fault, bench, asked.times or times)
            lost = sorted({text for one in found for text in one})
            worst = max(worst, len(lost))
            print(f"| {name} | {len(found)} | {'; '.join(lost) or 'nothing'} |", flush=True)
    return int(worst > 0)


if __name__ == "__main__":
    sys.exit(main())
