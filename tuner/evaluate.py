"""`python -m tuner.evaluate`: a network beside the classical estimators on the same scenes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.command import DONE, INTERRUPTED, Interruption, execute

if TYPE_CHECKING:
    from model.config import TrialConfig
    from model.localizer import Localizer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_SCENES = 512  # as in tuner.evaluation, which is slow to import


@app.command()
def evaluate(
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Network: a run folder or its best/. Default: the shipped one for such scenes."
        ),
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
            help="nominal, ideal, jitter, phase-error, dropout, wavefront, low-snr, near, many, "
            "origin-paraxial, or all; may be repeated."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="network, network+refinement, music, mvdr, somp, nomp, nomp-dense, nomp-blind; "
            "may be repeated. Default: all."
        ),
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(
            help="Method that the others are compared with; may be repeated. Default: nomp."
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
    """Score a network, its refinement, MUSIC, MVDR, SOMP and NOMP on the same scenes.

    Simulated scenes come from a branch of the seed that no training and no validation draws from.
    MUSIC and MVDR are told the number of sources; the others are not. Exit codes: 0 done; 2 bad
    arguments, data or checkpoint; 130 interrupted.
    """
    from rich.console import Console

    from tuner.device import chosen_device
    from tuner.errors import StudyError
    from tuner.evaluation import evaluate_suite, evaluation_of, write_evaluation
    from tuner.scoretable import print_tables
    from tuner.waiting import counting

    chosen = chosen_device(device)
    console = Console(highlight=False)
    names = _suite_names(suite or ["nominal"])
    localizer, conventions = _conventions(checkpoint, config, set_ or [], data, seed, chosen)
    if conventions.data.shards is not None and (suite or scenes is not None or seed is not None):
        which = "--suite" if suite else "--scenes" if scenes is not None else "--seed"
        raise StudyError(f"{which}: is about simulated scenes, and the data are recorded ones")
    target = out.expanduser().resolve()
    _check_writable(target)
    if localizer is None:
        checkpoint, localizer = _shipped(conventions, chosen)
    try:
        with Interruption().watched():
            found: dict[str, Any] = {}
            for name in names:
                with counting(console=console) as advance:
                    found[name] = evaluate_suite(
                        name,
                        conventions,
                        localizer,
                        n_scenes=scenes,
                        methods=method,
                        references=reference,
                        snr_known=not unknown_snr,
                        device=chosen,
                        say=lambda text: console.print(text, markup=False, soft_wrap=True),
                        advance=advance,
                    )
                print_tables(found[name], console if console.is_terminal else None)
            content = evaluation_of(
                found,
                conventions,
                checkpoint=checkpoint,
                snr_known=not unknown_snr,
                device=chosen,
            )
            write_evaluation(target, content)
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
    """Return the network, and the configuration that defines the scenes."""
    from model.checkpoint import CheckpointError
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
    try:
        localizer = Localizer.load(checkpoint, device)
    except CheckpointError as error:
        raise StudyError(f"--checkpoint: {error}") from error
    saved = localizer.config.model_dump()
    if data is None:
        saved["data"]["shards"] = None  # simulate scenes like its training scenes
    conventions = load_trial(saved, overrides, **changes)
    trained = localizer.config
    if (conventions.array, conventions.scene.n_antennas) != (
        trained.array,
        trained.scene.n_antennas,
    ):
        raise StudyError(
            "--set: the network was trained for another array or number of antennas; "
            "array.* and scene.n_antennas must stay"
        )
    return localizer, conventions


def _shipped(config: TrialConfig, device: str) -> tuple[Path | None, Localizer | None]:
    """Return the network shipped with the package for such scenes, if any."""
    from model.localizer import Localizer
    from model.shipped import shipped_for

    folder = shipped_for(config)
    if folder is None:
        typer.echo("no network: none is shipped for such scenes; --checkpoint names your own")
        return None, None
    typer.echo(f"network: {folder.name}, shipped; what it is worth: {folder / 'CARD.md'}")
    return folder, Localizer.load(folder, device)


def _trial_fields() -> list[str]:
    from model.config import TrialConfig

    return list(TrialConfig.model_fields)


def _check_writable(target: Path) -> None:
    from tuner.errors import StudyError

    if target.suffix != ".json":
        raise StudyError(f"--out: got {target.name}; expected a name that ends in .json")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"--out: cannot write to {target.parent}: {error.strerror}") from error
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise StudyError(f"--out: cannot write to {target.parent}: permission denied")


if __name__ == "__main__":
    sys.exit(execute(app))
