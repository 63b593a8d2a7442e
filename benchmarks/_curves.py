"""Record learning curves of random trials, for benchmarks.search to replay.

    python -m benchmarks._curves record RUN_DIR [--trials 100] [--seed 1] [--objective nll]
        [--like OTHER_RUN_DIR]
    python -m benchmarks._curves keep RUN_DIR... [--repeats RUN_DIR...] --out FILE.json.gz

``record`` trains the quickstart's network on half of its scenes, random configurations of its space
for 27 epochs each (the epochs and the rungs of configs/full.yaml), one after another in this
process and stopped by nobody. It goes on where it was interrupted. An epoch's time is that of the
process on the CPU, which a busy machine changes least. With ``--like`` it trains the other run's
first configuration once more, seeded otherwise: that tells what the seed alone changes. ``keep``
writes what has finished into one small file.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path
from typing import Any

from model.config import OBJECTIVES, Objective
from tuner.config import StudyConfig, load_study
from tuner.folder import RunFolder
from tuner.local import run_local
from tuner.records import Assignment
from tuner.space import Value
from tuner.study import Ledger
from tuner.watchers import Watcher

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
EPOCHS, TRAIN_SCENES = 27, 1024


def recorded_study(
    trials: int,
    seed: int,
    enqueue: tuple[dict[str, Value], ...] = (),
    objective: Objective | None = None,
) -> StudyConfig:
    """The study to record, with the quickstart's objective if none is given."""
    return load_study(
        CONFIG,
        objective=objective,
        search__trials=trials,
        search__sampler="random",
        search__scheduler="none",
        search__include_base=False,
        search__enqueue=enqueue,
        training__epochs=EPOCHS,
        data__train_scenes=TRAIN_SCENES,
        resources__gpus_per_trial=0,
        seed=seed,
    )


class CpuClock(Watcher):
    """Appends the CPU seconds of each epoch to a file, one line per epoch."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = time.process_time()

    def started(self, assignment: Assignment) -> None:
        """Restart the clock, since building a trial does not count for an epoch."""
        self._before = time.process_time()

    def reported(self, number: int, metrics: dict[str, Any]) -> None:
        """Record the time of the epoch that ended."""
        now = time.process_time()
        line = {"trial": number, "epoch": metrics["epoch"], "cpu_seconds": now - self._before}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._before = now


def record(path: Path, study: StudyConfig) -> None:
    """Train the trials that are missing in the run folder."""
    folder = RunFolder(path)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.config.write_text(study.to_yaml(), encoding="utf-8")
    ledger = Ledger(folder.database, study)
    clock = CpuClock(folder.path / "cpu.jsonl")
    run_local(ledger, folder, clock, device="cpu", stop=lambda: False, after=lambda: None)
    ledger.close()


def kept(path: Path) -> list[dict[str, Any]]:
    """The finished trials of a run folder: parameters, objective and CPU seconds per epoch."""
    folder = RunFolder(path)
    ledger = Ledger(folder.database, load_study(folder.config))
    trials = [trial for trial in ledger.trials() if trial.state == "done"]
    ledger.close()
    lines = (folder.path / "cpu.jsonl").read_text(encoding="utf-8").splitlines()
    spent = {(line["trial"], line["epoch"]): line["cpu_seconds"] for line in map(json.loads, lines)}
    return [
        {
            "params": trial.params,
            "objective": [round(value, 6) for _, value in trial.curve],
            "seconds": [round(spent[trial.number, epoch], 3) for epoch, _ in trial.curve],
        }
        for trial in trials
    ]


def main() -> None:
    """Record curves, or write recorded curves to a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="train trials")
    recording.add_argument("folder", type=Path)
    recording.add_argument("--trials", type=int, default=100)
    recording.add_argument("--seed", type=int, default=1)
    recording.add_argument("--objective", choices=list(OBJECTIVES), help="not the quickstart's")
    recording.add_argument("--like", type=Path, metavar="RUN_DIR")
    keeping = commands.add_parser("keep", help="write the finished trials into one file")
    keeping.add_argument("folders", type=Path, nargs="+")
    keeping.add_argument("--repeats", type=Path, nargs="+", default=[], metavar="RUN_DIR")
    keeping.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "record":
        again = () if args.like is None else (kept(args.like)[0]["params"],)
        trials = args.trials if args.like is None else 1
        study = recorded_study(trials, args.seed, again, args.objective)
        record(args.folder, study)
        return
    trials = [trial for folder in args.folders for trial in kept(folder)]
    study = load_study(args.folders[0] / "config.yaml")
    content = {
        "study": {"epochs": EPOCHS, "train_scenes": TRAIN_SCENES, "objective": study.objective},
        "space": study.model_dump(mode="json")["search"]["space"],
        "trials": trials,
        # One configuration with several seeds: the first folder's first trial and its repeats.
        "repeats": trials[:1] + [kept(folder)[0] for folder in args.repeats],
    }
    # No modification time in the file: the same trials give the same bytes.
    packed = gzip.compress(json.dumps(content).encode(), mtime=0)
    args.out.write_bytes(packed)
    print(f"{len(trials)} trials of {EPOCHS} epochs in {args.out} ({len(packed) / 1e3:.0f} kB)")


if __name__ == "__main__":
    main()
