"""The ledger in a real PostgreSQL, which is killed, cut off and emptied; and in SQLite."""

from __future__ import annotations

import os
import re
import signal
import socket
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

from tests.tuner import postgres
from tests.tuner.postgres import LostAnswers, Server
from tests.tuner.support import (
    ROOT,
    FakeRun,
    environment,
    kill,
    processes_with,
    read_until,
    run,
    run_here,
    start,
    tiny_study,
    wait_for,
    write_study,
)
from tuner import report as report_page
from tuner import storage as storage_module
from tuner.command import execute
from tuner.config import load_study
from tuner.errors import LedgerLost
from tuner.folder import RunFolder
from tuner.ledger import open_ledger, read_ledger
from tuner.records import Assignment, TrialRecord
from tuner.storage import open_storage, parse_url, sqlite_url
from tuner.study import Ledger
from tuner.warmstart import read_prior

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with postgres.server() as running:
        yield running


@pytest.fixture(autouse=True)
def _password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", postgres.PASSWORD)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials in no time, in this process."""
    monkeypatch.setattr("tuner.local.TrialRun", FakeRun)
    monkeypatch.setattr("tuner.conclusion._score_winner", lambda folder, progress: None)
    monkeypatch.setattr("tuner.conclusion.write_report", lambda folder, ledger: None)


def trials_of(folder: Path) -> list[TrialRecord]:
    run_folder = RunFolder.existing(folder, lock=False)
    ledger = read_ledger(run_folder, load_study(run_folder.config))
    try:
        return ledger.trials()
    finally:
        ledger.close()


def outcome(folder: Path) -> list[Any]:
    return [(t.number, t.state, t.seed, t.params, t.curve) for t in trials_of(folder)]


def driver(folder: Path, url: str | None, **changes: Any) -> Ledger:
    """A driver's ledger of the tiny study, in a run folder of its own."""
    study = tiny_study(folder, **changes)
    if url is not None:
        study = study.replaced({"search.storage": url})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(study.to_yaml())
    return open_ledger(RunFolder(folder), study)


def ran(ledger: Ledger, trial: Assignment, epochs: int = 2) -> None:
    """Report a trial's epochs and end it."""
    objective = 1.0
    for epoch in range(1, epochs + 1):
        objective = trial.params["blend.beta"] + 1 / epoch  # type: ignore[operator]
        ledger.report(trial.number, {"epoch": epoch, "objective": objective})
        ledger.checkpointed(trial.number, "/nowhere", epoch)
    ledger.finish(trial.number, "done", objective=objective)


# The same study, wherever its ledger lies


@pytest.mark.slow
def test_a_study_in_postgresql_is_the_one_in_sqlite_bit_for_bit(
    tmp_path: Path, server: Server, quick: None
) -> None:
    config = write_study(tmp_path, search={"trials": 8})
    url = server.fresh()
    for name, more in (("lite", []), ("other", ["--storage", url]), ("pg", ["--storage", url])):
        seed = 4 if name == "other" else 3  # another study comes first into the same database
        out = tmp_path / name
        assert run_here("--config", config, "--local", "--out", out, "--seed", seed, *more) == 0
    assert outcome(tmp_path / "pg") == outcome(tmp_path / "lite")
    assert outcome(tmp_path / "other") != outcome(tmp_path / "lite")
    assert not (tmp_path / "pg" / "study.db").exists()


def test_studies_of_one_name_share_a_database_and_never_mix(tmp_path: Path, server: Server) -> None:
    url = server.fresh()
    folders = [tmp_path / side / "run" for side in ("left", "right")]
    ledgers = [driver(folder, url) for folder in folders]
    for turn in range(2):
        for ledger in ledgers[: 2 - turn]:
            trial = ledger.ask()
            assert trial is not None
            assert trial.number == turn  # numbers are each study's own
            ran(ledger, trial)
    for ledger in ledgers:
        ledger.close()
    assert [len(trials_of(folder)) for folder in folders] == [2, 1]
    names = optuna.get_all_study_names(parse_url(url).render_as_string())
    assert len(set(names)) == 2
    assert all(name.startswith("run-") for name in names)


def test_who_reads_a_run_folder_finds_its_ledger(
    tmp_path: Path, server: Server, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    url, out = server.fresh(), tmp_path / "run"
    config = write_study(tmp_path, search={"trials": 4})
    assert run_here("--config", config, "--local", "--out", out, "--storage", url) == 0
    assert "ledger: postgresql+psycopg://ristune@127.0.0.1" in capsys.readouterr().out
    assert execute(report_page.app, [str(out)]) == 0
    assert "<td>0003<td" in (out / "report.html").read_text()
    n_done = sum(trial.state == "done" for trial in trials_of(out))
    assert len(read_prior(out, load_study(out / "config.yaml")).trials) == n_done > 0
    assert run_here("--resume", out, "--local", "--trials", 6) == 0
    assert len(trials_of(out)) == 6


@pytest.mark.slow
def test_the_ledger_holds_all_of_a_trial(tmp_path: Path, server: Server) -> None:
    url, out = server.fresh(), tmp_path / "run"
    config = write_study(tmp_path, search={"trials": 1})
    assert run_here("--config", config, "--local", "--out", out, "--storage", url) == 0
    name = (out / "study.name").read_text().strip()
    found = optuna.load_study(study_name=name, storage=parse_url(url).render_as_string())
    assert found.user_attrs["config"] == load_study(out / "config.yaml").model_dump(mode="json")
    assert found.user_attrs["folder"].endswith(f":{out}")
    (trial,) = found.trials
    assert trial.params.keys() == load_study(config).search.space.keys()
    assert trial.user_attrs["seed"] >= 0
    for epoch in (1, 2):
        metrics = trial.user_attrs[f"epoch/{epoch:05d}"]
        assert metrics["epoch_seconds"] > 0
        assert metrics["gpu_seconds"] == 0.0  # on the CPU
        assert {"node", "device", "solver_fallbacks", "skipped_steps", "loss"} <= metrics.keys()


# One driver a study


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
    assert proxy.cuts > 25


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


# What is refused


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command ends that was given something bad."""
    begun = time.monotonic()
    assert run_here(*arguments, "--local") == 2
    assert time.monotonic() - begun < 20
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    return told.err + told.out


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://me:hunter2@db/x", "holds a password.*~/.pgpass or PGPASSWORD"),
        ("postgresql://me:hunter2/#@db/x", "holds a password"),
        ("postgresql://db/x?password=hunter2", "holds a password"),
        ("postgresql://db/x?sslpassword=hunter2", "holds a password"),
        ("oracle://db/x", "cannot lie in oracle; expected postgresql://"),
        ("study.db", "is no URL of a database; expected postgresql://"),
        ("sqlite://", "in memory is no record"),
        ("sqlite:///:memory:", "in memory is no record"),
    ],
)
def test_a_bad_url_is_refused_and_never_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str, said: str
) -> None:
    config = write_study(tmp_path)
    for given in (["--storage", url], ["--set", f"search.storage={url!r}"]):
        told = refused(capsys, "--config", config, "--out", tmp_path / "run", *given)
        assert "error: " in told
        assert "search.storage: " in told
        assert "hunter2" not in told
        assert re.search(said, told)
    assert not (tmp_path / "run").exists()


def test_a_relative_sqlite_path_is_kept_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = tiny_study(tmp_path, search={"storage": "sqlite:///team.db"})
    assert study.search.storage == f"sqlite:///{tmp_path}/team.db"
    assert load_study(write_study(tmp_path / "again", search={"storage": study.search.storage}))


@pytest.mark.parametrize("fault", ["unreachable", "silent", "absent", "password", "driver"])
def test_a_database_that_cannot_be_opened_is_said_in_one_line_and_in_time(
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    url, said = server.url("absent"), 'database "absent" does not exist'
    if fault == "unreachable":
        url, said = server.url("postgres", postgres.free_port()), "Connection refused"
    elif fault == "silent":
        silent = socket.create_server(("127.0.0.1", 0))  # nobody ever accepts
        url, said = server.url("postgres", silent.getsockname()[1]), "timeout"
        monkeypatch.setitem(storage_module._LIBPQ, "connect_timeout", 2)
    elif fault == "password":
        monkeypatch.setenv("PGPASSWORD", "a wrong secret")
        said = "password authentication failed"
    elif fault == "driver":
        monkeypatch.setitem(sys.modules, "psycopg", None)
        said = "pip install 'ristune[postgresql]'"
    config, out = write_study(tmp_path), tmp_path / "run"
    told = refused(capsys, "--config", config, "--out", out, "--storage", url)
    assert said in told
    assert "secret" not in told
    assert not out.exists()


def test_a_study_goes_on_only_in_the_database_in_which_it_began(
    tmp_path: Path, server: Server, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    url, other, out = server.fresh(), server.fresh(), tmp_path / "run"
    config = write_study(tmp_path)
    assert run_here("--config", config, "--local", "--out", out, "--storage", url) == 0
    assert "holds no study run-" in refused(capsys, "--resume", out, "--storage", other)
    assert load_study(out / "config.yaml").search.storage == parse_url(url).render_as_string()
    lite = tmp_path / "lite"
    assert run_here("--config", config, "--local", "--out", lite) == 0
    assert "has its ledger in study.db" in refused(capsys, "--resume", lite, "--storage", url)
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(text.replace(parse_url(url).render_as_string(), "null"))
    assert "lies in a database, which must be named" in refused(capsys, "--resume", out)
    assert execute(report_page.app, [str(out)]) == 2


@pytest.mark.parametrize("name", ["a {b} %20 ?c#d", "semi;colon & quote'", "über"])
def test_a_run_folder_may_be_called_anything(tmp_path: Path, name: str) -> None:
    home = tmp_path / name
    home.mkdir()
    storage = open_storage(sqlite_url(home / "study.db"))
    storage.remove_session()
    assert (home / "study.db").stat().st_size > 0


def test_studies_that_begin_together_in_an_empty_database_both_begin(
    tmp_path: Path, server: Server
) -> None:
    url = server.fresh()
    ledgers: list[Ledger] = []
    threads = [
        threading.Thread(target=lambda i=i: ledgers.append(driver(tmp_path / f"{i}", url)))  # type: ignore[misc]
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ledgers) == 4
    for ledger in ledgers:
        ledger.close()


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
