"""Further scores of a trained network besides its F1, for the parts of benchmarks.quality."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from model.config import TrialConfig
from model.data import Batch, simulate_split
from model.decision import Judged, choose, judge
from model.features import Features, compute_features
from model.front_end import CandidateSearch
from model.localizer import Localizer
from model.pointing import OwnCells, match_slots
from model.prediction import Prediction
from model.ranging import REACH
from model.seeds import Split
from physics.baselines import music, mvdr
from physics.blend import blend
from physics.bootstrap import f1_interval, mean_interval
from physics.covariance import nmse
from physics.detections import Detections
from physics.metrics import Matching, coverage, gospa, match
from physics.nomp import nomp
from physics.scene import Scenes
from tuner.suites import SUITES

BATCH = 256
# Suites that change none of the information given to an estimator.
HARDWARE = [
    name
    for name, suite in SUITES.items()
    if suite.changes and suite.changes.keys() <= SUITES["ideal"].changes.keys()
]


def drawn(config: TrialConfig, split: Split, n_scenes: int) -> Batch:
    """Scenes of a configuration, with candidates if its family uses them.

    Scenes of the split ``test`` are never drawn by training or validation.
    """
    front_end = CandidateSearch.of(config)
    parts: list[Batch] = []
    array = config.array.build()
    for scenes in simulate_split(config.data, config.scene, array, split, n_scenes):
        known = scenes.known_snr_db
        found = None
        if front_end is not None:
            found = front_end(scenes.y, scenes.H, scenes.codes, known)
        parts.append(Batch(scenes, known, found))
    return Batch.concatenate(parts)


def by_nomp(config: TrialConfig, scenes: Scenes) -> Detections:
    """Result of NOMP given the SNR and the nominal model."""
    result = nomp(
        scenes.y,
        scenes.H,
        scenes.codes,
        array=config.array.build(),
        scene=config.scene,
        snr_db=scenes.known_snr_db,
    )
    return result.detections


def covariances(args: argparse.Namespace) -> dict[str, Any]:
    """NMSE of the three covariances, and F1 of MUSIC and MVDR on them."""
    localizer = Localizer.load(args.checkpoint)
    config = localizer.config
    batch = drawn(config, "test", args.scenes)
    scenes, array, wavefront = batch.scenes, config.array.build(), config.scene.wavefront
    errors: dict[str, list[Tensor]] = {}
    found: dict[str, list[Detections]] = {}
    for part, features, prediction in predictions(localizer, batch):
        truth = part.covariance(array, wavefront)
        every = {"R_samp": features.measured_covariance(), "R_pred": prediction.covariance}
        for beta in args.beta or [config.blend.beta]:
            measured = features.measured_covariance(config.blend.shrinkage)
            every[f"R_blend, beta {beta:g}"] = blend(prediction.covariance, measured, beta)
        for name, R in every.items():
            errors.setdefault(name, []).append(nmse(R, truth))
            for method in (music, mvdr):
                spotted = method(R, array, wavefront, localizer.grid, part.n_sources, max_sources=5)
                found.setdefault(f"{method.__name__} on {name}", []).append(spotted)
    result: dict[str, Any] = {}
    for name, values in errors.items():
        result[name] = 10.0 * math.log10(float(torch.cat(values).double().mean()))
        print(f"{name}: NMSE {result[name]:.2f} dB")
    sources = scenes.position, scenes.present
    matched = {
        name: match(Detections.concatenate(parts), *sources) for name, parts in found.items()
    }
    for name, matching in matched.items():
        alone = matched[f"{name.split(' on ')[0]} on R_pred"]
        low, high = f1_interval(matching)
        less = matching.f1 - alone.f1, *f1_interval(matching, alone)
        result[name] = {"f1": matching.f1, "interval": [low, high], "less R_pred": less}
        print(
            f"{name}: F1 {matching.f1:.3f} [{low:.3f}, {high:.3f}], less R_pred "
            f"{less[0]:+.4f} [{less[1]:+.4f}, {less[2]:+.4f}]"
        )
    return result


@torch.no_grad()
def predictions(
    localizer: Localizer, batch: Batch
) -> Iterator[tuple[Scenes, Features, Prediction]]:
    """Yield scenes with the network's features and predictions, one batch at a time."""
    for start in range(0, len(batch), BATCH):
        part = batch[slice(start, start + BATCH)]
        features = compute_features(
            part.scenes.y,
            part.scenes.H,
            part.scenes.codes,
            part.snr_db,
            dictionary=localizer.network.dictionary,
            tikhonov=localizer.config.tikhonov,
            candidates=part.candidates,
            spectra=localizer.config.network.spectra,
        )
        yield part.scenes, features, localizer.network(features)


def calibration(args: argparse.Namespace) -> dict[str, Any]:
    """Compare existence probabilities with frequencies, and measure the ellipsoids' coverage."""
    localizer = Localizer.load(args.checkpoint)
    batch = drawn(localizer.config, "test", args.scenes)
    scenes = batch.scenes
    probability: list[Tensor] = []
    holds: list[Tensor] = []
    named: list[Detections] = []
    for part, _, prediction in predictions(localizer, batch):
        assert prediction.cells is not None
        judged = judge(prediction, localizer.decision.goal)
        pointing = OwnCells(prediction, prediction.cells, part.position)
        held, _ = match_slots(prediction, pointing.score(), part.present)
        probability.append(judged.probability.flatten())
        holds.append(held.flatten())
        named.append(judged.named(localizer.decision))
    q, truth = torch.cat(probability).double(), torch.cat(holds).double()
    rows, error = [], 0.0
    for low in torch.arange(0.0, 1.0, 0.1).tolist():
        inside = (q >= low) & (q < low + 0.1 + (low > 0.85))
        if not inside.any():
            continue
        mean, share = float(q[inside].mean()), float(truth[inside].mean())
        error += abs(mean - share) * float(inside.double().mean())
        rows.append({"probability": mean, "frequency": share, "candidates": int(inside.sum())})
        print(f"probability {mean:.3f}: frequency {share:.3f} of {int(inside.sum())} candidates")
    found = Detections.concatenate(named)
    matching = match(found, scenes.position, scenes.present)
    inside_90 = float(coverage(found, matching, scenes.position, [0.9])[0])
    print(f"expected calibration error {error:.4f}; 90 % ellipsoids hold {inside_90:.3f}")
    return {"reliability": rows, "ece": error, "coverage_90": inside_90}


def goals(args: argparse.Namespace) -> dict[str, Any]:
    """Scores with each goal's own threshold and of NOMP given the SNR, on scenes of a suite."""
    localizer = Localizer.load(args.checkpoint)
    config = localizer.config
    config = config.model_copy(update={"scene": SUITES[args.suite].scene(config.scene)})
    batches = [drawn(config, "val", config.data.val_scenes), drawn(config, "test", args.scenes)]
    said = [[p for *_, p in predictions(localizer, batch)] for batch in batches]
    if any(prediction.cells is None for prediction in said[1]):
        raise SystemExit(f"{args.checkpoint}: a network without a threshold has no goals")
    scenes = batches[1].scenes
    sources = scenes.position, scenes.present
    result: dict[str, Any] = {}

    def score(name: str, found: Detections) -> tuple[Matching, Tensor]:
        matching, cost = match(found, *sources), gospa(found, *sources).total
        result[name] = {
            "f1": matching.f1,
            "gospa": float(cost.double().mean()),
            "count_accuracy": matching.count_accuracy,
        }
        print(
            f"{name}: F1 {matching.f1:.3f}, GOSPA {result[name]['gospa']:.3f} m, "
            f"K right {matching.count_accuracy:.3f}"
        )
        return matching, cost

    bar, bar_cost = score("nomp", by_nomp(config, scenes))
    for goal in REACH:
        judged = [Judged.concatenate([judge(p, goal) for p in parts]) for parts in said]
        decision = choose(judged[0], batches[0].scenes, goal)
        matching, cost = score(goal, judged[1].named(decision))
        right, bar_right = ((m.n_found == m.n_true).double() for m in (matching, bar))
        less = {
            "f1": (matching.f1 - bar.f1, *f1_interval(matching, bar)),
            "gospa": (float((cost - bar_cost).double().mean()), *mean_interval(cost, bar_cost)),
            "count_accuracy": (float((right - bar_right).mean()), *mean_interval(right, bar_right)),
        }
        result[f"{goal} less nomp"] = less
        print(
            f"  threshold {decision.threshold:.3f}; less NOMP: "
            + ", ".join(f"{n} {v:+.4f} [{a:+.4f}, {b:+.4f}]" for n, (v, a, b) in less.items())
        )
    return result
