from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from tuner.command import Interruption


class Interrupted:
    """Gets a signal while it is being destroyed, where Python drops what is raised."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # the handler runs between two instructions
            pass


def wait(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)


def interrupted_amid_a_destructor() -> None:
    Interrupted()
    wait(10.0)


def interrupted_twice() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    wait(10.0)


def test_an_interruption_amid_a_destructor_is_not_lost() -> None:
    started = time.monotonic()
    with Interruption().watched() as interruption:
        with pytest.raises(KeyboardInterrupt):
            interrupted_amid_a_destructor()
        assert interruption.wished
    assert time.monotonic() < started + 5.0


def test_other_errors_of_destructors_are_told_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def __del__(self) -> None:
            raise ValueError("amid the end")

    told: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: told.append(dropped.exc_type))
    with Interruption().watched():
        Failing()
        time.sleep(0.3)
    assert told == [ValueError]


def test_inside_gracefully_only_the_second_signal_interrupts() -> None:
    with Interruption().watched() as interruption, interruption.gracefully():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        assert interruption.wished
        with pytest.raises(KeyboardInterrupt):
            interrupted_twice()
