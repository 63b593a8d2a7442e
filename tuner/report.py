"""`python -m tuner.report RUN_DIR`: one self-contained page that shows a study."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.command import execute

if TYPE_CHECKING:
    from tuner.config import StudyConfig
    from tuner.folder import RunFolder
    from tuner.pages.markup import Markup
    from tuner.pages.material import Material
    from tuner.study import Ledger

logger = logging.getLogger(__name__)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Run folder of a study, also of one that runs.")],
) -> int:
    """Write report.html: what a study was asked, what it found, and how it went.

    The study is only read; it may be running. Exit codes: 0 done; 2 no such study, or a folder
    that cannot be written.
    """
    from model.checkpoint import CheckpointError
    from model.data import DataError
    from tuner.config import load_study
    from tuner.errors import StudyError
    from tuner.folder import RunFolder
    from tuner.ledger import read_ledger
    from tuner.scenes import ensure_scenes

    folder = RunFolder.existing(run_dir, lock=False)
    ledger = read_ledger(folder, load_study(folder.config))
    try:
        try:
            ensure_scenes(folder, ledger.config)
        except (CheckpointError, DataError) as error:
            logger.warning("scenes are not drawn: %s", error)
        write_report(folder, ledger)
    except OSError as error:
        raise StudyError(f"{folder.report}: cannot be written: {error.strerror}") from error
    finally:
        ledger.close()
    typer.echo(folder.report)
    return 0


def write_report(folder: RunFolder, ledger: Ledger) -> None:
    """Write the page, which is self-contained and can be opened offline."""
    from model.files import write_text
    from tuner.pages.material import Material

    write_text(folder.report, page(Material.read(folder, ledger)))


def page(material: Material) -> str:
    """Return the page as text."""
    from model.wording import counted
    from tuner.pages.chart import attempted
    from tuner.pages.overview import tiles
    from tuner.pages.shell import Section, document

    made = f"Written {material.written:%Y-%m-%d %H:%M %Z} by python -m tuner.report."
    drawn = [
        Section(title, attempted(partial(draw, material), title))
        for title, draw in sections(material.study)
    ]
    title = f"{material.study.name}: {counted(len(material.trials), 'trial')}"
    return document(title, tiles(material), drawn, made)


def sections(study: StudyConfig) -> list[tuple[str, Callable[[Material], Markup]]]:
    """Return the title and drawing function of every section of a study's page, in order."""
    from tuner.pages.failures import failures, numerics
    from tuner.pages.history import history, learning_curves
    from tuner.pages.overview import overview, winner
    from tuner.pages.parameters import importances, parallel
    from tuner.pages.pareto import pareto
    from tuner.pages.promotion import promoted
    from tuner.pages.scenes import scenes
    from tuner.pages.scoreboard import scoreboard
    from tuner.pages.timeline import timeline
    from tuner.pages.trials import trials

    return [
        ("Overview", overview),
        ("Winner", winner),
        *([("Promoted configurations", promoted)] if study.search.promote else []),
        *([("Pareto front", pareto)] if study.search.cost else []),
        ("Scoreboard", scoreboard),
        ("Scenes", scenes),
        ("History", history),
        ("Learning curves", learning_curves),
        ("Importances", importances),
        ("Parallel coordinates", parallel),
        ("Timeline", timeline),
        ("Failures", failures),
        ("Numerics", numerics),
        ("Trials", trials),
    ]


if __name__ == "__main__":
    sys.exit(execute(app))
