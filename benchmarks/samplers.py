"""Samplers beside each other at equal compute, with trials that are really trained.

    python -m benchmarks.samplers [--json FILE] [--seeds 6] [--epochs 240] [--kinds tpe gp]

benchmarks.search replays curves from a Gaussian process, which may flatter a sampler that is one.
Here the same study (the quickstart's network on half of its scenes, 27 epochs, ASHA with the rungs
of configs/full.yaml, one slot) trains every trial, until its epochs are used up. Two things are
compared seed by seed: the best finished trial's objective, half of which is the luck of one seed,
and the mean first-epoch objective of all that the sampler proposed after its random start, what it
tries for knowledge's sake included. Some 7 minutes of CPU a seed and sampler.
"""

from __future__ import annotations

import math
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks._simulator import MemoryLedger, Scheduler, simulate
from benchmarks._timing import parser, save
from benchmarks.search import CHANCE, bootstrap, study_of
from tuner.config import StudyConfig
from tuner.records import Assignment
from tuner.trial import TrialRun

_ENDLESS = 10**6


class Trained:
    """A learning curve that is trained as far as it is looked at; every epoch counts as 1 s."""

    def __init__(self, study: StudyConfig, assignment: Assignment) -> None:
        self._run = TrialRun(study.trial_config(assignment.params, assignment.seed))
        self._values: list[float] = []
        self.seconds: NDArray[np.float64] = np.ones(study.training.epochs)

    @property
    def objective(self) -> Trained:
        """Its values, the best so far."""
        return self

    def __len__(self) -> int:
        return len(self.seconds)

    def __getitem__(self, epoch: int) -> float:
        while len(self._values) <= epoch:
            result = self._run.step()
            self._values.append(math.inf if result["failed"] else float(result["objective"]))
        return self._values[epoch]


def searched(seed: int, kind: str, epochs: int) -> dict[str, Any]:
    """One search with one sampler, with `+chance` also stopped by it."""
    torch.set_num_threads(1)
    sampler, _, chance = kind.partition("+")
    study = study_of("asha", sampler, _ENDLESS, seed, **(CHANCE if chance else {}))
    ledger = MemoryLedger(study)
    simulate(
        ledger,
        Scheduler(ledger),
        partial(Trained, study),  # type: ignore[arg-type]  # as much of a Curve as is looked at
        gpus=1,
        gpu_seconds=float(epochs),
    )
    trials = ledger.trials()
    first = [trial.curve[0][1] for trial in trials if trial.curve]
    done = [trial.objective for trial in trials if trial.state == "done"]
    return {
        "seed": seed,
        "kind": kind,
        "best": min((value for value in done if value is not None), default=math.inf),
        "proposed": float(np.mean(first[study.search.startup_trials :])),
        "start": float(np.mean(first[: study.search.startup_trials])),
        "trials": len(first),
        "done": len(done),
    }


def main() -> None:
    """Run the benchmark and print it."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--seeds", type=int, default=6, help="of searches (%(default)s)")
    arguments.add_argument("--epochs", type=int, default=240, help="of a search (%(default)s)")
    arguments.add_argument("--kinds", nargs="+", default=["tpe", "gp", "gp+chance"])
    arguments.add_argument("--jobs", type=int, default=1, help="processes (%(default)s)")
    args = arguments.parse_args()
    wanted = list(product(range(args.seeds), args.kinds))
    rows = []
    with ProcessPoolExecutor(args.jobs) as pool:
        for row in pool.map(partial(_searched, epochs=args.epochs), wanted):
            rows.append(row)
            print(
                f"seed {row['seed']}, {row['kind']}: best {row['best']:.4f}; first epochs: "
                f"random {row['start']:.4f}, proposed {row['proposed']:.4f}; {row['trials']} "
                f"trials, {row['done']} done",
                flush=True,
            )
    measure, *others = args.kinds
    figures: dict[str, Any] = {"rows": rows}
    for other in others:
        for name in ("best", "proposed"):
            values = {
                s: np.array([r[name] for r in rows if r["kind"] == s]) for s in (measure, other)
            }
            gap = figures[f"{other} - {measure}, {name}"] = bootstrap(
                values[other] - values[measure]
            )
            print(f"{other} - {measure}, {name}: {gap[0]:+.4f} [{gap[1]:+.4f}, {gap[2]:+.4f}]")
    save(figures, args.json, "cpu")


def _searched(wanted: tuple[int, str], epochs: int) -> dict[str, Any]:
    return searched(*wanted, epochs)


if __name__ == "__main__":
    main()
