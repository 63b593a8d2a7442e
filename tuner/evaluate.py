"""`python -m tuner.evaluate`: a network beside the classical estimators on the same scenes."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.command import DONE, INTERRUPTED, Interruption, execute

if TYPE_CHECKING:
    from model.config import TrialConfig
    from model.localizer import Localizer
    from physics.geometry import PlanarArray
    from physics.scene import Scenes
    from tuner.scoreboard import Estimator, Score, Truth
    from tuner.suites import Suite

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_SCENES = 512
_SNR_SCENES = 256  # that the estimate of the SNR is judged on


@app.command()
def evaluate(
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Network: best/ of a run folder. Without it: the classical ones alone."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with shards: test/ is taken, else val/.")
    ] = None,
    scenes: Annotated[
        int | None, typer.Option(min=1, help=f"Simulated scenes. Default: {_SCENES}.")
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="nominal, jitter, phase-error, dropout, low-snr, near, many, "
            "origin-paraxial, or all; may be repeated."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="network, network+refinement, music, mvdr, nomp; may be repeated. Default: all."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Study in YAML that says how scenes are made, without a checkpoint."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="a.b=VALUE", help="Change one field; may be repeated."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the simulated scenes.")] = None,
    unknown_snr: Annotated[
        bool, typer.Option("--unknown-snr", help="Tell no estimator the SNR.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. Default: the GPU where there is one.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Result in JSON; a .csv and a .html page lie beside it.")
    ] = Path("evaluation.json"),
) -> int:
    """Score a network, its refinement, MUSIC, MVDR and NOMP on the same scenes.

    Simulated scenes come from a branch of the seed that no training and no validation draws from.
    MUSIC and MVDR are told the number of sources; the others are not. Exit codes: 0 done; 2 bad
    arguments, data or checkpoint; 130 interrupted.
    """
    import torch

    from tuner.errors import StudyError

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen.startswith("cuda") and not torch.cuda.is_available():
        raise StudyError(f"--device: {chosen} asked, but this machine has no GPU")
    if data is not None and (suite or scenes is not None or seed is not None):
        which = "--suite" if suite else "--scenes" if scenes is not None else "--seed"
        raise StudyError(f"{which}: is about simulated scenes, and --data names recorded ones")
    names = _suite_names(suite or ["nominal"])
    localizer, conventions = _conventions(checkpoint, config, set_ or [], data, seed, chosen)
    target = out.expanduser().resolve()
    _check_writable(target)
    try:
        with Interruption().watched():
            content: dict[str, Any] = {
                "checkpoint": None if checkpoint is None else str(checkpoint),
                "snr": "unknown" if unknown_snr else "known",
                "device": chosen,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "config": conventions.model_dump(mode="json"),
                "suites": {},
            }
            for name in names:
                content["suites"][name] = _evaluate_suite(
                    name, conventions, localizer, scenes, method, not unknown_snr, chosen
                )
            _write(target, content)
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing was written")
        return INTERRUPTED
    for path in (target, target.with_suffix(".csv"), target.with_suffix(".html")):
        typer.echo(path)
    return DONE


def _suite_names(asked: list[str]) -> list[str]:
    from tuner.errors import StudyError
    from tuner.explain import did_you_mean
    from tuner.suites import SUITES

    if "all" in asked:
        return list(SUITES)
    for name in asked:
        if name not in SUITES:
            hint = did_you_mean(name, SUITES)
            raise StudyError(f"--suite: no suite {name!r}{hint}; there are {', '.join(SUITES)}")
    return list(dict.fromkeys(asked))


def _conventions(
    checkpoint: Path | None,
    config: Path | None,
    overrides: list[str],
    data: Path | None,
    seed: int | None,
    device: str,
) -> tuple[Localizer | None, TrialConfig]:
    """The network, and the configuration that says how scenes are made."""
    from model.localizer import Localizer
    from tuner.config import load_study, load_trial
    from tuner.errors import StudyError

    changes: dict[str, Any] = {"data__seed": seed, "data__shards": data}
    if checkpoint is None:
        study = load_study(config, overrides, **changes)
        if data is None and study.data.shards is not None:
            raise StudyError("--data: the configuration names shards; name their folder")
        return None, load_trial(study.model_dump(include=set(_trial_fields())))
    if config is not None:
        raise StudyError("--config: a checkpoint says itself how its scenes are made")
    folder = checkpoint / "best" if (checkpoint / "best").is_dir() else checkpoint
    localizer = Localizer.load(folder, device)
    saved = localizer.config.model_dump()
    if data is None:
        saved["data"]["shards"] = None  # scenes like those that it was trained on
    return localizer, load_trial(saved, overrides, **changes)


def _trial_fields() -> list[str]:
    from model.config import TrialConfig

    return list(TrialConfig.model_fields)


def _check_writable(target: Path) -> None:
    from tuner.errors import StudyError

    if target.suffix != ".json":
        raise StudyError(f"--out: got {target.name}; expected a name that ends in .json")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_suffix(".csv").open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise StudyError(f"--out: cannot write to {target.parent}: {error.strerror}") from error


def _scenes(
    config: TrialConfig, suite: Suite, array: PlanarArray, n_scenes: int | None
) -> tuple[Scenes, str]:
    """The scenes of a suite, and where they come from."""
    import numpy as np

    from model.data import check_convention, open_split, simulate_split
    from physics.scene import Scenes

    scene = suite.scene(config.scene)
    if config.data.shards is None:
        count = n_scenes or _SCENES
        parts = list(simulate_split(config.data, scene, array, "test", count))
        return Scenes.concatenate(parts), f"{count} simulated, seed {config.data.seed}"
    folder = Path(config.data.shards)
    split = open_split(config.data, scene, array, "test" if (folder / "test").is_dir() else "val")
    check_convention([split])
    return split.read(np.arange(len(split))), f"{len(split)} of {folder / split.name}"


def _evaluate_suite(
    name: str,
    config: TrialConfig,
    localizer: Localizer | None,
    n_scenes: int | None,
    methods: list[str] | None,
    snr_known: bool,
    device: str,
) -> dict[str, Any]:
    from tuner.scoreboard import Truth, full_report, score
    from tuner.scoretable import print_tables
    from tuner.suites import SUITES

    suite = SUITES[name]
    array = config.array.build()
    made_by, scene = suite.array(array), suite.scene(config.scene)
    drawn, origin = _scenes(config, suite, made_by, n_scenes)
    drawn = drawn.to(device)
    truth = Truth.of(drawn, made_by, scene)
    # What estimators believe: the fields of view and counts of the suite, and the waves and
    # surface of the configuration unless they are told otherwise.
    if not suite.told:
        believed = {"wavefront": config.scene.wavefront, "source_mode": config.scene.source_mode}
        scene = scene.model_copy(update=believed)
    told_array = made_by if suite.told else array
    estimators = _estimators(localizer, told_array, scene, config, methods, snr_known)
    typer.echo(f"{name}: {suite.description}; scenes: {origin}")
    scores: list[Score] = []
    for estimator in estimators:
        scores.append(score(estimator, truth))
        typer.echo(f"  {estimator.name}: {scores[-1].scenes_per_second:.1f} scenes/s")
    content = {
        "description": suite.description,
        "scenes": origin,
        "gated_share": float(truth.gated.sum() / max(1, int(drawn.present.sum()))),
        "methods": {s.name: full_report(s, truth) for s in scores},
        "paired_f1": _paired(scores),
        "snr_estimate": _snr_estimate(truth, told_array, scene),
        "curves": {s.name: _curves(s, truth) for s in scores},
    }
    print_tables(content)
    return content


def _estimators(
    localizer: Localizer | None,
    array: PlanarArray,
    scene: Any,
    config: TrialConfig,
    methods: list[str] | None,
    snr_known: bool,
) -> list[Estimator]:
    from tuner.errors import StudyError
    from tuner.scoreboard import classical_estimators, network_estimators

    every = classical_estimators(array, scene, config.tikhonov, snr_known=snr_known)
    if localizer is not None:
        every = network_estimators(localizer, array, scene, snr_known=snr_known) + every
    if methods is None:
        return every
    names = [estimator.name for estimator in every]
    for name in methods:
        if name not in names:
            needs = " (with --checkpoint)" if name.startswith("network") else ""
            raise StudyError(f"--method: no method {name!r}{needs}; there are {', '.join(names)}")
    return [estimator for estimator in every if estimator.name in methods]


def _paired(scores: list[Score]) -> dict[str, Any]:
    """F1 less that of NOMP on the same scenes, with its bootstrap interval."""
    from physics.metrics import f1_interval
    from tuner.scoreboard import REFERENCE

    reference = next((s for s in scores if s.name == REFERENCE), None)
    if reference is None:
        return {}
    return {
        s.name: {
            "f1_minus_nomp": s.matching.f1 - reference.matching.f1,
            "interval": list(f1_interval(s.matching, reference.matching)),
        }
        for s in scores
        if s is not reference
    }


def _snr_estimate(truth: Truth, array: PlanarArray, scene: Any) -> dict[str, Any]:
    """How well the SNR is known from the measurement alone [dB]."""
    from physics.nomp import estimate_snr_db

    some = truth.scenes[slice(0, _SNR_SCENES)]
    level = estimate_snr_db(some.y, some.H, some.codes, array=array, scene=scene)
    error = (level - some.snr_db)[some.n_sources > 0]
    if not len(error):
        return {"scenes": 0}
    return {
        "scenes": len(error),
        "mean_error_db": float(error.mean()),
        "median_absolute_error_db": float(error.abs().median()),
        "ninetieth_percentile_db": float(error.abs().quantile(0.9)),
    }


def _curves(score: Score, truth: Truth) -> dict[str, Any]:
    """What the page draws: |error| / CRB by SNR with its interval, and the errors' distribution."""
    from tuner.curves import error_quantiles, ratio_by_snr

    return {
        "ratio_by_snr": ratio_by_snr(score, truth),
        "error_quantiles": error_quantiles(score, truth),
    }


def _write(target: Path, content: dict[str, Any]) -> None:
    from model.files import write_text
    from tuner.evaluation_page import page

    write_text(target, json.dumps(content, indent=2) + "\n")
    write_text(target.with_suffix(".csv"), _table(content))
    write_text(target.with_suffix(".html"), page(content))


def _table(content: dict[str, Any]) -> str:
    """One row per suite, method and group of scenes."""
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


if __name__ == "__main__":
    sys.exit(execute(app))
