"""What a trial costs beside its training, and how the driver's work grows with the trials.

    python -m benchmarks.overhead [--json FILE] [--trials 24] [--concurrent 1 2] [--sizes 10 100]

The first part runs studies of very short trials on a Ray of its own, as `tuner.run` does. A trial's
overhead is the time between the ends of two trials of one actor, without the second one's epochs:
the first trial of an actor, which starts it, does not count. With `--scheduler asha-pausing` it is
that of a stretch, from one rung to the next. Medians over the trials; the parts
that the driver can see are timed where they happen, and the rest is Ray's: the actor's reset and
messages. Building a trial, scoring its untrained network and writing its checkpoints are the
trial's own, but no epoch's, and are counted. The second part fills ledgers with ended trials
(minutes for 10,000) and times what the driver does for the next one; the disk's share is wall less
CPU. The third times a report under the median rule, which looks at all epochs of all trials.
"""

from __future__ import annotations

import io
import logging
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import optuna
import ray
from optuna.trial import TrialState, create_trial

from benchmarks._timing import parser, save, verdict
from tuner.config import StudyConfig, load_study
from tuner.distributed import run_distributed
from tuner.folder import RunFolder
from tuner.ledger import open_ledger
from tuner.limits import Limits
from tuner.results import drop_losers, write_best, write_trials
from tuner.search import LedgerSearch
from tuner.space import suggest
from tuner.stopping import Median
from tuner.study import Ledger
from tuner.telemetry import Progress
from tuner.tensorboard import TensorBoardLog
from tuner.watchers import Watchers

TARGET = 0.1  # seconds a trial
ENDS = ("finish", "hand_back")  # methods that end a trial's work, permanently or for now
FULL = Path(__file__).resolve().parent.parent / "configs" / "full.yaml"
_SMALL: dict[str, Any] = {
    "array__n_horizontal": 4,
    "array__n_vertical": 3,
    "scene__n_antennas": 4,
    "scene__n_snapshots": 4,
    "scene__max_sources": 2,
    "data__train_scenes": 64,
    "data__val_scenes": 16,
    "network__width": 16,
    "network__depth": 1,
    "network__heads": 2,
    "network__conv_channels": 4,
    "network__image_channels": 4,
    "network__rank": 3,
    "network__azimuth_cells": 4,
    "network__elevation_cells": 3,
    "network__range_cells": 2,
    "training__batch_size": 16,
    "training__threads": 1,
    "resources__gpus_per_trial": 0,
    "search__space": {
        "training.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
        "training.weight_decay": {"type": "float", "low": 1e-6, "high": 1e-1, "log": True},
        "network.dropout": {"type": "float", "low": 0.0, "high": 0.3},
        "loss.existence": {"type": "float", "low": 0.005, "high": 0.5, "log": True},
        "blend.beta": {"type": "float", "low": 0.0, "high": 0.6},
    },
}


@dataclass
class Seen:
    """Times that the driver observed of a trial, or of one stretch of a trial waiting at rungs."""

    pid: int = 0
    ended: float = 0.0
    epochs: float = 0.0  # seconds in its epochs
    steps: float = 0.0  # seconds in its steps: epochs, building, the first scoring, checkpoints
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # the driver's


@contextmanager
def watched(kind: type[Ledger], stretches: list[Seen]) -> Iterator[None]:
    """Time the driver's methods and append the stretches in the order of their ends."""
    running: dict[int, Seen] = {}

    def timed(owner: type, name: str, number_of: Callable[..., int | None]) -> Any:
        original = getattr(owner, name)

        @wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = original(self, *args, **kwargs)
            spent = time.perf_counter() - start
            number = number_of(result, *args)
            if name == "ask" and number is not None:
                running[number] = Seen()
            # A trial that ends while waiting belongs to no stretch.
            if number is not None and number in running:
                running[number].parts[name] += spent
                if name in ENDS:
                    running[number].ended = start
                    stretches.append(running.pop(number))
            return result

        return patch.object(owner, name, method)

    seen = LedgerSearch.reported

    def reported(self: LedgerSearch, trial_id: str, result: dict[str, Any]) -> bool:
        trial = running[self._numbers[trial_id]]
        trial.pid = result["pid"]
        trial.epochs += result["epoch_seconds"]
        trial.steps += result["time_this_iter_s"]
        return seen(self, trial_id, result)

    with ExitStack() as stack:
        stack.enter_context(patch.object(LedgerSearch, "reported", reported))
        asked = timed(kind, "ask", lambda found: found.number if found else None)
        stack.enter_context(asked)
        for name in ("report", *ENDS):
            stack.enter_context(timed(kind, name, lambda result, number, *rest: number))
        yield


def run_study(
    folder: Path, trials: int, epochs: int, concurrent: int, scheduler: str
) -> list[Seen]:
    """Run trials on Ray; return them, or their stretches, in the order of their ends."""
    options = {
        "search__trials": trials,
        "search__scheduler": scheduler,
        "search__grace_epochs": 1,
        "search__reduction_factor": 3,
        "training__epochs": epochs,
    }
    study = load_study(None, **(_SMALL | options))
    place = RunFolder.fresh(folder)
    place.config.write_text(study.to_yaml(), encoding="utf-8")
    ledger = open_ledger(place, study)
    limits = Limits(ledger)
    progress = Progress(study, [], stream=io.StringIO())
    watchers = Watchers(progress, TensorBoardLog(ledger, place.tensorboard))
    seen: list[Seen] = []

    def after() -> None:
        start = time.perf_counter()
        limits.look()
        write_trials(place, ledger)
        write_best(place, ledger)
        drop_losers(place, ledger, ledger.best())
        seen[-1].parts["results"] += time.perf_counter() - start

    with watched(type(ledger), seen):
        run_distributed(
            ledger,
            place,
            watchers,
            gpus=0,
            device="cpu",
            concurrent=concurrent,
            stop=lambda: False,
            after=after,
        )
    ledger.close()
    place.release()
    return seen


def overhead(trials: list[Seen]) -> dict[str, float]:
    """Medians in seconds over all trials except the first of each actor."""
    before: dict[int, Seen] = {}
    rows: dict[str, list[float]] = defaultdict(list)
    for trial in trials:
        last = before.get(trial.pid)
        before[trial.pid] = trial
        if last is None:
            continue
        between = trial.ended - last.ended
        rows["overhead"].append(between - trial.epochs)
        rows["building the trial, checkpoints"].append(trial.steps - trial.epochs)
        driver = {
            "proposal": trial.parts["ask"],
            "epochs into the ledger": trial.parts["report"],
            "end into the ledger": sum(last.parts[name] for name in ENDS),
            "result files": last.parts["results"],
        }
        for name, seconds in driver.items():
            rows[name].append(seconds)
        rows["Ray: reset, messages"].append(between - trial.steps - sum(driver.values()))
    return {name: statistics.median(values) for name, values in rows.items()} | {
        "trials": len(rows["overhead"])
    }


def on_ray(trials: int, concurrent: list[int], scheduler: str) -> dict[str, Any]:
    """Run the first part of the benchmark."""
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="rt", dir="/tmp") as folder:  # short, for socket paths
        ray.init(
            address="local",
            num_cpus=max(concurrent),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=100 * 2**20,
            _temp_dir=f"{folder}/ray",
        )
        try:
            for count in concurrent:
                for epochs in (1, 5) if scheduler == "none" else (27,):
                    out = Path(folder) / f"{count}-{epochs}"
                    found = overhead(run_study(out, trials, epochs, count, scheduler))
                    result[f"{count} side by side, {epochs} epochs"] = found
                    total = found["overhead"]
                    what = "trial" if scheduler == "none" else "stretch"
                    print(
                        f"{count} side by side, {epochs} epochs: overhead {1e3 * total:.0f} ms a "
                        f"{what} (target {1e3 * TARGET:.0f} ms: {verdict(total < TARGET)}), of "
                        "which "
                        + ", ".join(
                            f"{name} {1e3 * seconds:.0f} ms"
                            for name, seconds in found.items()
                            if name not in ("overhead", "trials")
                        )
                    )
        finally:
            ray.shutdown()
    return result


# The driver's growth


def filled(folder: RunFolder, study: StudyConfig, n: int) -> Ledger:
    """A ledger of n trials that ended as under ASHA: one in three is promoted at every rung."""
    ledger = Ledger(folder.database, study)
    random = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    rng = np.random.default_rng(0)
    trials = []
    for number in range(n):
        asked = random.ask()
        suggest(study.search.space, asked)
        epochs = min(27, 3 ** (int(rng.geometric(2 / 3)) - 1))
        curve = np.sort(rng.normal(0.5, 0.05, epochs))[::-1]
        values = {epoch: float(value) for epoch, value in enumerate(curve, start=1)}
        # As many numbers as an epoch of a trial reports.
        metrics = {f"metric_{index}": 0.123456789 for index in range(20)}
        epoch_attrs = {
            f"epoch/{epoch:05d}": metrics | {"epoch": epoch, "objective": value}
            for epoch, value in values.items()
        }
        trials.append(
            create_trial(
                state=TrialState.COMPLETE if epochs == 27 else TrialState.PRUNED,
                value=values[27] if epochs == 27 else None,
                params=asked.params,
                distributions=asked.distributions,
                intermediate_values=values,
                user_attrs=epoch_attrs
                | {"seed": number, "budget": 27, "checkpoint": {"location": "/x", "epoch": 1}},
            )
        )
        if epochs == 27 or number % 3 == 0:
            (folder.trial(number) / "checkpoint_000000").mkdir(parents=True)
    ledger.optuna_study.add_trials(trials)
    return ledger


def grown(n: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Median wall and CPU seconds of the driver's tasks after n trials."""
    study = load_study(FULL, search__trials=10**6)
    seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def clock(name: str, call: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = call()
        spent = time.perf_counter() - wall, time.process_time() - cpu
        seconds[name].append(spent)
        return result

    with tempfile.TemporaryDirectory() as path:
        folder = RunFolder.fresh(Path(path) / "run")
        ledger = filled(folder, study, n)
        limits = Limits(ledger)
        for _ in range(rounds):
            number = clock("proposal", ledger.ask).number
            metrics = {f"metric_{index}": 0.1 for index in range(20)}
            metrics |= {"epoch": 1, "objective": 0.5}
            clock("epoch", partial(ledger.report, number, metrics, "/x"))
            clock("end", partial(ledger.finish, number, "pruned"))
            clock("limits", limits.look)
            clock("trials.csv", lambda: write_trials(folder, ledger))
            clock("best.json", lambda: write_best(folder, ledger))
            clock("old checkpoints", lambda: drop_losers(folder, ledger, ledger.best()))
        ledger.close()
        folder.release()
    return {
        name: (statistics.median(w for w, _ in rows), statistics.median(c for _, c in rows))
        for name, rows in seconds.items()
    }


def growth(sizes: list[int], rounds: int) -> dict[str, Any]:
    """Run the second part of the benchmark."""
    result: dict[str, Any] = {}
    for n in sizes:
        found = result[str(n)] = grown(n, rounds)
        if len(result) == 1:
            print("\nwall (CPU) ms\n\n| ended trials | " + " | ".join(found) + " |")
            print("|" + "---|" * (len(found) + 1))
        cells = (f"{1e3 * wall:.1f} ({1e3 * cpu:.1f})" for wall, cpu in found.values())
        print(f"| {n} | " + " | ".join(cells) + " |", flush=True)
    return result


def judged(sizes: list[int], rounds: int) -> dict[str, float]:
    """Run the third part: median seconds of a report under the median rule, by trials."""
    study = load_study(FULL, search__scheduler="median")
    epochs = range(1, study.training.epochs + 1)
    rule = Median(study)
    result: dict[str, float] = {}
    for n in sizes:
        curves = [dict.fromkeys(epochs, number / n) for number in range(n)]
        others = [create_trial(state=TrialState.PRUNED, intermediate_values=c) for c in curves]
        last = len(epochs) - 1  # the epoch to judge, which considers all earlier ones
        seconds = []
        for _ in range(rounds):
            begun = time.perf_counter()
            rule.stops(n, last, {last: 0.0}, lambda trials=others: trials)  # type: ignore[misc]
            seconds.append(time.perf_counter() - begun)
        result[str(n)] = statistics.median(seconds)
        told = f"{1e3 * result[str(n)]:.1f} ms a report under the median rule"
        print(f"{n} trials of {len(epochs)} epochs: {told}", flush=True)
    return result


def main() -> None:
    """Run the benchmark and print the result."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    arguments = parser(__doc__ or "")
    arguments.add_argument("--trials", type=int, default=24, help="of a study (%(default)s)")
    arguments.add_argument("--concurrent", type=int, nargs="+", default=[1, 2])
    arguments.add_argument("--scheduler", choices=["none", "asha-pausing"], default="none")
    arguments.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000])
    arguments.add_argument("--only", choices=["ray", "growth", "median"])
    args = arguments.parse_args()
    figures: dict[str, Any] = {}
    if args.only in (None, "ray"):
        figures["trial"] = on_ray(args.trials, args.concurrent, args.scheduler)
    if args.only in (None, "growth"):
        figures["growth"] = growth(args.sizes, args.rounds)
    if args.only in (None, "median"):
        figures["median"] = judged(args.sizes, args.rounds)
    save(figures, args.json, "cpu")


if __name__ == "__main__":
    main()
