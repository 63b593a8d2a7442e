"""Waits of seconds that are not silent: a spinner or a bar on a terminal, a line elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PATIENCE = 2.0  # seconds of silence that nobody minds

Advance = Callable[[str, int, int], None]


@contextmanager
def waiting(text: str, *, quiet: bool = False, console: Console | None = None) -> Iterator[None]:
    """Say what the block does while it does it; what takes no two seconds is not told to a pipe."""
    console = console or Console(highlight=False)
    if quiet:
        yield
    elif console.is_terminal and not console.is_dumb_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            progress.add_task(text, total=None)
            yield
    else:
        timer = threading.Timer(PATIENCE, lambda: _line(console, f"{text} ..."))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


@contextmanager
def counting(*, quiet: bool = False, console: Console | None = None) -> Iterator[Advance]:
    """Yield a function that is told what is done, how much of it and of how much, and draws a bar.

    In a file or pipe nothing is drawn: who uses it says what is done.
    """
    console = console or Console(highlight=False)
    if quiet or not console.is_terminal or console.is_dumb_terminal:
        yield lambda text, done, total: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)

        def advance(text: str, done: int, total: int) -> None:
            if text != progress.tasks[0].description:
                progress.reset(task, total=total, description=text)
            progress.update(task, completed=done, total=total)

        yield advance


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False)
    console.file.flush()
