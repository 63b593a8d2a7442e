"""Score estimators on suites of scenes and write the results to files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.agreement import check_convention
from model.config import TrialConfig
from model.data import open_split, simulate_split
from model.files import write_text
from model.localizer import Localizer
from model.shards import refuse_leaks
from physics.bootstrap import f1_interval, mean_interval
from physics.geometry import PlanarArray
from physics.nomp import estimate_snr_db
from physics.scene import SceneConfig, Scenes
from tuner.curves import error_quantiles, ratio_by_snr
from tuner.errors import StudyError
from tuner.evaluation_page import page
from tuner.scoreboard import (
    REFERENCE,
    Estimator,
    Score,
    Truth,
    classical_estimators,
    full_report,
    network_estimators,
    score,
)
from tuner.suites import CHOOSERS, SUITES, Suite

DEFAULT_SCENES = 512
_SNR_SCENES = 256  # on which the SNR estimate is evaluated


def suite_scenes(
    config: TrialConfig, suite: Suite, array: PlanarArray, n_scenes: int | None
) -> tuple[Scenes, str]:
    """Return the held-out scenes of a suite and a description of their origin.

    Args:
        config: how scenes are simulated, or where recorded ones are stored.
        suite: the changes to this configuration.
        array: the surface used to simulate the scenes.
        n_scenes: number of scenes, an upper bound for recorded ones; None means ``DEFAULT_SCENES``,
            or all recorded scenes. A subset of recorded scenes is drawn at random with a fixed
            seed, as files may be sorted.

    Raises:
        DataError: shards that cannot be used.
    """
    scene = suite.scene(config.scene)
    if config.data.shards is None:
        count = n_scenes or DEFAULT_SCENES
        parts = list(simulate_split(config.data, scene, array, "test", count))
        return Scenes.concatenate(parts), f"{count} simulated, seed {config.data.seed}"
    folder = Path(config.data.shards)
    held_out = (folder / "test").is_dir()
    split = open_split(config.data, scene, array, "test" if held_out else "val")
    check_convention([split])
    if (folder / "train").is_dir():
        refuse_leaks([open_split(config.data, scene, array, "train"), split])
    count = len(split) if n_scenes is None else min(n_scenes, len(split))
    warning = "" if held_out else f" ({CHOOSERS})"
    chosen = np.sort(np.random.default_rng(0).choice(len(split), count, replace=False))
    drawn = f", drawn from {len(split)}" if count < len(split) else ""
    return split.read(chosen), f"{count} of {folder / split.name}{drawn}{warning}"


def evaluate_suite(
    name: str,
    config: TrialConfig,
    localizer: Localizer | None,
    *,
    n_scenes: int | None = None,
    methods: list[str] | None = None,
    classical: Collection[str] | None = None,
    references: list[str] | None = None,
    snr_known: bool = True,
    device: str = "cpu",
    say: Callable[[str], object] = print,
    advance: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, Any]:
    """Score every estimator on the scenes of one suite.

    Args:
        name: the suite.
        config: how scenes are simulated, or where recorded ones are stored.
        localizer: the network; None scores the classical estimators only.
        n_scenes: number of simulated scenes, or the maximum number of recorded ones. Without a
            ``test/`` folder the validation scenes are used, and the result says so.
        methods: names of the estimators to run; None runs all.
        classical: names of the classical estimators to include; None includes all.
        references: estimators whose F1 is subtracted from that of the others; None means NOMP.
        snr_known: whether estimators receive the SNR; none does if any scene's SNR is NaN.
        device: the torch device.
        say: called with a line of text at every step.
        advance: called after every batch with the estimator, the scenes done and their total.

    Raises:
        StudyError: an unknown method, or a reference that is not run.
        DataError: shards that cannot be used.
    """
    suite = SUITES[name]
    array = config.array.build()
    made_by, scene = suite.array(array), suite.scene(config.scene)
    drawn, origin = suite_scenes(config, suite, made_by, n_scenes)
    if snr_known and bool(torch.isnan(drawn.known_snr_db).any()):
        snr_known, origin = False, f"{origin}; some have no SNR, so no estimator is told one"
    drawn = drawn.to(device)
    truth = Truth.of(drawn, made_by, scene)
    if suite.told:
        believed, surface = scene, made_by
    else:  # keep the configured model, apart from the maximum number of sources
        most = {"max_sources": scene.max_sources}
        believed, surface = config.scene.model_copy(update=most), array
    competing = classical_estimators(surface, believed, config.tikhonov, snr_known=snr_known)
    if classical is not None:
        competing = [one for one in competing if one.name in classical]
    if localizer is not None:
        networks = network_estimators(localizer, surface, believed, snr_known=snr_known)
        competing = networks + competing
    estimators = _chosen(competing, methods)
    beside = _references([one.name for one in estimators], references)
    say(f"{name}: {suite.description}; scenes: {origin}")
    scores: list[Score] = []
    for estimator in estimators:
        scores.append(score(estimator, truth, advance))
        say(f"  {estimator.name}: {scores[-1].scenes_per_second:.1f} scenes/s")
    return {
        "description": suite.description,
        "scenes": origin,
        "gated_share": float(truth.gated.sum() / max(1, int(drawn.present.sum()))),
        "methods": {s.name: full_report(s, truth) for s in scores},
        "paired_f1": {name: _paired_f1(scores, name) for name in beside},
        "paired_gospa_m": {name: _paired_gospa(scores, name) for name in beside},
        "snr_estimate": _snr_estimate(truth, surface, believed),
        "curves": {s.name: _curves(s, truth) for s in scores},
    }


def _chosen(every: list[Estimator], methods: list[str] | None) -> list[Estimator]:
    if methods is None:
        return every
    names = [estimator.name for estimator in every]
    for name in methods:
        if name not in names:
            needs = " (with a --checkpoint that has it)" if name.startswith("network") else ""
            raise StudyError(f"--method: no method {name!r}{needs}; there are {', '.join(names)}")
    return [estimator for estimator in every if estimator.name in methods]


def _references(names: list[str], asked: list[str] | None) -> list[str]:
    """Return the estimators to compare with: those requested, or NOMP if it is run."""
    if asked is None:
        return [name for name in names if name == REFERENCE]
    for name in asked:
        if name not in names:
            raise StudyError(f"--reference: {name!r} is not run; there are {', '.join(names)}")
    return list(dict.fromkeys(asked))


def _paired_f1(scores: list[Score], name: str) -> dict[str, Any]:
    """Return the F1 difference to one estimator on the same scenes, with its bootstrap interval."""
    reference = next(s for s in scores if s.name == name)
    return {
        s.name: {
            "difference": s.matching.f1 - reference.matching.f1,
            "interval": list(f1_interval(s.matching, reference.matching)),
        }
        for s in scores
        if s is not reference
    }


def _paired_gospa(scores: list[Score], name: str) -> dict[str, Any]:
    """Return the same for the mean GOSPA [m]."""
    reference = next(s for s in scores if s.name == name)
    return {
        s.name: {
            "difference": float((s.gospa - reference.gospa).mean()),
            "interval": list(mean_interval(s.gospa, reference.gospa)),
        }
        for s in scores
        if s is not reference
    }


def _snr_estimate(truth: Truth, array: PlanarArray, scene: SceneConfig) -> dict[str, Any]:
    """Return the error of the SNR estimated from the measurement alone [dB]."""
    some = truth.scenes[slice(0, _SNR_SCENES)]
    level = estimate_snr_db(some.y, some.H, some.codes, array=array, scene=scene)
    with_sources = (some.n_sources > 0) & torch.isfinite(some.snr_db)
    error = (level - some.snr_db)[with_sources]
    error = error[torch.isfinite(error)]  # none where no source is found
    if not len(error):
        return {"scenes": 0}
    return {
        "scenes": len(error),
        "without_estimate": int(with_sources.sum()) - len(error),
        "mean_error_db": float(error.mean()),
        "median_absolute_error_db": float(error.abs().median()),
        "ninetieth_percentile_db": float(error.abs().quantile(0.9)),
    }


def _curves(score: Score, truth: Truth) -> dict[str, Any]:
    """Return the page's curves: |error| / CRB by SNR with interval, and the error distribution."""
    return {
        "ratio_by_snr": ratio_by_snr(score, truth),
        "error_quantiles": error_quantiles(score, truth),
    }


def evaluation_of(
    suites: dict[str, Any],
    config: TrialConfig,
    *,
    checkpoint: Path | None,
    snr_known: bool = True,
    device: str = "cpu",
) -> dict[str, Any]:
    """Return the full result: the scored suites and the settings they were scored with."""
    return {
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "snr": "known" if snr_known else "unknown",
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "config": config.model_dump(mode="json"),
        "suites": suites,
    }


def write_evaluation(target: Path, content: dict[str, Any]) -> None:
    """Write FILE.json, FILE.csv and FILE.html."""
    write_text(target, json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_text(target.with_suffix(".csv"), _table(content))
    write_text(target.with_suffix(".html"), page(content))


def _table(content: dict[str, Any]) -> str:
    """Return a CSV table with one row per suite, method and group of scenes."""
    rows: list[dict[str, Any]] = []
    for suite, found in content["suites"].items():
        for method, report in found["methods"].items():
            groups = [("overall", "", report["overall"])]
            groups += [
                ("snr_db", f"{g['low_db']:g}..{g['high_db']:g}", g) for g in report["by_snr"]
            ]
            groups += [("n_sources", str(g["n_sources"]), g) for g in report["by_k"]]
            groups += [
                ("range_m", f"{g['low_m']:g}..{'' if g['high_m'] is None else g['high_m']}", g)
                for g in report["by_range"]
            ]
            for group, value, numbers in groups:
                flat = {k: v for k, v in numbers.items() if not isinstance(v, list | dict)}
                interval = numbers.get("f1_interval")
                if interval is not None:
                    flat["f1_low"], flat["f1_high"] = interval
                for level, share in (numbers.get("coverage") or {}).items():
                    flat[f"coverage_{level}"] = share
                first = {"suite": suite, "method": method, "group": group, "value": value}
                speed = {"scenes_per_second": report["scenes_per_second"]}
                rows.append(first | flat | (speed if group == "overall" else {}))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
