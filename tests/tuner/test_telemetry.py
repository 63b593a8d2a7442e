from __future__ import annotations

import io
import logging
import os
import re
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.tuner.support import tiny_study
from tuner import telemetry
from tuner.records import Assignment
from tuner.rows import TrialRow
from tuner.telemetry import Progress, logging_to


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def play(progress: Progress) -> None:
    params: dict[str, bool | int | float | str | None] = {"training.learning_rate": 1e-3}
    for number in range(3):
        progress.started(Assignment(number, params, seed=number))
    progress.reported(0, {"epoch": 1, "objective": 2.5, "skipped_steps": 3, "epoch_seconds": 1.2})
    progress.reported(0, {"epoch": 2, "objective": 2.0, "solver_fallbacks": 4, "node": "there"})
    progress.finished(0, "done", None)
    progress.finished(1, "failed", "diverged: NaN")
    progress.lost(2, "failure 1")


def test_a_pipe_gets_one_plain_line_an_event(tmp_path: Path) -> None:
    stream = io.StringIO()
    progress = Progress(tiny_study(tmp_path), [], stream)
    with progress.shown():
        play(progress)
    text = stream.getvalue()
    assert not progress.is_live
    assert "\x1b" not in text
    assert "trial 0000 epoch 1/2: lowest so far 2.50000, 1.2 s, 3 steps skipped\n" in text
    assert "trial 0000 epoch 2/2: lowest so far 2.00000, 4 solver fallbacks\n" in text
    assert "trial 0000 done after epoch 2: 2.00000 (best so far)\n" in text
    assert "trial 0001 failed after epoch 0: diverged: NaN\n" in text
    assert "trial 0002 lost its machine" in text
    assert len(text.splitlines()) == 8


def test_a_pipe_is_told_who_waits_and_a_trials_parameters_once(tmp_path: Path) -> None:
    stream = io.StringIO()
    progress = Progress(tiny_study(tmp_path), [], stream)
    begin = Assignment(0, {"training.learning_rate": 1e-3}, seed=0)
    progress.started(begin)
    progress.reported(0, {"epoch": 1, "objective": 2.5})
    progress.handed_back(0)
    progress.started(replace(begin, epoch=1, checkpoint="there"))
    assert stream.getvalue().splitlines() == [
        "trial 0000 starts: training.learning_rate=0.001",
        "trial 0000 epoch 1/2: lowest so far 2.50000",
        "trial 0000 waits after epoch 1",
        "trial 0000 goes on after epoch 1",
    ]
    again = io.StringIO()
    Progress(tiny_study(tmp_path), [], again).started(replace(begin, epoch=1, checkpoint="there"))
    assert "goes on after epoch 1: training.learning_rate=0.001" in again.getvalue()


def test_a_pipe_is_reminded_of_trials_that_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "_SILENCE", 0.1)
    study = tiny_study(tmp_path)
    stream, unheard = io.StringIO(), io.StringIO()
    progress = Progress(study, [], stream, clock=lambda: 75.0)
    quiet = Progress(study, [], unheard, verbosity="quiet")
    begin = Assignment(0, {"training.learning_rate": 1e-3}, seed=0)
    ended = f"0 of {study.search.trials} ended: 1 running, 0 done, 0 pruned, 0 failed"
    with progress.shown(), quiet.shown():
        for each in (progress, quiet):
            each.started(begin)
        end = time.monotonic() + 60.0
        while ended not in stream.getvalue() and time.monotonic() < end:
            time.sleep(0.05)
    first, reminder, *_ = stream.getvalue().splitlines()
    assert "trial 0000 starts" in first
    assert reminder.startswith(f"{ended}; running for 1m15s")
    assert unheard.getvalue() == ""


def test_who_waits_and_who_has_ended_are_no_news(tmp_path: Path) -> None:
    stream = io.StringIO()
    progress = Progress(tiny_study(tmp_path), [], stream)
    progress._remind()
    assert stream.getvalue() == "", "nobody is at work"
    for number in (0, 1):
        progress.started(Assignment(number, {}, seed=number))
    progress.handed_back(0)
    progress.finished(1, "failed", "diverged")
    said = stream.getvalue()
    progress._remind()
    assert stream.getvalue() == said


def test_a_trial_for_which_there_is_no_machine_yet_has_not_begun(tmp_path: Path) -> None:
    stream = io.StringIO()
    progress = Progress(tiny_study(tmp_path), [], stream)
    turn = Assignment(0, {}, seed=0)
    progress.proposed(turn)
    assert stream.getvalue() == ""
    assert "waits for a machine" in drawn(progress)
    progress._remind()
    assert stream.getvalue().startswith("0 of 3 ended: 1 running (1 of them waiting), ")
    progress.started(turn)
    assert stream.getvalue().splitlines()[1].startswith("trial 0000 starts")
    assert "waits" not in drawn(progress)


def test_a_reminder_into_a_closed_pipe_leaves_the_console_to_who_works(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w")
    try:
        progress = Progress(tiny_study(tmp_path), [], stream)
        progress._rows[0] = TrialRow(0, {})
        with pytest.raises(BrokenPipeError):
            progress._remind()
        assert not progress._console.quiet, "all later lines would be lost without a word"
    finally:
        with suppress(BrokenPipeError):
            stream.close()


@pytest.mark.parametrize("columns", [80, 160])
def test_a_terminal_gets_a_table_with_states_counts_and_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    progress = Progress(tiny_study(tmp_path), [], stream)
    with progress.shown():
        play(progress)
    text = stream.getvalue()
    assert progress.counts() == {"running": 1, "done": 1, "pruned": 0, "failed": 1}
    assert "2 of 3 ended: 1 running, 1 done, 0 pruned, 1 failed" in text
    assert "best 2.00000 (trial 0000)" in text
    for words in ("0000", "done *", "2.00000", "0/4", "objective"):
        assert words in text
    assert ("learning_rate" in text) == (columns > 100)


def test_the_log_holds_every_event(tmp_path: Path) -> None:
    stream = io.StringIO()
    with logging_to(tmp_path / "tuner.log"):
        play(Progress(tiny_study(tmp_path), [], stream))
        logging.getLogger("model.training").warning("step skipped")
    text = (tmp_path / "tuner.log").read_text()
    assert "WARNING tuner: trial 0001 failed after epoch 0: diverged: NaN" in text
    assert "step skipped" in text


def test_quiet_shows_what_goes_wrong_and_what_is_said_at_the_end(tmp_path: Path) -> None:
    stream = io.StringIO()
    progress = Progress(tiny_study(tmp_path), [], stream, verbosity="quiet")
    progress.note("run folder: here")
    with logging_to(tmp_path / "tuner.log"), progress.shown():
        play(progress)
    progress.say("best: trial 0000")
    lines = stream.getvalue().splitlines()
    assert lines == [
        "trial 0001 failed after epoch 0: diverged: NaN",
        "trial 0002 lost its machine (failure 1); goes on from its last checkpoint",
        "best: trial 0000",
    ]
    assert "epoch 1/2" in (tmp_path / "tuner.log").read_text()


def test_verbose_shows_events_and_log_lines_once_each(tmp_path: Path) -> None:
    stream = Terminal()
    progress = Progress(tiny_study(tmp_path), [], stream, verbosity="verbose")
    with logging_to(tmp_path / "tuner.log"), progress.shown():
        play(progress)
        logging.getLogger("model.training").warning("step [7] skipped")
    text = stream.getvalue()
    assert text.count("trial 0000 epoch 1/2: lowest so far 2.50000") == 1
    assert text.count("WARNING model.training: step [7] skipped") == 1
    logging.getLogger("model.training").warning("nobody hears this")
    assert "nobody hears" not in stream.getvalue()


def test_a_dumb_terminal_gets_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    progress = Progress(tiny_study(tmp_path), [], stream)
    with progress.shown():
        play(progress)
    assert not progress.is_live
    assert "\x1b" not in stream.getvalue()
    assert len(stream.getvalue().splitlines()) == 8


def test_no_color_is_heeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    progress = Progress(tiny_study(tmp_path), [], stream)
    with progress.shown():
        play(progress)
    colours = re.findall(r"\x1b\[(?:\d+;)*(?:3|9)\d(?:;\d+)*m", stream.getvalue())
    assert not colours


def test_a_trial_that_makes_room_is_said_to_wait_and_keeps_its_curve(tmp_path: Path) -> None:
    stream = Terminal()
    progress = Progress(tiny_study(tmp_path), [], stream)
    turn = Assignment(4, {}, seed=1, epoch=1, origin="from trial 0002 after epoch 1", until=2)
    progress.started(turn)
    progress.reported(4, {"epoch": 2, "objective": 2.0, "scenes_per_second": 50.0})
    progress.handed_back(4)
    (row,) = progress._rows.values()
    assert row.note == "waits; from trial 0002 after epoch 1"
    assert row.waits
    assert "50 scenes/s" not in drawn(progress), "nobody trains"
    progress.started(replace(turn, epoch=2, checkpoint="somewhere", until=3))
    (row,) = progress._rows.values()
    assert row.note == "from trial 0002 after epoch 1"
    assert not row.waits
    assert row.curve == {2: 2.0}
    assert "50 scenes/s" in drawn(progress)


def drawn(progress: Progress) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(progress._draw())
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_what_is_drawn_is_the_study_at_one_moment(tmp_path: Path) -> None:
    """Trials report in one thread while another one draws: over a dict that grows it would end."""
    progress = Progress(tiny_study(tmp_path), [], io.StringIO())
    progress.started(Assignment(0, {}, seed=0))
    view = progress._draw()
    progress.reported(0, {"epoch": 1, "objective": 2.5})
    terminal = Terminal()
    Console(file=terminal, width=160).print(view)
    assert "first epoch" in terminal.getvalue()
    assert "2.50000" not in terminal.getvalue()
