"""`python -m tuner.run`: search for the best localiser that this hardware can find."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tuner.command import execute

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def run(
    config: Annotated[
        Path | None,
        typer.Option(
            help="Study in YAML. Without it: the full study where there is a GPU, "
            "the quickstart where there is none."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="a.b=VALUE", help="Change one field; may be repeated."),
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Trials in the whole study.")] = None,
    time_budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Time for all trials of the study, over its sessions: seconds, 90m, 1h30m; "
            "none lifts it.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="VALUE",
            help="Objective at or below which the study ends, once a trial finishes with it; "
            "none lifts it.",
        ),
    ] = None,
    warm_start: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN_DIR",
            help="Earlier study of the same objective, whose finished trials the sampler knows.",
        ),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Database of the ledger, as postgresql://USER@HOST/NAME; the password belongs in "
            "~/.pgpass or PGPASSWORD. Default: study.db in the run folder.",
        ),
    ] = None,
    promote: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="After the search, train the best K again at full budget with several seeds, and "
            "rank them by their mean. 0: the search alone decides.",
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Largest number of epochs a trial.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder. Default: runs/<name>-<timestamp>.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with train/ and val/ shards, in place of simulation."),
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="One trial after another in this process, without Ray.")
    ] = False,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the study in this run folder.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster: host:port, auto, or local (always start Ray here). "
            "Default: RAY_ADDRESS, a head running here, else local."
        ),
    ] = None,
    gpus_per_trial: Annotated[
        float | None,
        typer.Option(help="GPUs a trial, 0 to 1. Default: 1 where there is one, else 0."),
    ] = None,
    cpus_per_trial: Annotated[int | None, typer.Option(help="CPUs, and threads, a trial.")] = None,
    concurrent: Annotated[
        int | None, typer.Option(help="Trials side by side. Default: as many as there is room for.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the study.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show configuration, space, resources, and about what time and disk it takes; "
            "start nothing.",
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Show what goes wrong and the summary at the end alone.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show every event and the log's lines too.")
    ] = False,
) -> int:
    """Tune the network that turns RIS snapshots into source positions.

    Results go to the run folder: config.yaml, trials.csv, best.json, best/, report.html and
    tuner.log. Exit codes: 0 done; 1 no trial finished; 2 bad configuration or data, said in one
    line; 130 interrupted by a signal, or by a database or a Ray head that did not come back:
    continue with --resume.
    """
    from tuner.errors import StudyError
    from tuner.waiting import waiting

    if quiet and verbose:
        raise StudyError("--quiet: excludes --verbose")
    with waiting("loading PyTorch and Optuna", quiet=quiet):
        from tuner.session import Request, run_session

    return run_session(
        Request(
            config=config,
            overrides=tuple(set_ or ()),
            options={
                "search__trials": trials,
                "search__time_budget": time_budget,
                "search__target": target,
                "search__warm_start": warm_start,
                "search__storage": storage,
                "search__promote": promote,
                "training__epochs": epochs,
                "data__shards": data,
                "resources__gpus_per_trial": gpus_per_trial,
                "resources__cpus_per_trial": cpus_per_trial,
                "resources__concurrent": concurrent,
                "seed": seed,
            },
            out=out,
            local=local,
            resume=resume,
            address=address,
            verbosity="quiet" if quiet else "verbose" if verbose else "normal",
            dry_run=dry_run,
        )
    )


if __name__ == "__main__":
    sys.exit(execute(app))
