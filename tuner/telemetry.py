"""What a user sees while a study runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tuner.config import StudyConfig
from tuner.retries import halved_note
from tuner.space import Value
from tuner.study import Assignment, State, TrialRecord
from tuner.watchers import Watcher

logger = logging.getLogger("tuner")

_COLOURS = {"running": "cyan", "done": "green", "pruned": "yellow", "failed": "red"}
_SHOWN = 18  # rows of the live table: running trials first, then the latest
_PARAMS_SHOWN = 5
_FIXED_WIDTH, _PARAM_WIDTH, _PLACE_WIDTH = 70, 14, 24  # characters


class _LogFile(logging.FileHandler):
    """A log that a full disk interrupts; what cannot be written is not worth a traceback a line."""

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


@dataclass
class _Row:
    number: int
    params: dict[str, Value]
    state: State = "running"
    epoch: int = 0
    objective: float | None = None
    skipped: int = 0
    fallbacks: int = 0
    seconds: float | None = None
    place: str = ""
    note: str = ""
    survived: str = ""  # stays in the note while the trial runs on
    since: float = field(default_factory=time.monotonic)


class Progress(Watcher):
    """Follows the trials of one session and shows them."""

    def __init__(
        self,
        study: StudyConfig,
        history: list[TrialRecord],
        stream: IO[str] | None = None,
        *,
        noun: str = "trial",
    ) -> None:
        self._study = study
        self._noun = noun
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._rows: dict[int, _Row] = {}
        self._live: Live | None = None
        self._best: tuple[int, float] | None = None
        for trial in history:
            row = _Row(trial.number, trial.params, trial.state, trial.epoch, trial.objective)
            row.note = _note(trial.state, trial.reason) or trial.note
            row.skipped = int(trial.metrics.get("skipped_steps", 0))
            row.fallbacks = int(trial.metrics.get("solver_fallbacks", 0))
            if trial.state != "running":
                self._rows[trial.number] = row
                self._note_best(row)
        self._keys = _telling(study)

    @property
    def is_live(self) -> bool:
        """Whether a table is drawn; otherwise one plain line an event."""
        return self._console.is_terminal

    def say(self, text: str, level: int = logging.INFO) -> None:
        """A line to the user and to the log."""
        logger.log(level, text)
        self._console.print(text, markup=False)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Draw the live table while the trials run (on a terminal)."""
        if not self.is_live:
            yield
            return
        with Live(
            get_renderable=self._draw, console=self._console, refresh_per_second=2, transient=False
        ) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    # Events

    def started(self, assignment: Assignment) -> None:
        """A trial begins, or goes on."""
        row = _Row(assignment.number, assignment.params, epoch=assignment.epoch)
        if assignment.accumulation is not None:
            row.note = row.survived = f"batches in {assignment.accumulation} parts"
        self._rows[assignment.number] = row
        params = ", ".join(f"{path}={_short(v)}" for path, v in assignment.params.items())
        again = f" goes on after epoch {assignment.epoch}" if assignment.epoch else " starts"
        origin = f" ({assignment.origin})" if assignment.origin else ""
        self._event(assignment.number, f"{again.strip()}{origin}: {params}")

    def reported(self, number: int, metrics: dict[str, Any]) -> None:
        """A trial finished an epoch."""
        row = self._rows[number]
        row.epoch = int(metrics["epoch"])
        row.objective = float(metrics["objective"])
        row.skipped = int(metrics.get("skipped_steps", 0))
        row.fallbacks = int(metrics.get("solver_fallbacks", 0))
        seconds = metrics.get("epoch_seconds")
        row.seconds = float(seconds) if seconds is not None else None
        row.place = " ".join(str(metrics[k]) for k in ("node", "device") if metrics.get(k))
        row.note = row.survived
        extra = f", {row.skipped} steps skipped" if row.skipped else ""
        extra += f", {row.fallbacks} solver fallbacks" if row.fallbacks else ""
        pace = f", {row.seconds:.1f} s" if row.seconds is not None else ""
        total = self._study.training.epochs
        self._event(number, f"epoch {row.epoch}/{total}: {row.objective:.5f}{pace}{extra}")

    def lost(self, number: int, reason: str) -> None:
        """A machine died under a trial, which will be run on."""
        self._rows[number].note = f"lost: {reason}"
        self._event(number, f"lost its machine ({reason}); goes on from its last checkpoint")

    def halved(self, number: int, parts: int, message: str) -> None:
        """Memory was not enough for a trial, which will be run on with its batches in parts."""
        row = self._rows[number]
        row.note = row.survived = halved_note(row.epoch + 1, parts)
        self._event(number, f"{row.note} ({message})", logging.WARNING)

    def finished(self, number: int, state: State, reason: str | None) -> None:
        """A trial ended."""
        row = self._rows[number]
        row.state, row.note = state, _note(state, reason) or row.survived
        self._note_best(row)
        text = f"{state} after epoch {row.epoch}"
        if state == "done":
            text += f": {row.objective:.5f}"
            if self._best and self._best[0] == number:
                text += " (best so far)"
        elif state == "failed":
            text += f": {reason}"
        self._event(number, text, logging.WARNING if state == "failed" else logging.INFO)

    def counts(self) -> dict[State, int]:
        """Trials by state."""
        counts: dict[State, int] = {"running": 0, "done": 0, "pruned": 0, "failed": 0}
        for row in self._rows.values():
            counts[row.state] += 1
        return counts

    # Drawing

    def _event(self, number: int, text: str, level: int = logging.INFO) -> None:
        logger.log(level, "%s %04d %s", self._noun, number, text)
        if not self.is_live:
            self._console.print(f"{self._noun} {number:04d} {text}", markup=False)
            self._console.file.flush()

    def _note_best(self, row: _Row) -> None:
        if row.state != "done" or row.objective is None:
            return
        if self._best is None or row.objective < self._best[1]:
            self._best = (row.number, row.objective)

    def _draw(self) -> Group:
        # A narrow terminal shows fewer columns, not narrower ones.
        spare = self._console.width - _FIXED_WIDTH
        keys = self._keys[: max(0, min(_PARAMS_SHOWN, spare // _PARAM_WIDTH))]
        spare -= len(keys) * _PARAM_WIDTH
        table = Table(expand=False, pad_edge=False, box=SIMPLE_HEAD)
        table.add_column(self._noun, no_wrap=True, justify="right", min_width=5)
        table.add_column("state", no_wrap=True, min_width=9)
        for name in ("epoch", "objective", "s/epoch"):
            table.add_column(name, no_wrap=True, justify="right", min_width=len(name))
        for path in keys:
            name = path.rpartition(".")[2][:_PARAM_WIDTH]
            table.add_column(name, no_wrap=True, justify="right", min_width=max(8, len(name)))
        table.add_column("skip/fallb", no_wrap=True, justify="right", min_width=10)
        with_place = spare > _PLACE_WIDTH
        if with_place:
            table.add_column("where", overflow="ellipsis", no_wrap=True, max_width=_PLACE_WIDTH)
        with_note = any(row.note for row in self._rows.values())
        if with_note:
            table.add_column("note", overflow="ellipsis", no_wrap=True)
        for row in self._chosen_rows():
            best = self._best is not None and self._best[0] == row.number
            table.add_row(
                f"{row.number:04d}",
                Text(row.state + (" *" if best else ""), style=_COLOURS[row.state]),
                f"{row.epoch}/{self._study.training.epochs}",
                "-" if row.objective is None else f"{row.objective:.5f}",
                "-" if row.seconds is None else f"{row.seconds:.1f}",
                *(_short(row.params.get(path)) for path in keys),
                f"{row.skipped}/{row.fallbacks}",
                *([row.place] if with_place else []),
                *([row.note] if with_note else []),
            )
        counts = self.counts()
        parts = [f"{count} {state}" for state, count in counts.items()]
        head = f"{self._study.name}: {', '.join(parts)} of {self._study.search.trials}"
        if self._best:
            head += f"; best {self._best[1]:.5f} ({self._noun} {self._best[0]:04d})"
        return Group(table, Text(head, style="bold"))

    def _chosen_rows(self) -> list[_Row]:
        rows = sorted(self._rows.values(), key=lambda row: row.number)
        if len(rows) <= _SHOWN:
            return rows
        running = [row for row in rows if row.state == "running"]
        rest = [row for row in rows if row.state != "running"]
        chosen = running[-_SHOWN:] + rest[-max(0, _SHOWN - len(running)) :]
        return sorted(chosen[:_SHOWN], key=lambda row: row.number)


def _telling(study: StudyConfig) -> list[str]:
    """The few parameters that a row has room for."""
    first = ("training.learning_rate", "network.width", "network.depth", "training.batch_size")
    space = study.search.space
    chosen = [path for path in first if path in space]
    chosen += [path for path in space if path not in chosen]
    return chosen[:_PARAMS_SHOWN]


def _note(state: State, reason: str | None) -> str:
    """What the table says of an end; a pruned trial's epoch tells it all."""
    return reason or "" if state == "failed" else ""


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
