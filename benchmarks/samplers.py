"""Searches beside each other at equal compute, with trials that are really trained.

    python -m benchmarks.samplers [--json FILE] [--seeds 6] [--epochs 240] [--kinds tpe gp nll:tpe]
        [--scenes 4000] [--finals 2]

A kind is a sampler, with ``+chance`` also stopped by ``search.least_chance``, with ``+pauses`` by
``asha-pausing`` in ASHA's place, and with an objective before it searched by that.
benchmarks.search replays curves from a Gaussian process, which may flatter a sampler that is one.
Here the same study (the quickstart's network on half of its scenes, 27 epochs, the rungs of
configs/full.yaml, one slot) trains every trial, until its epochs are used up. Two things are
compared seed by seed: the best finished trial's objective, half of which is the luck of one seed,
and the mean first-epoch objective of all that the sampler proposed after its random start, what it
tries for knowledge's sake included. Some 7 minutes of CPU a seed and sampler.

With ``--scenes`` each winner is trained again as `tuner.train` would, on the quickstart's scenes,
at its full budget and with ``--finals`` seeds of its own, and scored on held-out scenes. That
compares objectives too.
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

from benchmarks._checkpoints import drawn
from benchmarks._curves import CONFIG
from benchmarks._simulator import MemoryLedger, WaitingLedger, simulate
from benchmarks._timing import parser, save
from benchmarks.quality import at_full_budget, trained
from benchmarks.search import CHANCE, bootstrap, study_of
from physics.metrics import gospa, match
from tuner.config import StudyConfig, load_study
from tuner.records import Assignment
from tuner.space import Value
from tuner.trial import TrialRun

_ENDLESS = 10**6


class Trained:
    """A learning curve that is trained lazily as it is read; every epoch counts as 1 s."""

    def __init__(self, study: StudyConfig, assignment: Assignment) -> None:
        self._run = TrialRun(study.trial_config(assignment.params, assignment.seed))
        self._values: list[float] = []
        self.seconds: NDArray[np.float64] = np.ones(study.training.epochs)

    @property
    def objective(self) -> Trained:
        """The values of the curve, each the best so far."""
        return self

    def __len__(self) -> int:
        return len(self.seconds)

    def __getitem__(self, epoch: int) -> float:
        while len(self._values) <= epoch:
            result = self._run.step()
            self._values.append(math.inf if result["failed"] else float(result["objective"]))
        return self._values[epoch]


def searched(seed: int, kind: str, epochs: int) -> tuple[dict[str, Any], StudyConfig]:
    """Result of one search of one kind, and the quickstart's study with the same objective."""
    torch.set_num_threads(1)
    objective, _, how = kind.rpartition(":")
    sampler, *more = how.split("+")
    if unknown := set(more) - {"chance", "pauses"}:
        raise ValueError(f"{kind}: +chance and +pauses are known, not {sorted(unknown)}")
    pauses = "pauses" in more
    scheduler = "asha-pausing" if pauses else "asha"
    study = study_of(scheduler, sampler, _ENDLESS, seed, **(CHANCE if "chance" in more else {}))
    final = load_study(CONFIG)
    if objective:
        study, final = (s.replaced({"objective": objective}) for s in (study, final))
    ledger = WaitingLedger(study) if pauses else MemoryLedger(study)
    simulate(
        ledger,
        partial(Trained, study),  # type: ignore[arg-type]  # has the parts of a Curve that are used
        gpus=1,
        gpu_seconds=float(epochs),
    )
    trials = ledger.trials()
    first = [trial.curve[0][1] for trial in trials if trial.curve]
    best = ledger.best()
    row = {
        "seed": seed,
        "kind": kind,
        "best": math.inf if best is None or best.objective is None else best.objective,
        "winner": None if best is None else best.params,
        "proposed": float(np.mean(first[study.search.startup_trials :])),
        "start": float(np.mean(first[: study.search.startup_trials])),
        "trials": len(first),
        "done": sum(trial.state == "done" for trial in trials),
    }
    return row, final


def found_by(study: StudyConfig, params: dict[str, Value], seed: int, scenes: int) -> list[float]:
    """F1 and GOSPA [m] of a configuration at the study's full budget, on held-out scenes."""
    epochs = study.search.full_epochs or study.training.epochs
    config = at_full_budget(study.trial_config(params, seed), epochs)
    truth = drawn(config, "test", scenes).scenes
    found = trained(config, scenes)
    cost = gospa(found, truth.position, truth.present).total
    return [match(found, truth.position, truth.present).f1, float(cost.double().mean())]


def main() -> None:
    """Run the benchmark and print the result."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--seeds", type=int, default=6, help="of searches (%(default)s)")
    arguments.add_argument("--epochs", type=int, default=240, help="of a search (%(default)s)")
    arguments.add_argument("--kinds", nargs="+", default=["tpe", "gp", "gp+chance"])
    arguments.add_argument("--jobs", type=int, default=1, help="processes (%(default)s)")
    arguments.add_argument("--scenes", type=int, default=0, help="held out (%(default)s)")
    arguments.add_argument("--finals", type=int, default=2, help="seeds a winner (%(default)s)")
    args = arguments.parse_args()
    wanted = list(product(range(args.seeds), args.kinds))
    work = partial(_searched, epochs=args.epochs, scenes=args.scenes, finals=args.finals)
    rows = []
    with ProcessPoolExecutor(args.jobs) as pool:
        for row in pool.map(work, wanted):
            rows.append(row)
            print(
                f"seed {row['seed']}, {row['kind']}: best {row['best']:.4f}; first epochs: "
                f"random {row['start']:.4f}, proposed {row['proposed']:.4f}; {row['trials']} "
                f"trials, {row['done']} done"
                + (f"; F1 {row['f1']:.4f}, GOSPA {row['gospa']:.4f} m" if args.scenes else ""),
                flush=True,
            )
    measure, *others = args.kinds
    figures: dict[str, Any] = {"rows": rows}
    for other in others:
        for name in _compared(measure, other, args.scenes > 0):
            values = {
                s: np.array([r[name] for r in rows if r["kind"] == s]) for s in (measure, other)
            }
            gap = figures[f"{other} - {measure}, {name}"] = bootstrap(
                values[other] - values[measure]
            )
            print(f"{other} - {measure}, {name}: {gap[0]:+.4f} [{gap[1]:+.4f}, {gap[2]:+.4f}]")
    save(figures, args.json, "cpu")


def _compared(one: str, two: str, scored: bool) -> list[str]:
    """Fields by which two kinds can be compared; objective values only if it is the same."""
    same = one.rpartition(":")[0] == two.rpartition(":")[0]
    return ["best", "proposed"] * same + ["f1", "gospa"] * scored


def _searched(wanted: tuple[int, str], epochs: int, scenes: int, finals: int) -> dict[str, Any]:
    row, study = searched(*wanted, epochs)
    if scenes and row["winner"] is None:
        row["f1"] = row["gospa"] = math.nan
    elif scenes:
        scores = [found_by(study, row["winner"], 10**6 + i, scenes) for i in range(finals)]
        row["f1"], row["gospa"] = np.mean(scores, axis=0).tolist()
    return row


if __name__ == "__main__":
    main()
