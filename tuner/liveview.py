"""A terminal view of a study: a table of its trials that fits the screen, and a summary below."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tuner.config import StudyConfig
from tuner.duration import format_duration
from tuner.finding import candidates_found
from tuner.forecast import about, time_left
from tuner.records import State
from tuner.rows import TrialRow
from tuner.rungs import epochs_in_all, rungs_of
from tuner.space import n_points

_COLOURS: dict[State, str] = {
    "running": "cyan",
    "done": "green",
    "pruned": "yellow",
    "failed": "red",
}
_BARS = "▁▂▃▄▅▆▇█"
_CURVE = 10  # characters of a trial's curve
_GAP = 2  # characters between columns: one of padding, one added by the table
_AROUND = 7  # terminal lines reserved for the table's head, the foot and a prompt
_FEWEST = 3  # minimum number of rows
_NOTE = 14  # minimum characters of a note; a fifth of the width on a wide terminal
_PARAMS_SHOWN = 5
_FIRST = ("training.learning_rate", "network.width", "network.depth", "training.batch_size")


@dataclass(frozen=True)
class _Column:
    head: str
    width: int
    cell: Callable[[TrialRow], str | Text]
    right: bool = True


class StudyView:
    """Draws a study to fit the width and height of the console.

    Args:
        study: the study that runs.
        rows: its trials, in any order.
        seconds: how long its trials have run, over all sessions.
    """

    def __init__(self, study: StudyConfig, rows: Iterable[TrialRow], seconds: float) -> None:
        self._study, self._seconds = study, seconds
        self._rows = sorted(rows, key=lambda row: row.number)
        self._ranked = ranked(self._rows)
        search, epochs = study.search, study.training.epochs
        halving = search.scheduler in ("asha", "asha-pausing")
        self._rungs = rungs_of(search, epochs) if halving else []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        bars = not options.ascii_only
        height = max(_FEWEST, console.height - _AROUND)
        shown = self._chosen(height)
        table = Table(expand=False, pad_edge=False, box=SIMPLE_HEAD, padding=(0, _GAP - 1, 0, 0))
        columns = self._columns(shown, options.max_width, bars=bars)
        for column in columns:
            table.add_column(
                column.head,
                justify="right" if column.right else "left",
                no_wrap=True,
                overflow="ellipsis",
                min_width=min(column.width, _NOTE),
                max_width=column.width,
            )
        for row in shown:
            table.add_row(*(column.cell(row) for column in columns))
        hidden = len(self._rows) - len(shown)
        more = [Text(f"and {hidden} more", style="dim")] if hidden else []
        yield Group(table, *more, *self._foot(options, bars=bars))

    def _chosen(self, height: int) -> list[TrialRow]:
        """Return the rows to show: running, best, waiting, then latest ended trials."""
        running = [row for row in self._rows if row.state == "running" and not row.waits]
        waiting = [row for row in self._rows if row.state == "running" and row.waits]
        waiting.sort(key=lambda row: (-row.epoch, row.objective or 0.0))
        rest = [row for row in self._rows if row.state in ("pruned", "failed")]
        rest.sort(key=lambda row: -(row.ended or 0.0))
        # Reserve room for the best even if many trials run.
        n_best = min(len(self._ranked), max(height // 3, height - len(running)))
        first = [*running[: height - n_best], *self._ranked[:n_best]]
        return [*first, *waiting, *rest][:height]

    def _columns(self, rows: Sequence[TrialRow], width: int, *, bars: bool) -> list[_Column]:
        """Return as many columns as fit, in display order."""
        every = self._every(rows, bars=bars)
        chosen: set[str] = set()
        left = width - _GAP
        for head in sorted(every, key=lambda head: every[head][0]):
            column = every[head][1]
            needed = max(column.width, len(column.head)) + _GAP
            if column.head == "note":
                needed = min(needed, max(_NOTE, width // 5) + _GAP)
            if needed <= left:
                chosen.add(head)
                left -= needed
        return [column for head, (_, column) in every.items() if head in chosen]

    def _every(self, rows: Sequence[TrialRow], *, bars: bool) -> dict[str, tuple[int, _Column]]:
        """Return all columns by name, each with its priority for room."""
        epochs, rungs = self._study.training.epochs, self._rungs
        low, high = _range(rows)
        best = self._ranked[0].number if self._ranked else None

        def state(row: TrialRow) -> Text:
            mark = " *" if row.number == best else ""
            return Text(row.state + mark, style=_COLOURS[row.state])

        def rung(row: TrialRow) -> str:
            return f"{sum(row.epoch >= epoch for epoch in rungs)}/{len(rungs)}"

        every: dict[str, tuple[int, _Column]] = {
            "trial": (0, _Column("trial", 5, lambda row: f"{row.number:04d}")),
            "state": (0, _Column("state", 9, state, right=False)),
        }
        if rungs:
            every["rung"] = (5, _Column("rung", 4, rung))
        every["epoch"] = (1, _Column("epoch", 7, lambda row: f"{row.epoch}/{epochs}"))
        every["objective"] = (1, _Column("objective", 9, lambda row: _number(row.objective, ".5f")))
        if bars:
            every["curve"] = (
                3,
                _Column(
                    "curve",
                    _CURVE,
                    lambda row: sparkline(list(row.curve.values()), low, high),
                    right=False,
                ),
            )
        every["s/epoch"] = (5, _Column("s/epoch", 7, lambda row: _number(row.epoch_seconds, ".1f")))
        every["scenes/s"] = (
            6,
            _Column("scenes/s", 8, lambda r: _number(r.metrics.get("scenes_per_second"), ".0f")),
        )
        if any(row.metrics.get("gpu_memory_bytes") for row in rows):
            every["GPU mem"] = (
                5,
                _Column("GPU mem", 9, lambda row: _memory(row.metrics.get("gpu_memory_bytes"))),
            )
        for index, path in enumerate(_telling(self._study)):
            name = path.rpartition(".")[2]
            column = _Column(name, max(8, len(name)), _param(path))
            every[path] = (8 + index, column)
        if any(row.skipped or row.fallbacks for row in rows):
            every["skip/fallb"] = (
                2,
                _Column("skip/fallb", 10, lambda row: f"{row.skipped}/{row.fallbacks}"),
            )
        longest = max((len(row.place) for row in rows), default=0)
        if longest:
            every["where"] = (20, _Column("where", longest, lambda row: row.place, right=False))
        notes = max((len(self._note(row)) for row in rows), default=0)
        if notes:
            every["note"] = (4, _Column("note", notes, self._note, right=False))
        return every

    def _note(self, row: TrialRow) -> str:
        if row.note or row.waiting_since is None:
            return row.note
        waited = format_duration(round(time.monotonic() - row.waiting_since))
        search = " and candidates" if self._study.network.front_end else ""
        return f"first epoch{search}: {waited}"

    def line(self) -> str:
        """Return a one-line summary: trials ended, progress and time left."""
        n_ended, planned, words = self._ended()
        found = self._candidates()
        candidates = [f"candidates of {found[0]:,} of {found[1]:,} scenes"] if found else []
        return "; ".join(
            [f"{n_ended} of {planned} ended: {words}", *candidates, *self._told(bars=False)]
        )

    def _ended(self) -> tuple[int, int, str]:
        """Return the number of ended trials, the planned number, and counts by state as text."""
        counts = count_states(self._rows)
        n_ended = sum(count for state, count in counts.items() if state != "running")
        n_waiting = sum(row.state == "running" and row.waits for row in self._rows)
        told = {state: f"{count} {state}" for state, count in counts.items()}
        if n_waiting:
            told["running"] += f" ({n_waiting} of them waiting)"
        planned = self._study.search.planned_trials(self._study.training.epochs)
        return n_ended, planned, ", ".join(told.values())

    def _foot(self, options: ConsoleOptions, *, bars: bool) -> list[Table | Text]:
        n_ended, planned, words = self._ended()
        head = Table.grid(padding=(0, 1))
        name = Text(self._study.name, style="bold")
        bar = ProgressBar(total=planned, completed=n_ended, width=20)
        head.add_row(name, *([bar] if bars else []), f"{n_ended} of {planned} ended: {words}")
        found = self._candidates()
        if found:
            head.add_row(
                "candidates",
                *([ProgressBar(total=found[1], completed=found[0], width=20)] if bars else []),
                f"{found[0]:,} of {found[1]:,} scenes",
            )
        told = "; ".join(self._told(bars=bars))
        return [head, Text(told, style="bold", overflow="fold", no_wrap=False)]

    def _told(self, *, bars: bool) -> list[str]:
        """Return the best so far, the throughput, and elapsed and remaining time as text."""
        parts: list[str] = []
        if self._ranked:
            trend = _best_so_far(self._ranked)
            falling = bars and trend[-1] < trend[0]
            line = " " + sparkline(trend, trend[-1], trend[0]) if falling else ""
            best = self._ranked[0]
            parts.append(f"best {best.objective:.5f} (trial {best.number:04d}){line}")
        running = [r.metrics for r in self._rows if r.state == "running" and not r.waits]
        pace = sum(float(metrics.get("scenes_per_second", 0.0)) for metrics in running)
        if pace:
            parts.append(f"{pace:,.0f} scenes/s")
        memory = sum(float(metrics.get("gpu_memory_bytes", 0.0)) for metrics in running)
        if memory:
            parts.append(f"{_memory(memory)} of GPU memory")
        if self._seconds:
            verb = "running" if running else "ran"
            parts.append(f"{verb} for {format_duration(max(1.0, round(self._seconds)))}")
        left = self._left()
        if left:
            parts.append(f"{about(left)} left")
        return parts

    def _candidates(self) -> tuple[int, int] | None:
        """Return the progress of the candidate search until a trial finishes its first epoch."""
        since = [row.waiting_since for row in self._rows if row.waiting_since is not None]
        if not since or any(row.epoch for row in self._rows):
            return None
        return candidates_found(self._study, time.time() - (time.monotonic() - min(since)))

    def _left(self) -> float | None:
        search = self._study.search
        n_new = int(min(search.trials, n_points(search.space)) - len(self._rows))
        return time_left(
            [row.pace for row in self._rows],
            epochs=self._study.training.epochs,
            n_new=max(0, n_new),
            elapsed=self._seconds,
            budget=search.time_budget,
            in_all=epochs_in_all(search, self._study.training.epochs),
        )


def ranked(rows: Iterable[TrialRow]) -> list[TrialRow]:
    """Return finished trials, best first."""
    done = [row for row in rows if row.state == "done" and row.objective is not None]
    return sorted(done, key=lambda row: (row.objective, row.number))


def count_states(rows: Iterable[TrialRow]) -> dict[State, int]:
    """Return the number of trials by state."""
    states = [row.state for row in rows]
    return {state: states.count(state) for state in _COLOURS}


def sparkline(values: Sequence[float], low: float, high: float, width: int = _CURVE) -> str:
    """Draw values as bars of eight heights between two bounds, subsampled to `width` values."""
    if len(values) > width:
        last = len(values) - 1
        values = [values[round(index * last / (width - 1))] for index in range(width)]
    span = high - low
    shares = [(value - low) / span if span > 0 else 0.0 for value in values]
    return "".join(_BARS[min(7, max(0, int(share * 8)))] for share in shares)


def _range(rows: Sequence[TrialRow]) -> tuple[float, float]:
    """Return common bounds for the curves of all rows; the worst tenth of the values is cut off."""
    values = sorted(value for row in rows for value in row.curve.values())
    if not values:
        return 0.0, 0.0
    return values[0], values[round(0.9 * (len(values) - 1))]


def _best_so_far(done: Sequence[TrialRow]) -> list[float]:
    trend: list[float] = []
    for row in sorted(done, key=lambda row: (row.ended or 0.0, row.number)):
        assert row.objective is not None
        trend.append(min([row.objective, *trend[-1:]]))
    return trend


def _telling(study: StudyConfig) -> list[str]:
    """Return the few parameters that fit into a row."""
    space = study.search.space
    chosen = [path for path in _FIRST if path in space]
    chosen += [path for path in space if path not in chosen]
    return chosen[:_PARAMS_SHOWN]


def _param(path: str) -> Callable[[TrialRow], str]:
    return lambda row: short(row.params.get(path))


def short(value: Any) -> str:
    """Return a parameter's value as short text."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(float(value), form)


def _memory(n_bytes: float | None) -> str:
    return "-" if not n_bytes else f"{n_bytes / 2**30:.2f} GiB"
