from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import typer

from tests.tuner.support import ROOT
from tuner.command import Interruption, execute


class Interrupted:
    """Gets a signal while it is being destroyed, where Python drops what is raised."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # the handler runs between two instructions
            pass


def interrupted_amid_a_destructor() -> None:
    Interrupted()
    time.sleep(10.0)  # one system call, which only a real signal ends


def interrupted_twice() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10.0)


def test_an_interruption_amid_a_destructor_is_not_lost() -> None:
    started = time.monotonic()
    with Interruption().watched() as interruption:
        with pytest.raises(KeyboardInterrupt):
            interrupted_amid_a_destructor()
        assert interruption.wished
    assert time.monotonic() < started + 5.0


def test_who_has_seen_the_wish_is_not_interrupted_again() -> None:
    with Interruption().watched() as interruption:
        Interrupted()
        assert interruption.wished
        interruption.settle()
        time.sleep(0.3)
    with Interruption().watched():
        Interrupted()
    time.sleep(0.3)  # nor is what comes after the block


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


def test_a_command_that_is_interrupted_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @app.command()
    def work(how: str) -> int:
        if how == "well":
            return 7
        raise KeyboardInterrupt

    assert execute(app, ["well"]) == 7
    assert capsys.readouterr().err == ""
    assert execute(app, ["badly"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "1000 None"),
        ({"GOMP_SPINCOUNT": "7"}, "7 None"),
        ({"OMP_WAIT_POLICY": "active"}, "None active"),
    ],
)
def test_threads_that_wait_spin_for_a_moment_unless_the_user_says_otherwise(
    given: dict[str, str], found: str
) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    said = (
        "import sys, tuner.run, os; assert 'torch' not in sys.modules; "
        f"print(*(os.environ.get(name) for name in {names!r}))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", said], cwd=ROOT, env=clean | given, capture_output=True, text=True
    )
    assert shown.stdout.strip() == found, shown.stderr


@pytest.mark.parametrize("command", ["run", "train", "status", "report", "evaluate"])
def test_a_python_without_the_packages_is_told_in_one_line(command: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-S", "-m", f"tuner.{command}", "--help"],  # -S: no site-packages
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert finished.stderr.startswith(f"error: {sys.executable} lacks typer, ")
    assert "make setup" in finished.stderr
    assert finished.stderr.count("\n") == 1


def test_a_program_of_ones_own_may_lack_what_it_does_not_use() -> None:
    alone = [sys.executable, "-S", "-c", "import tuner"]
    subprocess.run(alone, cwd=ROOT, timeout=60, check=True)


def test_h_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)

    @app.command()
    def work(number: int) -> None:
        """Do nothing."""

    for option in ("-h", "--help"):
        assert execute(app, [option]) == 0
        assert "Do nothing." in capsys.readouterr().out
