"""Progress output of a running study: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from rich.console import Console
from rich.live import Live

from tuner.config import StudyConfig
from tuner.liveview import StudyView, count_states, ranked, short
from tuner.records import Assignment, State, TrialRecord
from tuner.retries import halved_note
from tuner.rows import TrialRow, note_of
from tuner.waiting import Advance, counting, reminding, waiting
from tuner.watchers import Watcher

logger = logging.getLogger("tuner")

Verbosity = Literal["quiet", "normal", "verbose"]

_SILENCE = 30.0  # seconds without output after which a pipe gets a progress line


class _LogFile(logging.FileHandler):
    """A log file that drops records on OSError (a full disk) instead of printing tracebacks."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Append the tuner's own log to a file."""
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    roots = [logging.getLogger(name) for name in ("tuner", "model", "physics", "ray")]
    before = [(root.level, root.propagate) for root in roots]
    for root in roots:
        root.setLevel(logging.INFO)
        root.propagate = False
        root.addHandler(handler)
    try:
        yield
    finally:
        for root, (level, propagate) in zip(roots, before, strict=True):
            root.removeHandler(handler)
            root.setLevel(level)
            root.propagate = propagate
        handler.close()


class _OnConsole(logging.Handler):
    """Prints log records among the trials' lines, except those already shown to the user."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != logger.name:
            line = f"{record.levelname} {record.name}: {record.getMessage()}"
            self._console.print(line, markup=False, style="dim")


class Progress(Watcher):
    """Follows the trials of one session and shows them.

    Args:
        study: the study that runs.
        history: trials of earlier sessions.
        stream: where to print.
        clock: returns how long the study's trials have run, over all sessions [s].
        verbosity: quiet shows only warnings and errors of trials, verbose adds log records.
        noun: the word for a trial.
    """

    def __init__(
        self,
        study: StudyConfig,
        history: list[TrialRecord],
        stream: IO[str] | None = None,
        *,
        clock: Callable[[], float] = lambda: 0.0,
        verbosity: Verbosity = "normal",
        noun: str = "trial",
    ) -> None:
        self._noun = noun
        self._study, self._clock, self._verbosity = study, clock, verbosity
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._rows = {t.number: TrialRow.of(t) for t in history}
        self._introduced: set[int] = set()  # trials whose parameters have been shown
        self._spoken = time.monotonic()  # when a line on a trial was last printed
        for row in self._rows.values():
            if row.state == "running":  # not resumed yet
                row.wait()

    def beside(
        self, study: StudyConfig, history: list[TrialRecord], clock: Callable[[], float]
    ) -> Progress:
        """Return a progress display for the promoted runs on the same stream."""
        return Progress(
            study,
            history,
            self._console.file,
            clock=clock,
            verbosity=self._verbosity,
            noun="run",
        )

    @property
    def is_live(self) -> bool:
        """Whether a live table is drawn; otherwise each event prints a line."""
        console = self._console
        able = console.is_terminal and not console.is_dumb_terminal
        return able and self._verbosity != "quiet"

    def say(self, text: str, level: int = logging.INFO) -> None:
        """Print and log a line."""
        logger.log(level, text)
        self._console.print(text, markup=False)

    def last_words(self, text: str) -> None:
        """Print a line before the process exits immediately, even while a table is drawn."""
        self._console.show_cursor()
        self.say(text, logging.ERROR)
        self._console.file.flush()

    def note(self, text: str) -> None:
        """Log a line, and print it unless the verbosity is quiet."""
        if self._verbosity == "quiet":
            logger.info(text)
        else:
            self.say(text)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Draw the live table while trials run; without a terminal print progress now and then."""
        with self._log_shown():
            if not self.is_live:
                if self._verbosity == "quiet":
                    yield
                    return
                with reminding(self._remind, lambda: time.monotonic() - self._spoken, _SILENCE):
                    yield
                return
            with Live(get_renderable=self._draw, console=self._console, refresh_per_second=2):
                yield

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show a message while the block runs."""
        with waiting(text, quiet=self._verbosity == "quiet", console=self._console):
            yield

    @contextmanager
    def counting(self) -> Iterator[Advance]:
        """Show a progress bar while the block runs."""
        with counting(quiet=self._verbosity == "quiet", console=self._console) as advance:
            yield advance

    @contextmanager
    def _log_shown(self) -> Iterator[None]:
        if self._verbosity != "verbose":
            yield
            return
        handler = _OnConsole(self._console)
        sources = [logging.getLogger(name) for name in ("tuner", "model", "physics", "ray")]
        for source in sources:
            source.addHandler(handler)
        try:
            yield
        finally:
            for source in sources:
                source.removeHandler(handler)

    # Events

    def proposed(self, assignment: Assignment) -> None:
        """A trial is waiting for a machine."""
        row = self._rows.get(assignment.number) or TrialRow(assignment.number, assignment.params)
        row.wait("for a machine")
        row.is_next = True
        self._rows[assignment.number] = row
        logger.info("%s %04d waits for a machine", self._noun, assignment.number)

    def started(self, assignment: Assignment) -> None:
        """A trial starts or resumes."""
        row = self._rows.get(assignment.number) or TrialRow(assignment.number, assignment.params)
        row.epoch, row.waiting_since = assignment.epoch, time.monotonic()
        row.waits, row.is_next, row.note = False, False, row.survived
        if assignment.accumulation is not None:
            row.note = row.survived = f"batches in {assignment.accumulation} parts"
        elif assignment.origin is not None:
            row.note = row.survived = assignment.origin
        self._rows[assignment.number] = row
        params = ", ".join(f"{path}={short(v)}" for path, v in assignment.params.items())
        again = f"goes on after epoch {assignment.epoch}" if assignment.checkpoint else "starts"
        origin = f" ({assignment.origin})" if assignment.origin else ""
        known = assignment.number in self._introduced
        self._introduced.add(assignment.number)
        self._event(assignment.number, again + origin + ("" if known else f": {params}"))

    def reported(self, number: int, metrics: dict[str, Any]) -> None:
        """A trial finished an epoch."""
        row = self._rows[number]
        row.take(metrics)
        extra = f", {row.skipped} steps skipped" if row.skipped else ""
        extra += f", {row.fallbacks} solver fallbacks" if row.fallbacks else ""
        pace = f", {row.epoch_seconds:.1f} s" if row.epoch_seconds is not None else ""
        total = self._study.training.epochs
        shown = f"lowest so far {row.objective:.5f}"
        self._event(number, f"epoch {row.epoch}/{total}: {shown}{pace}{extra}")

    def handed_back(self, number: int) -> None:
        """A trial was returned to the ledger and waits to be resumed."""
        row = self._rows[number]
        row.wait()
        self._event(number, f"waits after epoch {row.epoch}")

    def lost(self, number: int, reason: str) -> None:
        """A trial lost its machine and will be resumed."""
        self._rows[number].note = f"lost: {reason}"
        text = f"lost its machine ({reason}); goes on from its last checkpoint"
        self._event(number, text, logging.WARNING)

    def halved(self, number: int, parts: int, message: str) -> None:
        """A trial ran out of memory and will be resumed with its batches split into parts."""
        row = self._rows[number]
        row.note = row.survived = halved_note(row.epoch + 1, parts)
        self._event(number, f"{row.note} ({message})", logging.WARNING)

    def finished(self, number: int, state: State, reason: str | None) -> None:
        """A trial ended."""
        row = self._rows[number]
        row.end(state, reason)
        text = f"{state} after epoch {row.epoch}"
        if state == "done":
            text += f": {row.objective:.5f}"
            best = next(iter(ranked(self._rows.values())), None)
            if best is row:
                text += " (best so far)"
        elif said := note_of(state, reason):
            text += f": {said}"
        self._event(number, text, logging.WARNING if state == "failed" else logging.INFO)

    def counts(self) -> dict[State, int]:
        """Trials by state."""
        return count_states(self._rows.values())

    def _event(self, number: int, text: str, level: int = logging.INFO) -> None:
        logger.log(level, "%s %04d %s", self._noun, number, text)
        wanted = {
            "quiet": level >= logging.WARNING,
            "normal": not self.is_live,
            "verbose": True,
        }
        if wanted[self._verbosity]:
            self._print(f"{self._noun} {number:04d} {text}")

    def _print(self, text: str) -> None:
        self._spoken = time.monotonic()
        self._console.print(text, markup=False)
        self._console.file.flush()

    def _remind(self) -> None:
        """Print a progress line; called from a separate thread."""
        rows = list(self._rows.values())
        if any(row.state == "running" and (row.is_next or not row.waits) for row in rows):
            line, self._spoken = self._draw().line(), time.monotonic()
            # Do not use the console: on a broken pipe it stops printing for good and ends the
            # calling thread, but the main thread has to detect the broken pipe.
            self._console.file.write(f"{line}\n")
            self._console.file.flush()

    def _draw(self) -> StudyView:
        # Called from the drawing or reminding thread, while events arrive in another one.
        rows = [row.still() for row in list(self._rows.values())]
        return StudyView(self._study, rows, self._clock())
