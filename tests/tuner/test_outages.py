"""A database that is cut off, locked or killed while a study runs, and a driver that is."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.tuner.postgres import LostAnswers, Server
from tests.tuner.support import (
    ROOT,
    FakeRun,
    driver,
    environment,
    kill,
    outcome,
    processes_with,
    ran,
    read_until,
    run,
    run_here,
    start,
    wait_for,
    write_study,
)
from tuner import storage as storage_module
from tuner.errors import LedgerLost

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("password")]


# Outages


@pytest.fixture
def proxy(server: Server) -> Iterator[LostAnswers]:
    cutting = LostAnswers(server)
    yield cutting
    cutting.close()


def test_what_was_written_before_the_line_was_cut_is_not_written_again(
    tmp_path: Path, server: Server, proxy: LostAnswers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "_FIRST_PAUSE", 0.01)
    # The first two proposals begin trials that waited, the third makes one.
    changes = {"trials": 9, "enqueue": [{"blend.beta": 0.25}]}
    url = server.fresh()
    through = server.url(url.rpartition("/")[2], proxy.port)
    found = []
    for name, place in (("whole", None), ("cut", through)):
        ledger = driver(tmp_path / name, place, search=changes)
        proxy.cutting = place is not None
        for _ in range(3):
            trial = ledger.ask()
            assert trial is not None
            ran(ledger, trial, epochs=1)
        found.append([(t.number, t.state, t.seed, t.params, t.curve) for t in ledger.trials()])
        states = [trial.state.name for trial in ledger.optuna_study.trials]
        assert states == ["COMPLETE"] * 3  # and none besides
        ledger.close()
    assert found[0] == found[1]
    assert proxy.cuts > 15


def test_connections_that_were_ended_are_made_anew(tmp_path: Path, server: Server) -> None:
    ledger = driver(tmp_path / "run", server.fresh())
    said: list[str] = []
    ledger.announce(lambda text, level: said.append(text))
    for _ in range(2):
        server.hang_up()
        trial = ledger.ask()
        assert trial is not None
        server.hang_up()
        ran(ledger, trial)
    assert [trial.state for trial in ledger.trials()] == ["done", "done"]
    assert said == []  # that is over before anybody needs to know
    ledger.close()


class KillsTheServer(FakeRun):
    """In the second epoch of the second trial the server is killed."""

    server: Server
    back_after: float | None = None
    steps = 0

    def step(self) -> dict[str, Any]:
        KillsTheServer.steps += 1
        if KillsTheServer.steps == 4:
            self.server.kill()
            if self.back_after is not None:
                threading.Timer(self.back_after, self.server.start).start()
        return super().step()


@pytest.fixture
def killing(server: Server, quick: None, monkeypatch: pytest.MonkeyPatch) -> type[KillsTheServer]:
    monkeypatch.setattr("tuner.local.TrialRun", KillsTheServer)
    monkeypatch.setattr(KillsTheServer, "server", server, raising=False)
    monkeypatch.setattr(KillsTheServer, "steps", 0)
    monkeypatch.setattr(storage_module, "_SILENCE", 0.2)
    return KillsTheServer


def test_a_server_that_is_killed_and_comes_back_costs_nothing(
    tmp_path: Path,
    server: Server,
    killing: type[KillsTheServer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_study(tmp_path, search={"trials": 5, "scheduler": "none"})
    monkeypatch.setattr("tuner.local.TrialRun", FakeRun)
    assert run_here("--config", config, "--local", "--out", tmp_path / "whole") == 0
    monkeypatch.setattr("tuner.local.TrialRun", killing)
    monkeypatch.setattr(killing, "back_after", 1.0)
    url, out = server.fresh(), tmp_path / "run"
    assert run_here("--config", config, "--local", "--out", out, "--storage", url) == 0
    said = capsys.readouterr().out
    assert "is out (" in said
    assert "trying again for 5m" in said
    assert "the ledger answers again, after " in said
    assert outcome(out) == outcome(tmp_path / "whole")


def test_a_server_that_stays_away_ends_the_run_which_then_goes_on(
    tmp_path: Path,
    server: Server,
    killing: type[KillsTheServer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write_study(tmp_path, search={"trials": 5, "scheduler": "none"})
    url, out = server.fresh(), tmp_path / "run"
    monkeypatch.setattr(storage_module, "PATIENCE", 0.5)
    begun = time.monotonic()
    try:
        assert run_here("--config", config, "--local", "--out", out, "--storage", url) == 130
    finally:
        server.start()
    assert time.monotonic() - begun < 30
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "was out for 0.5" in told
    assert f"go on with: python -m tuner.run --resume {out}" in told
    monkeypatch.setattr("tuner.local.TrialRun", FakeRun)
    assert run_here("--resume", out, "--local") == 0
    assert run_here("--config", config, "--local", "--out", tmp_path / "whole") == 0
    assert outcome(out) == outcome(tmp_path / "whole")


def test_a_locked_sqlite_file_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(storage_module._SQLITE, "timeout", 0.05)
    monkeypatch.setattr(storage_module, "_SILENCE", 0.2)
    ledger = driver(tmp_path, None)
    said: list[str] = []
    ledger.announce(lambda text, level: said.append(text))
    locker = sqlite3.connect(tmp_path / "study.db", isolation_level=None, check_same_thread=False)
    locker.execute("BEGIN EXCLUSIVE")
    threading.Timer(0.6, lambda: locker.execute("COMMIT")).start()
    trial = ledger.ask()
    assert trial is not None
    assert "database is locked" in said[0]
    assert "answers again" in said[1]
    locker.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr(storage_module, "PATIENCE", 0.3)
    with pytest.raises(LedgerLost, match=r"was out for 0.\d+s: database is locked"):
        ledger.report(trial.number, {"epoch": 1, "objective": 1.0})
    begun = time.monotonic()
    with pytest.raises(LedgerLost):  # who has lost patience does not wait again
        ledger.finish(trial.number, "failed", reason="lost")
    assert time.monotonic() - begun < 0.2
    locker.close()
    ledger.close()


def test_ctrl_c_ends_the_waiting_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(storage_module._SQLITE, "timeout", 0.05)
    ledger = driver(tmp_path, None)
    locker = sqlite3.connect(tmp_path / "study.db", isolation_level=None)
    locker.execute("BEGIN EXCLUSIVE")
    # What a shell starts in the background ignores Ctrl-C, and its children with it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            ledger.ask()
    finally:
        signal.signal(signal.SIGINT, before)
    begun = time.monotonic()
    with pytest.raises(LedgerLost, match="database is locked"):
        ledger.ask()
    assert time.monotonic() - begun < 2
    locker.close()


def test_an_error_that_will_not_pass_is_not_waited_for(tmp_path: Path) -> None:
    ledger = driver(tmp_path, None)
    trial = ledger.ask()
    assert trial is not None
    with sqlite3.connect(tmp_path / "study.db") as connection:
        connection.execute("DROP TABLE trial_user_attributes")
    begun = time.monotonic()
    with pytest.raises(optuna.exceptions.StorageInternalError):
        ledger.report(trial.number, {"epoch": 1, "objective": 1.0})
    assert time.monotonic() - begun < 5


# Whole studies, killed for real

# At random: what is drawn depends on the number alone, whoever ends first.
CHANGES: dict[str, Any] = {
    "training": {"epochs": 8},
    "search": {"trials": 3, "scheduler": "none", "sampler": "random"},
}
ON_RAY = ["--address", "local", "--concurrent", "2"]
WHILE = 240.0  # seconds that a busy machine may take for what takes it ten otherwise


@pytest.fixture
def begun() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are ended with the test, however it ends."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The study without a fault, in SQLite."""
    home = tmp_path_factory.mktemp("whole")
    finished = run(
        "--config", write_study(home, **CHANGES), "--local", "--out", home / "run", timeout=WHILE
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return home / "run"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_driver_goes_on_in_postgresql_as_if_nothing_had_happened(
    tmp_path: Path, server: Server, whole: Path, begun: list[subprocess.Popen[str]]
) -> None:
    config, cut = write_study(tmp_path, **CHANGES), tmp_path / "cut"
    process = start("--config", config, "--local", "--out", cut, "--storage", server.fresh())
    begun.append(process)
    read_until(process, "trial 0001 epoch 3/8", WHILE)
    kill(process)
    resumed = run("--resume", cut, "--local", timeout=WHILE)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "trial 0001 goes on after epoch" in resumed.stdout
    assert outcome(cut) == outcome(whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("place", [["--local"], ON_RAY], ids=["local", "Ray"])
def test_a_server_killed_while_trials_train_loses_nothing(
    tmp_path: Path,
    server: Server,
    whole: Path,
    begun: list[subprocess.Popen[str]],
    place: list[str],
) -> None:
    config, out = write_study(tmp_path, **CHANGES), tmp_path / "run"
    process = start("--config", config, *place, "--out", out, "--storage", server.fresh())
    begun.append(process)
    lines = read_until(process, "epoch 3/8", WHILE)
    server.kill()
    lines += read_until(process, "is out (", WHILE)
    server.start()
    lines += read_until(process, "the ledger answers again", WHILE)
    output, _ = process.communicate(timeout=WHILE)
    assert process.returncode == 0, "".join(lines) + output
    assert outcome(out) == outcome(whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_that_stays_away_ends_a_study_on_ray_which_then_goes_on(
    tmp_path: Path, server: Server, whole: Path, begun: list[subprocess.Popen[str]]
) -> None:
    config, out = write_study(tmp_path, **CHANGES), tmp_path / "run"
    mark = f"ristune-{os.getpid()}-{time.monotonic_ns()}"
    impatient = (
        "import sys, tuner.storage; tuner.storage.PATIENCE = 2.0; "
        "from tuner.command import execute; from tuner.run import app; "
        "sys.exit(execute(app, sys.argv[1:]))"
    )
    given = ["--config", config, *ON_RAY, "--out", out, "--storage", server.fresh()]
    process = subprocess.Popen(
        [sys.executable, "-c", impatient, *map(str, given)],
        cwd=ROOT, env=environment(RISTUNE_MARK=mark), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    begun.append(process)
    read_until(process, "epoch 3/8", WHILE)
    server.kill()
    try:
        output, _ = process.communicate(timeout=WHILE)
    finally:
        server.start()
    assert process.returncode == 130, output
    assert f"go on with: python -m tuner.run --resume {out}" in output
    wait_for(lambda: not processes_with(mark, ""))
    resumed = run("--resume", out, "--address", "local", timeout=WHILE)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert outcome(out) == outcome(whole)
