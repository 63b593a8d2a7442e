from __future__ import annotations

import io
import threading
import time
from itertools import pairwise

import pytest
from rich.console import Console

from tuner import waiting
from tuner.waiting import counting, reminding


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_pipe_is_told_of_long_waits_and_spared_short_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(waiting, "PATIENCE", 0.2)
    stream = io.StringIO()
    console = Console(file=stream)
    with waiting.waiting("short", console=console):
        pass
    with waiting.waiting("long", console=console):
        time.sleep(0.5)
    with waiting.waiting("unheard", console=console, quiet=True):
        time.sleep(0.5)
    assert stream.getvalue() == "long ...\n"


def test_a_terminal_sees_what_is_waited_for_and_nothing_of_it_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with waiting.waiting("starting", console=Console(file=stream)):
        pass
    assert "starting" in stream.getvalue()
    assert stream.getvalue().rstrip().endswith("\x1b[2K"), "the line was not cleared"


def test_an_interrupt_goes_through() -> None:
    with pytest.raises(KeyboardInterrupt), waiting.waiting("x", console=Console(file=Terminal())):
        raise KeyboardInterrupt


def test_a_bar_counts_one_thing_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with counting(console=Console(file=stream)) as advance:
        for name in ("network", "nomp"):
            for done in (0, 64, 128):
                advance(name, done, 128)
                time.sleep(0.15)
    text = stream.getvalue()
    for words in ("network", "nomp", "64/128", "128/128"):
        assert words in text
    piped = io.StringIO()
    with counting(console=Console(file=piped)) as advance:
        advance("network", 1, 2)
    assert piped.getvalue() == ""


def test_a_pipe_hears_of_a_long_count_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now)
    piped = io.StringIO()
    with counting(console=Console(file=piped)) as advance:
        for done in range(5):
            advance("nomp", done, 5)
            now += 0.75 * waiting.SILENCE
        advance("nomp", 5, 5)  # the end is for others to tell
    assert piped.getvalue() == "nomp: 2 of 5\nnomp: 4 of 5\n"
    unheard = io.StringIO()
    with counting(console=Console(file=unheard), quiet=True) as advance:
        now += 3.0 * waiting.SILENCE
        advance("nomp", 1, 5)
    assert unheard.getvalue() == ""


def test_who_has_heard_nothing_for_long_is_reminded_again_and_again() -> None:
    begun = spoken = time.monotonic()
    said: list[float] = []
    enough = threading.Event()

    def say() -> None:
        nonlocal spoken
        spoken = time.monotonic()
        said.append(spoken - begun)
        if len(said) == 3:
            enough.set()

    with reminding(say, lambda: time.monotonic() - spoken, 0.1):
        assert enough.wait(60.0)
    n_said, times = len(said), [0.0, *said]
    assert all(after - before >= 0.1 for before, after in pairwise(times))
    time.sleep(0.3)
    assert len(said) == n_said, "reminded after the end"


def test_who_hears_something_else_is_not_reminded() -> None:
    said: list[int] = []
    asked = threading.Event()

    def silent() -> float:
        asked.set()
        return 0.0

    with reminding(lambda: said.append(1), silent, 0.05):
        assert asked.wait(60.0)
        time.sleep(0.2)
    assert not said


def test_a_reminder_that_nobody_hears_ends_nothing() -> None:
    heard: list[int] = []
    twice = threading.Event()

    def say() -> None:
        heard.append(1)
        if len(heard) == 2:
            twice.set()
        raise BrokenPipeError

    with reminding(say, lambda: 1.0, 0.05):
        assert twice.wait(60.0)
