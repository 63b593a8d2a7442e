"""`python -m tuner.train --from RUN_DIR|best.json`: train a study's winner at full budget."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.command import DONE, INTERRUPTED, NOTHING_FINISHED, Interruption, complain, execute

if TYPE_CHECKING:
    from model.config import TrialConfig

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def train(
    source: Annotated[
        Path, typer.Option("--from", help="Run folder of a study, or its best.json.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the result. Default: <run folder>/final.")
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="Budget. Default: the study's search.full_epochs, else the search's."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Default: the winner's own.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with train/ and val/ shards.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="a.b=VALUE", help="Change one field; may be repeated."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. Default: the GPU where there is one.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint in the folder.")
    ] = False,
) -> int:
    """Train the winner again, by itself and to the end.

    With the search's budget and seed it reaches the search's score, bit for bit on a CPU.
    Exit codes: 0 done; 1 the training diverged; 2 bad configuration or data; 130 interrupted,
    go on with --resume.
    """
    from tuner.device import check_precision, chosen_device
    from tuner.disk import ended_by_disk, full_disk
    from tuner.errors import StudyError
    from tuner.trial import is_out_of_memory

    winner, path = _read_winner(source)
    config = _configure(winner, winner["config"], epochs, seed, data, set_ or [])
    # Trials from which it inherited its weights, each up to some epoch.
    ancestors = [
        (_configure(winner, one["config"], epochs, seed, data, set_ or []), one)
        for one in winner.get("lineage", ())
    ]
    folder = (out or path.parent / "final").expanduser().resolve()
    chosen = chosen_device(device)
    stages = _stages(winner, ancestors, config, folder / "checkpoint")
    for stage in stages:
        check_precision(stage.config.precision, chosen)

    def again() -> str:
        return " the same command" + (" and --resume" if _begun(stages) and not resume else "")

    try:
        with Interruption().watched():
            return _train(winner, stages, folder, chosen, resume)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; go on with{again()}")
        return INTERRUPTED
    except Exception as error:
        if (said := full_disk(error)) is not None:
            raise ended_by_disk(said, again()) from error
        if is_out_of_memory(error):
            line = " ".join(str(error).split())[:300]
            held = config.training.accumulation
            parts = min(2 * held, config.training.batch_size)
            remedy = (
                f"with --set training.accumulation={parts} batches are taken in {parts} parts: "
                f"try{again()}, or another --device"
                if parts > held
                else f"batches are taken scene by scene already: try{again()} with another --device"
            )
            raise StudyError(f"out of memory on {chosen} ({line}); {remedy}") from error
        raise


def _train(
    winner: dict[str, Any],
    stages: list[_Stage],
    folder: Path,
    device: str,
    resume: bool,
) -> int:
    from model.datacheck import check_data
    from model.network import check_plugins
    from model.plausible import array_notes

    config = stages[-1].config
    check_plugins(config)
    for note in array_notes(config.array.build(), config.scene):
        typer.echo(note)
    data = check_data(config)
    for said in (data.said, *data.notes):
        typer.echo(f"data: {said}")
    with _alone(folder, stages, resume):
        return _train_alone(winner, stages, folder, device)


def _train_alone(winner: dict[str, Any], stages: list[_Stage], folder: Path, device: str) -> int:
    from model.checkpoint import export_best, has_checkpoint
    from model.config import score as score_of
    from model.files import write_text
    from model.training import TrialDiverged, train
    from model.wording import counted
    from tuner.gain import change_in_words

    config, checkpoint = stages[-1].config, stages[-1].checkpoint
    write_text(folder / "config.json", config.model_dump_json(indent=2) + "\n")
    total = config.training.epochs
    budget = counted(total, "epoch")
    typer.echo(f"trial {winner['trial']:04d} of {winner['study']}: {budget} on {device}")

    def report(epoch: int, metrics: dict[str, Any]) -> None:
        typer.echo(
            f"epoch {epoch}/{total}: {score_of(config.objective, metrics):.5f}, best so far "
            f"{metrics['objective']:.5f}, {metrics['epoch_seconds']:.1f} s, "
            f"{metrics['skipped_steps']} steps skipped"
        )
        line = json.dumps(metrics) + "\n"
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(line)

    if not _begun(stages):
        (folder / "metrics.jsonl").unlink(missing_ok=True)
    try:
        metrics = {}
        donor: Path | None = None
        for index, stage in enumerate(stages):
            if not any(has_checkpoint(later.checkpoint) for later in stages[index + 1 :]):
                if len(stages) > 1:
                    typer.echo(f"up to epoch {stage.until} as trial {stage.trial:04d}")
                metrics = train(
                    stage.config,
                    device=device,
                    report=report,
                    checkpoint=stage.checkpoint,
                    donor=donor,
                    until=stage.until,
                )
            donor = stage.checkpoint
    except TrialDiverged as error:
        complain(f"the training diverged: {error}")
        return NOTHING_FINISHED
    export_best(checkpoint, folder / "best")
    for stage in stages[:-1]:
        shutil.rmtree(stage.checkpoint, ignore_errors=True)
    score = float(metrics["objective"])
    searched = float(winner["objective"])
    result = {
        "objective": score,
        "searched_objective": searched,
        "epochs": total,
        "seed": config.seed,
        "device": device,
        "metrics": metrics,
    }
    # If the training had already ended before, only its score is known.
    trained = "epoch_seconds" in metrics
    if trained or not _holds(folder / "result.json", {"objective": score, "epochs": total}):
        write_text(folder / "result.json", json.dumps(result, indent=2) + "\n")
    if score == searched:
        verdict = "the same, bit for bit"
    else:
        side = "better" if score < searched else "worse"
        verdict = f"{change_in_words(config.objective, searched, score, '.2%')}, which is {side}"
        if total != winner["epochs"]:
            verdict += f" ({counted(total, 'epoch')}, not {winner['epochs']})"
    then = "when promoted" if "promoted" in winner else "in the search"
    typer.echo(f"objective {score:.5f}; {then} {searched:.5f}: {verdict}")
    typer.echo(f"network, of the best epoch: {folder / 'best'}")
    return DONE


def _holds(path: Path, values: dict[str, Any]) -> bool:
    """Return whether a JSON file contains these values."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return values.items() <= dict(content).items()
    except (OSError, ValueError, TypeError):  # absent, damaged or in another format
        return False


@contextmanager
def _alone(folder: Path, stages: list[_Stage], resume: bool) -> Iterator[None]:
    """Create and lock the output folder while the block runs.

    Raises:
        StudyError: another training uses it, its content does not match ``resume``, or it cannot be
            written.
    """
    from tuner.errors import StudyError
    from tuner.files import FileLock, Locked

    def refuse() -> None:
        begun = _begun(stages)
        if begun and not resume:
            raise StudyError(
                f"--out: {folder} already holds a training; add --resume or choose another"
            )
        if resume and not begun:
            raise StudyError(f"--resume: no checkpoint in {stages[-1].checkpoint}")

    refuse()
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Locked as error:
        raise StudyError(
            f"--out: another training{error} is at work in {folder}; wait for its end, or choose "
            "another"
        ) from None
    except OSError as error:
        raise StudyError(f"--out: cannot write to {folder}: {error.strerror}") from error
    try:
        refuse()  # another training may have started and ended since
        yield
    finally:
        lock.release()


def _begun(stages: list[_Stage]) -> bool:
    """Return whether there is a checkpoint to resume from."""
    from model.checkpoint import has_checkpoint

    return any(has_checkpoint(stage.checkpoint) for stage in stages)


def _read_winner(source: Path) -> tuple[dict[str, Any], Path]:
    from tuner.errors import StudyError

    if not source.exists():
        raise StudyError(f"--from: {source}: no such folder; expected a study's run folder")
    path = source / "best.json" if source.is_dir() else source
    try:
        winner = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(
            f"--from: {path}: no such file; has a trial of the study finished?"
        ) from None
    except (OSError, ValueError) as error:
        raise StudyError(f"--from: {path}: cannot be read: {error}") from error
    needed = ("study", "trial", "objective", "config", "seed", "epochs")
    missing = [key for key in needed if not isinstance(winner, dict) or key not in winner]
    if missing:
        raise StudyError(f"--from: {path}: has no '{missing[0]}'; a study's best.json is expected")
    return winner, path.resolve()


@dataclass(frozen=True)
class _Stage:
    """A part of a training: its trial and configuration, and the epoch after which the next starts.

    Its network starts from the weights of the previous stage.
    """

    trial: int
    config: TrialConfig
    until: int
    checkpoint: Path


def _stages(
    winner: dict[str, Any],
    ancestors: list[tuple[TrialConfig, dict[str, Any]]],
    config: TrialConfig,
    checkpoint: Path,
) -> list[_Stage]:
    """Return stages of the winner and its ancestors, scaled to the number of epochs."""
    total, last = config.training.epochs, 0
    stages = []
    for index, (theirs, ancestor) in enumerate(ancestors):
        until = round(ancestor["epochs"] * total / winner["epochs"])
        if last < until < total:
            place = checkpoint.with_name(f"{checkpoint.name}-{index}")
            stages.append(_Stage(ancestor["trial"], theirs, until, place))
            last = until
    return [*stages, _Stage(winner["trial"], config, total, checkpoint)]


def _configure(
    winner: dict[str, Any],
    config: dict[str, Any],
    epochs: int | None,
    seed: int | None,
    data: Path | None,
    overrides: list[str],
) -> TrialConfig:
    from tuner.config import load_trial

    return load_trial(
        config,
        overrides,
        training__epochs=winner.get("full_epochs") if epochs is None else epochs,
        seed=seed,
        data__shards=data,
    )


if __name__ == "__main__":
    sys.exit(execute(app))
