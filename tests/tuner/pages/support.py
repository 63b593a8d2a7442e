"""Studies as the pages meet them, made of records: of any size, and in no time."""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from tests.tuner.support import tiny_study
from tuner.config import StudyConfig
from tuner.pages.material import Material
from tuner.records import State, TrialRecord, ranked

START = 1_790_000_000.0  # Unix time


def record(number: int, state: State = "done", **changes: Any) -> TrialRecord:
    """A trial of the tiny study: ``n_epochs`` of 10 s each on ``node``, from ``begin`` [s] on."""
    n_epochs, begin = changes.pop("n_epochs", 2), changes.pop("begin", 10.0 * number)
    node, gpu = changes.pop("node", "alpha"), changes.pop("gpu", None)
    level = changes.pop("level", 2.0 - 0.1 * (number % 13))
    extra = changes.pop("metrics", {})
    rng = np.random.default_rng(number)
    epochs: dict[int, dict[str, Any]] = {}
    for epoch in range(1, n_epochs + 1):
        objective = level * (1.0 + 1.0 / epoch)
        epochs[epoch] = {
            "epoch": epoch, "objective": objective, "f1": 0.5, "gospa": 1.5, "nmse_pred": objective,
            "grad_norm": math.exp(rng.normal()), "grad_norm_max": 3.0, "skipped_steps": 0,
            "solver_fallbacks": 0, "epoch_seconds": 10.0, "node": node, "device": "cpu",
            "untrained_objective": 9.0, **({"gpu": gpu} if gpu is not None else {}), **extra,
        }  # fmt: skip
    params = {
        "training.learning_rate": 10 ** rng.uniform(-4, -2),
        "network.heads": int(rng.choice([1, 2, 4])),
        "blend.beta": rng.uniform(0.0, 0.6),
    }
    begun = datetime.fromtimestamp(START + begin)  # noqa: DTZ006 - as Optuna keeps it
    fields: dict[str, Any] = {
        "number": number,
        "state": state,
        "params": params,
        "seed": number,
        "objective": epochs[n_epochs]["objective"] if epochs else None,
        "epochs": epochs,
        "budget": 2,
        "reason": None if state in ("done", "running") else f"because of {number}",
        "started": begun,
        "finished": None if state == "running" else begun + timedelta(seconds=10 * n_epochs),
        "reported": {e: START + begin + 10.0 * e for e in epochs},
    }
    return TrialRecord(**(fields | changes))


def material(folder: Path, *trials: TrialRecord, **changes: Any) -> Material:
    """What a report of these trials is drawn from; ``changes`` of the study or the material."""
    beside = {k: changes.pop(k) for k in ("seconds", "evaluation", "scenes") if k in changes}
    study = tiny_study(folder, **changes)
    order = ranked(list(trials), study.training.epochs)
    every = {"seconds": 100.0} | beside
    return Material(study, list(trials), order, finished=lambda: finished(study, order), **every)


def finished(study: StudyConfig, trials: list[TrialRecord]) -> optuna.Study:
    """Finished trials as the ledger hands them to Optuna's plots."""
    made = optuna.create_study(direction="minimize")
    distributions = {
        "training.learning_rate": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True),
        "network.heads": optuna.distributions.CategoricalDistribution([1, 2, 4]),
        "blend.beta": optuna.distributions.FloatDistribution(0.0, 0.6),
    }
    for trial in trials:
        made.add_trial(
            optuna.trial.create_trial(
                value=trial.objective,
                params=trial.params,
                distributions={k: distributions[k] for k in trial.params},
            )
        )
    return made
