"""Feedback during waits: a spinner or a progress bar on a terminal, lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

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

PATIENCE = 2.0  # seconds of silence that are acceptable
SILENCE = 10.0  # seconds after which a pipe gets a progress line

Advance = Callable[[str, int, int], None]


@contextmanager
def waiting(text: str, *, quiet: bool = False, console: Console | None = None) -> Iterator[None]:
    """Show a message while the block runs; a pipe gets it only after two seconds."""
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
    """Yield a function that takes a description, a count and a total, and draws a progress bar.

    A file or pipe gets a line if there was none for ten seconds.
    """
    console = console or Console(highlight=False)
    if quiet:
        yield lambda text, done, total: None
        return
    if not console.is_terminal or console.is_dumb_terminal:
        told = time.monotonic()

        def tell(text: str, done: int, total: int) -> None:
            nonlocal told
            if done < total and time.monotonic() - told >= SILENCE:
                told = time.monotonic()
                _line(console, f"{text}: {done} of {total}")

        yield tell
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


@contextmanager
def reminding(
    say: Callable[[], object], silent: Callable[[], float], after: float
) -> Iterator[None]:
    """Call `say` from another thread whenever there was no output for `after` seconds.

    Args:
        say: prints a line, or nothing if there is nothing to report.
        silent: returns the time since the last output [s].
        after: maximum time without output [s].
    """
    over = threading.Event()

    def remind() -> None:
        pause = after
        while not over.wait(pause):
            pause = after - silent()
            if pause <= 0.0:
                with suppress(OSError, ValueError):  # broken pipe, or closed stream
                    say()
                pause = after

    thread = threading.Thread(target=remind, name="reminder", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _line(console: Console, text: str) -> None:
    console.print(text, markup=False)
    console.file.flush()
