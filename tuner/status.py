"""`python -m tuner.status RUN_DIR`: how a study stands, from any terminal or machine."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.command import DONE, INTERRUPTED, NOTHING_FINISHED, execute
from tuner.duration import format_duration

if TYPE_CHECKING:
    from rich.console import Console

    from tuner.standing import Standing

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_FAILURES = 5  # failures that are listed; trials.csv has all


@app.command()
def status(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run folder of a study.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a look, in place of words.")
    ] = False,
    watch: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", min=0.1, help="Look again so often, until the study stops running."
        ),
    ] = None,
) -> int:
    """Show a study's state, trials, best, failures and time left; change nothing.

    It reads only the run folder and the ledger, so it works on any machine that can read them.
    Exit codes: 0 the study runs, waits or has a winner; 1 it is over and no trial finished; 2 no
    study there, or its ledger cannot be read; 130 the watch was interrupted.
    """
    from rich.console import Console

    from tuner.standing import standing

    # A file or pipe has no width, so lines are not wrapped.
    console = Console(highlight=False, soft_wrap=True)
    look = standing(run_dir)
    try:
        while True:
            if as_json:
                typer.echo(json.dumps(look.as_json(), allow_nan=False))
            else:
                if watch is not None and console.is_terminal:
                    console.clear()
                _show(look, console)
            if watch is None or look.state != "running":
                over = look.state == "finished" and look.best is None
                return NOTHING_FINISHED if over else DONE
            time.sleep(watch)
            look = standing(run_dir)
    except KeyboardInterrupt:
        return INTERRUPTED


def _show(look: Standing, console: Console) -> None:
    from tuner.forecast import about
    from tuner.liveview import StudyView
    from tuner.rows import TrialRow
    from tuner.rungs import rungs_of

    def say(text: str) -> None:
        console.print(text, markup=False)

    say(f"{look.study.name}: {_state(look)}")
    rows = [TrialRow.of(trial) for trial in look.trials]
    search = look.study.search
    rungs = rungs_of(search, look.study.training.epochs)
    for row in rows:
        at_rung = search.scheduler == "asha-pausing" and row.epoch in rungs
        if row.state == "running" and (at_rung or look.state != "running"):
            row.wait()
    drawn = bool(look.trials) and console.is_terminal
    if drawn:
        console.print(StudyView(look.study, rows, look.seconds))
    else:
        counts = look.counts()
        words = {"to_start": "to start"}
        if look.state != "running":
            words["running"] = "to go on"
        elif waiting := sum(row.waits for row in rows):
            words["running"] = f"running ({waiting} of them waiting)"
        still = ("running", "to_start")  # omitted for a study that has ended
        parts = [
            f"{count} {words.get(name, name)}"
            for name, count in counts.items()
            if count or look.state != "finished" or name not in still
        ]
        say(f"trials: {', '.join(parts)}")
        if look.best is not None:
            name = "best" if look.promoted is None else "best in the search"
            say(f"{name}: trial {look.best.number:04d}, objective {look.best.objective:.5f}")
    if look.promoted is not None:
        say(f"promoted: trial {look.promoted.trial.number:04d}: {look.promoted.words}")
    failed = [trial for trial in look.trials if trial.state == "failed"]
    for trial in failed[:_FAILURES]:
        say(f"trial {trial.number:04d} failed after epoch {trial.epoch}: {trial.reason}")
    if len(failed) > _FAILURES:
        say(f"and {len(failed) - _FAILURES} more that failed: trials.csv has them all")
    if look.report_age is not None and look.state == "running":
        say(f"last report: {format_duration(round(look.report_age))} ago")
    if look.concluding and look.ended is not None:
        after = "promotion, " if look.promoting else ""
        why = look.ended.reason
        say(f"the search has ended: {why}; {after}its winner's scores and report follow")
    elif look.seconds_left is not None and look.state != "finished" and not drawn:
        when = "" if look.state == "running" else ", once it goes on"
        say(f"time left: {about(look.seconds_left)}{when}")
    if look.next_command:
        say(f"next: {look.next_command}")


def _state(look: Standing) -> str:
    driver, reason = look.driver, look.ended.reason if look.ended else ""
    if look.state == "running":
        by = ""
        if driver is not None and driver.pid is not None:
            by = f" by process {driver.pid}" + (f" on {driver.host}" if driver.host else "")
            by += f" for {format_duration(max(1, round(look.now - driver.since)))}"
        unseen = "" if driver is None or driver.locked else ", as its ledger is being written"
        return f"running{by}{unseen}"
    if look.state == "finished":
        early = look.n_new or any(trial.state == "running" for trial in look.trials)
        return f"{'ended early' if early else 'finished'}: {reason}"
    if look.state == "interrupted":
        cut = f"; process {driver.pid} was cut off" if driver and driver.pid else ""
        left = "promoted runs" if look.promoting else "trials"
        return f"interrupted: {left} are left to run{cut}"
    return "never started"


if __name__ == "__main__":
    sys.exit(execute(app))
