"""What a search is worth: which objective to search by, and what the winner gains.

    python -m benchmarks.quality objectives [--config FILE] [--trials 16] [--scenes 4000]
    python -m benchmarks.quality tuning --study RUN_DIR [--seeds 3] [--scenes 4000]
    python -m benchmarks.quality covariances --checkpoint DIR [--beta 0.3 ...] [--scenes 1000]
    python -m benchmarks.quality calibration --checkpoint DIR [--scenes 4000]
    python -m benchmarks.quality goals --checkpoint DIR [--suite ideal] [--scenes 4000]

``objectives`` trains random points of a study's space and prints the rank correlation (Spearman)
of every validation metric after ``search.grace_epochs`` with the final F1 on held-out scenes.
``tuning`` trains the default, the winner and random points of a finished study at full budget
with several seeds, several at a time, and scores them beside NOMP on held-out scenes.
``covariances`` compares R_samp, R_pred and R_blend: NMSE, and F1 of MUSIC and MVDR told the
number of sources. ``calibration`` compares existence probabilities with frequencies, and counts
what the 90 % ellipsoids of position hold. ``goals`` chooses the threshold for each goal of the
decision on validation scenes of a suite, and scores all three beside NOMP.

Candidates, where a family takes them, are found once and kept.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks._checkpoints import BATCH, HARDWARE, by_nomp, calibration, covariances, drawn, goals
from benchmarks._timing import save
from model.blending import blended_covariance
from model.config import TrialConfig
from model.data import Batch
from model.decision import judge
from model.decode import detect
from model.training import Trainer
from physics.bootstrap import bootstrap_interval, resampled_f1
from physics.detections import Detections
from physics.metrics import Matching, gospa, match, subspace_error
from physics.steering import steering_vector
from tuner.config import StudyConfig, load_study
from tuner.space import suggest

# Number of scenes of a run, and a function for its score (R,) on resampled scenes (R, S).
Resampled = tuple[int, Callable[[Tensor], Tensor]]

METRICS = ("gospa", "f1", "count_accuracy", "nll", "nmse_blend", "nmse_pred", "subspace_error")
_GAINS = ("f1", "count_accuracy")  # higher is better


@torch.no_grad()
def located(trainer: Trainer, batch: Batch) -> Detections:
    """Sources reported by a training's best weights, with the threshold from its validation."""
    trainer._set_weights(trainer.best_weights)
    trainer.network.eval()
    decision, config = trainer.best_decision, trainer.config
    parts: list[Detections] = []
    for start in range(0, len(batch), BATCH):
        features = trainer._features(batch[slice(start, start + BATCH)])
        prediction = trainer.network(features)
        if prediction.cells is not None:
            parts.append(judge(prediction, decision.goal).named(decision))
            continue
        blended = blended_covariance(prediction, features, config.blend)
        wavefront = config.scene.wavefront
        parts.append(detect(prediction, blended, trainer.grid, trainer.array, wavefront))
    return Detections.concatenate(parts)


def trained(config: TrialConfig, n_scenes: int) -> Detections:
    """Train a configuration with one thread; return the sources found in held-out scenes."""
    torch.set_num_threads(1)
    trainer = Trainer(config)
    while not trainer.finished:
        trainer.run_epoch()
    return located(trainer, drawn(config, "test", n_scenes))


def random_point(study: StudyConfig, number: int) -> TrialConfig:
    """A random point of the space, determined by the number."""
    quiet = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1000 + number))
    return study.trial_config(suggest(study.search.space, quiet.ask()), seed=number)


@torch.no_grad()
def subspace_error_of(trainer: Trainer) -> float:
    """Validation subspace error of R_blend with averaged weights, which no study reports."""
    validation = trainer.source.validation()
    raw = {name: value.detach().clone() for name, value in trainer.network.named_parameters()}
    trainer._set_weights(trainer.average.weights)
    trainer.network.eval()
    errors: list[Tensor] = []
    for start in range(0, len(validation), BATCH):
        part = validation[slice(start, start + BATCH)]
        features, scenes = trainer._features(part), part.scenes
        blended = blended_covariance(trainer.network(features), features, trainer.config.blend)
        wavefront = trainer.config.scene.wavefront
        steering = steering_vector(scenes.position, trainer.array, wavefront)
        errors.append(subspace_error(blended, steering, scenes.present))
    trainer._set_weights(raw)
    return float(torch.cat(errors).double().mean())


def objectives(args: argparse.Namespace) -> dict[str, Any]:
    """Rank correlation of early metrics with final F1."""
    study = load_study(args.config)
    batch = drawn(study.trial_config({}, 0), "test", args.scenes)
    sources = batch.scenes.position, batch.scenes.present
    rows: list[dict[str, float]] = []
    for number in range(args.trials):
        trainer = Trainer(random_point(study, number))
        early: dict[str, float] = {}
        while not trainer.finished:
            metrics = trainer.run_epoch()
            if trainer.epoch == study.search.grace_epochs:
                known = metrics | {"subspace_error": subspace_error_of(trainer)}
                early = {name: float(known[name]) for name in METRICS}
        matching = match(located(trainer, batch), *sources)
        rows.append(early | {"final_f1": matching.f1})
        print(f"trial {number:2d}: " + "  ".join(f"{k} {v:.4f}" for k, v in rows[-1].items()))
    final = [row["final_f1"] for row in rows]
    found: dict[str, float] = {}
    for name in METRICS:
        sign = 1.0 if name in _GAINS else -1.0
        found[name] = float(spearmanr([sign * row[name] for row in rows], final).statistic)
        print(
            f"{name} after {study.search.grace_epochs} epochs: rank correlation {found[name]:.2f}"
        )
    return {"trials": rows, "rank_correlation": found}


def tuning(args: argparse.Namespace) -> dict[str, Any]:
    """Compare default, winner and random points, over several seeds, with NOMP."""
    from tuner.folder import RunFolder

    folder = RunFolder.existing(args.study, lock=False)
    study = load_study(folder.config)
    winner = TrialConfig.model_validate(json.loads(folder.best_json.read_text())["config"])
    epochs = study.search.full_epochs or study.training.epochs
    contenders = {
        "default": [study.trial_config({}, seed) for seed in range(args.seeds)],
        "random": [random_point(study, number) for number in range(args.random)],
        "winner": [winner.model_copy(update={"seed": seed}) for seed in range(args.seeds)],
    }
    batch = drawn(winner, "test", args.scenes)
    sources = batch.scenes.position, batch.scenes.present
    matchings: dict[str, list[Matching]] = {}
    costs: dict[str, list[Tensor]] = {}

    def score(name: str, label: str, found: Detections) -> None:
        matching, cost = match(found, *sources), gospa(found, *sources).total
        matchings.setdefault(name, []).append(matching)
        costs.setdefault(name, []).append(cost)
        print(
            f"{name} {label}: F1 {matching.f1:.4f}, GOSPA {float(cost.mean()):.3f} m, "
            f"K right {matching.count_accuracy:.3f}",
            flush=True,
        )

    score("nomp", "", by_nomp(winner, batch.scenes))
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        running = [
            (name, config, pool.submit(trained, at_full_budget(config, epochs), args.scenes))
            for name, configs in contenders.items()
            for config in configs
        ]
        for name, config, future in running:
            score(name, f"seed {config.seed}", future.result())
    result: dict[str, Any] = {"scenes": len(batch), "epochs": epochs}
    for name, runs in matchings.items():
        result[name] = {
            "f1": [run.f1 for run in runs],
            "mean_f1": _mean(runs),
            "gospa": [float(cost.mean()) for cost in costs[name]],
        }
    for one, two in (("winner", "default"), ("default", "random"), ("winner", "nomp")):
        f1 = paired([_f1(run) for run in matchings[one]], [_f1(run) for run in matchings[two]])
        cost = paired([_mean_of(run) for run in costs[one]], [_mean_of(run) for run in costs[two]])
        result[f"{one}-{two}"] = {"f1": f1, "gospa": cost}
        print(
            f"{one} less {two}: F1 {f1[0]:+.4f} [{f1[1]:+.4f}, {f1[2]:+.4f}], "
            f"GOSPA {cost[0]:+.4f} [{cost[1]:+.4f}, {cost[2]:+.4f}] m"
        )
    return result


def at_full_budget(config: TrialConfig, epochs: int) -> TrialConfig:
    """The configuration with the given number of epochs."""
    training = config.training.model_copy(update={"epochs": epochs})
    return config.model_copy(update={"training": training})


def _mean(runs: list[Matching]) -> float:
    return float(np.mean([run.f1 for run in runs]))


def _f1(matching: Matching) -> Resampled:
    return len(matching), lambda indices: resampled_f1(matching, indices)


def _mean_of(values: Tensor) -> Resampled:
    return len(values), lambda indices: values[indices].double().mean(-1)


def paired(one: list[Resampled], two: list[Resampled]) -> tuple[float, float, float]:
    """Difference of the means of two sets of runs, with its 95 % interval.

    Scenes are resampled, identically for all runs, and so are the runs of either set: the interval
    covers the choice of scenes as well as that of seeds or points. Deviations of resampled runs
    from their set's mean are scaled by sqrt(n / (n - 1)), since n resampled from n vary less than n
    new ones (Davison and Hinkley, "Bootstrap methods and their application", 1997, section 2.3).
    For three or four seeds the interval remains somewhat narrow, like a normal one compared with
    Student's.
    """
    generator = np.random.default_rng(0)
    n_scenes = one[0][0]

    def means(indices: Tensor, draw: bool) -> Tensor:
        sides = []
        for runs in (one, two):
            values = torch.stack([of(indices) for _, of in runs], dim=-1)
            if draw:
                drawn = torch.from_numpy(generator.integers(len(runs), size=values.shape))
                mean = values.mean(-1, keepdim=True)
                wider = math.sqrt(len(runs) / max(1, len(runs) - 1))
                values = mean + wider * (values.gather(-1, drawn) - mean)
            sides.append(values.mean(-1))
        return sides[0] - sides[1]

    low, high = bootstrap_interval(lambda indices: means(indices, True), n_scenes)
    return float(means(torch.arange(n_scenes).unsqueeze(0), False)), low, high


def main() -> None:
    """Run the requested part."""
    parser = argparse.ArgumentParser(description=__doc__)
    every = {
        "objectives": objectives,
        "tuning": tuning,
        "covariances": covariances,
        "calibration": calibration,
        "goals": goals,
    }
    parser.add_argument("what", choices=every)
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--study", type=Path, help="run folder of a finished study")
    parser.add_argument("--checkpoint", type=Path, help="best/ of a run folder")
    parser.add_argument("--trials", type=int, default=16, help="random points (objectives)")
    parser.add_argument("--seeds", type=int, default=3, help="of default and winner (tuning)")
    parser.add_argument("--random", type=int, default=6, help="random points (tuning)")
    parser.add_argument(
        "--beta", type=float, nargs="*", help="of R_blend (covariances); default: the network's"
    )
    parser.add_argument("--suite", choices=HARDWARE, default="ideal", help="of the scenes (goals)")
    parser.add_argument("--scenes", type=int, default=4000, help="held out")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time (tuning)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if args.what == "tuning" and args.study is None:
        parser.error("tuning needs --study RUN_DIR")
    if args.what in ("covariances", "calibration", "goals") and args.checkpoint is None:
        parser.error(f"{args.what} needs --checkpoint DIR")
    save(every[args.what](args), args.json, "cpu")


if __name__ == "__main__":
    main()
