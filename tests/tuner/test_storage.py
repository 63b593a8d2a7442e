"""The ledger in a real PostgreSQL and in SQLite: one study in either, and what is refused."""

from __future__ import annotations

import multiprocessing
import re
import resource
import socket
import sys
import threading
import time
from pathlib import Path

import optuna
import pytest
from sqlalchemy import Connection, Engine, event

from tests.tuner import postgres
from tests.tuner.postgres import Server
from tests.tuner.support import driver, outcome, ran, run_here, tiny_study, trials_of, write_study
from tuner import report as report_page
from tuner import storage as storage_module
from tuner.command import execute
from tuner.config import load_study
from tuner.errors import StudyError
from tuner.storage import has_tables, open_storage, parse_url, sqlite_url
from tuner.study import Ledger
from tuner.warmstart import read_prior

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("password")]


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
    assert tables_of(server, other) == 0, "who looked for a study made tables"
    assert load_study(out / "config.yaml").search.storage == parse_url(url).render_as_string()
    lite = tmp_path / "lite"
    assert run_here("--config", config, "--local", "--out", lite) == 0
    assert "has its ledger in study.db" in refused(capsys, "--resume", lite, "--storage", url)
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(text.replace(parse_url(url).render_as_string(), "null"))
    assert "lies in a database, which must be named" in refused(capsys, "--resume", out)
    assert execute(report_page.app, [str(out)]) == 2


def tables_of(server: Server, url: str) -> int:
    with server.connect(url.rpartition("/")[2]) as connection:
        counted = connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
        return int(counted.fetchall()[0][0])


def test_a_dry_run_asks_the_database_and_leaves_it_as_it_is(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    config, url = write_study(tmp_path), server.fresh()
    lite = f"sqlite:///{tmp_path}/team.db"
    dry = ("--config", config, "--local", "--dry-run", "--storage")
    for where in (url, lite):
        assert run_here(*dry, where) == 0
        assert ", where its tables would be made\n" in capsys.readouterr().out
    assert tables_of(server, url) == 0
    assert not (tmp_path / "team.db").exists()
    for where in (url, lite):
        driver(tmp_path / where.partition(":")[0], where).close()
        assert run_here(*dry, where) == 0
        assert "would be made" not in capsys.readouterr().out
    absent = f"sqlite:///{tmp_path}/absent/team.db"
    assert f"cannot be opened: no folder {tmp_path}/absent" in refused(
        capsys, *dry[:-1], "--storage", absent
    )


@pytest.mark.parametrize("name", ["a {b} %20 ?c#d", "semi;colon & quote'", "über"])
def test_a_run_folder_may_be_called_anything(tmp_path: Path, name: str) -> None:
    home = tmp_path / name
    home.mkdir()
    storage = open_storage(sqlite_url(home / "study.db"))
    storage.remove_session()
    assert (home / "study.db").stat().st_size > 0


def _opened_with_room(database: Path, room: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        open_storage(sqlite_url(database)).remove_session()
    except StudyError:
        sys.exit(3)


def test_a_database_whose_making_a_full_disk_ended_is_made_anew_and_whole(tmp_path: Path) -> None:
    codes = set()
    for room in (*range(2048, 30_000, 4096), 2**18):
        database = tmp_path / f"{room}" / "study.db"
        database.parent.mkdir()
        child = multiprocessing.get_context("fork").Process(
            target=_opened_with_room, args=(database, room)
        )
        child.start()
        child.join()
        codes.add(child.exitcode)
        numbers = []
        for _ in range(2):  # a session, and the next one
            storage = open_storage(sqlite_url(database))
            study = optuna.create_study(storage=storage, study_name="one", load_if_exists=True)
            numbers.append(study._study_id)
            assert len(storage.get_all_studies()) == 1
            storage.remove_session()
        assert numbers == [1, 1]
        assert [path.name for path in database.parent.iterdir()] == ["study.db"]
    assert codes == {0, 3}, "some had room and some had not"


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


def test_a_connection_that_is_ended_amid_the_opening_is_made_anew(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "_FIRST_PAUSE", 0.01)
    said: list[str] = []
    end_at = -1

    def end_it(connection: Connection, cursor: object, statement: str, *_: object) -> None:
        if len(said) == end_at:
            server.hang_up()
        said.append(statement)

    event.listen(Engine, "before_cursor_execute", end_it)
    try:
        open_storage(parse_url(server.fresh())).remove_session()
        asked = len(said)
        assert asked > 20
        for end_at in range(asked):
            said.clear()
            url = parse_url(server.fresh())
            open_storage(url).remove_session()
            assert len(said) > asked - end_at, "it was not begun anew"
            assert has_tables(url)
    finally:
        event.remove(Engine, "before_cursor_execute", end_it)
