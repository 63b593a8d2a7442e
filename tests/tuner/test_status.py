"""A study is seen as it is, by whoever reads its run folder, and is left as it was."""

from __future__ import annotations

import fcntl
import html
import json
import os
import platform
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.tuner.support import (
    ROOT,
    FakeRun,
    environment,
    kill,
    read_until,
    run,
    run_here,
    start,
    tiny_study,
    write_study,
)
from tuner.command import execute
from tuner.folder import RunFolder
from tuner.pages.material import Material
from tuner.promotion import Promotion
from tuner.report import page
from tuner.status import app
from tuner.study import Ledger

HOLD = (
    "import sys, time; from pathlib import Path; from tuner.folder import RunFolder; "
    "folder = RunFolder.existing(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of no time, and no winner that is compared with NOMP."""
    monkeypatch.setattr("tuner.conclusion._score_winner", lambda *_: None)
    monkeypatch.setattr("tuner.local.TrialRun", FakeRun)


def looked(capsys: pytest.CaptureFixture[str], folder: Path, *, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert execute(app, [str(folder), "--json"]) == code
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def begun(folder: Path, **changes: Any) -> RunFolder:
    """A study whose driver is gone: one trial done, one that failed, one cut after an epoch."""
    study = tiny_study(folder, **changes)
    run_folder = RunFolder.fresh(folder / "run")
    run_folder.config.write_text(study.to_yaml())
    ledger = Ledger(run_folder.database, study)
    for number, epochs in ((0, 2), (1, 0), (2, 1)):
        assert ledger.ask() is not None
        for epoch in range(1, epochs + 1):
            metrics = {"epoch": epoch, "objective": 2.0 / epoch, "epoch_seconds": 30.0}
            ledger.report(number, metrics)
    ledger.finish(0, "done", objective=1.0)
    ledger.finish(1, "failed", reason="diverged: NaN")
    ledger.keep_seconds(60.0)
    ledger.close()
    run_folder.release()
    return run_folder


@contextmanager
def driven(folder: RunFolder) -> Iterator[int]:
    """A process holds the folder as a driver does, and is killed at the block's end."""
    driver = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "held\n"
        yield driver.pid
    finally:
        kill(driver)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_study_that_is_over_names_its_winner_and_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run_here("--config", write_study(tmp_path), "--local", "--out", out) == 0
    before = contents(out)
    found = looked(capsys, out)
    assert contents(out) == before, "a look changed the folder"
    assert found["state"] == "finished"
    assert sum(found["trials"].values()) == 3
    assert found["trials"]["to_start"] == 0
    assert found["best"]["objective"] == json.loads((out / "best.json").read_text())["objective"]
    assert found["seconds_left"] == 0
    assert found["ended"] == "all trials have run"
    assert found["next"] == f"python -m tuner.train --from {out}"
    assert found["driver"] is None, "a driver that ended in order is not one that was cut off"
    assert execute(app, [str(out)]) == 0
    counts = capsys.readouterr().out.splitlines()[1]
    assert counts.startswith("trials: ")
    assert counts.endswith(" failed"), "of what has ended none goes on or starts"


def test_a_study_that_was_cut_off_says_what_is_left_and_how_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begun(tmp_path, search={"trials": 5})
    found = looked(capsys, folder.path)
    assert found["state"] == "interrupted"
    counts = {"running": 1, "done": 1, "pruned": 0, "failed": 1, "to_start": 2}
    assert found["trials"] == counts
    assert found["best"]["trial"] == 0
    assert found["failures"] == [{"trial": 1, "epoch": 0, "reason": "diverged: NaN"}]
    assert 0 <= found["report_age"] < 60
    # One more epoch of the trial that was cut, and twice the mean of 2 and 0; 90 s of epochs in 60.
    assert found["seconds_left"] == pytest.approx(30.0 * (1 + 2 * 1.0) / 1.5)
    assert found["next"] == f"python -m tuner.run --resume {folder.path}"
    assert execute(app, [str(folder.path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "tiny: interrupted: trials are left to run",
        "trials: 1 to go on, 1 done, 0 pruned, 1 failed, 2 to start",
        "best: trial 0000, objective 1.00000",
        "trial 0001 failed after epoch 0: diverged: NaN",
        "time left: about 1m, once it goes on",
        f"next: python -m tuner.run --resume {folder.path}",
    ]


def test_a_driver_is_seen_at_work_and_seen_to_be_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begun(tmp_path)
    with driven(folder) as pid:
        found = looked(capsys, folder.path)
        assert found["state"] == "running"
        assert (found["driver"]["pid"], found["driver"]["host"]) == (pid, platform.node())
        assert 0 <= time.time() - found["driver"]["since"] < 60
        assert found["next"] is None
    found = looked(capsys, folder.path)
    assert found["state"] == "interrupted"
    assert execute(app, [str(folder.path)]) == 0
    assert f"process {pid} was cut off" in capsys.readouterr().out


def test_a_search_that_ran_out_of_time_amid_a_trial_is_followed_by_its_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begun(tmp_path, search={"trials": 5, "time_budget": 60.0, "promote": 1})
    with driven(folder):
        assert execute(app, [str(folder.path)]) == 0
        out = capsys.readouterr().out
        assert "the search has ended: the time budget of 1m is used up" in out
        assert "; promotion, its winner's scores and report follow" in out
        assert "time left" not in out


def test_a_driver_that_scores_the_winner_is_not_said_to_have_trials_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begun(tmp_path, search={"trials": 3})
    with driven(folder):
        assert looked(capsys, folder.path)["ended"] is None
        ledger = Ledger(folder.database, tiny_study(tmp_path, search={"trials": 3}))
        ledger.finish(2, "pruned", reason="stopped")
        ledger.close()
        seen = looked(capsys, folder.path)
        assert seen["state"] == "running"
        assert seen["ended"] == "all trials have run"
        assert execute(app, [str(folder.path)]) == 0
        out = capsys.readouterr().out
        assert "the search has ended: all trials have run; its winner's scores and report" in out
        assert "time left" not in out


def test_a_search_whose_promotion_is_left_has_not_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {"search": {"trials": 3, "promote": 1, "promote_seeds": 2}}
    folder = begun(tmp_path, **changes)
    search = Ledger(folder.database, tiny_study(tmp_path, **changes))
    search.finish(2, "pruned", reason="stopped")
    before, on = contents(folder.path), f"python -m tuner.run --resume {folder.path}"
    found = looked(capsys, folder.path)
    assert (found["state"], found["next"], found["ended"]) == (
        "interrupted",
        on,
        "all trials have run",
    )
    assert contents(folder.path) == before, "a look made the promotion's study"
    promotion = Promotion(search)
    for repeat in (0, 1):
        run = promotion.ask()
        assert run is not None
        found = looked(capsys, folder.path)
        assert (found["state"], found["next"]) == ("interrupted", on)
        promotion.report(repeat, {"epoch": 2, "objective": 1.0, "epoch_seconds": 30.0})
        promotion.finish(repeat, "done", objective=1.0)
        promotion.keep_seconds(60.0 * (repeat + 1))
        if repeat == 0:
            assert execute(app, [str(folder.path)]) == 0
            said = capsys.readouterr().out
            assert "tiny: interrupted: promoted runs are left to run\n" in said
            assert "time left: about 1m, once it goes on\n" in said
            overview = html.unescape(page(Material.read(folder, search)))
            assert f"<dt>Go on, if it was cut<dd><code>{on}</code>" in overview
    search.close()
    found = looked(capsys, folder.path)
    assert found["state"] == "finished"
    won = promotion.configurations()[0]
    assert won.best is not None
    assert found["promoted"] == {
        "trial": won.trial.number,
        "mean": 1.0,
        "std": 0.0,
        "seed": won.best.seed,
        "objective": 1.0,
    }
    locate = f"python -m model.locate SNAPSHOTS --checkpoint {folder.path}/best"
    assert found["next"] == on, "its network is not in best/ yet"
    folder.best.mkdir()
    assert looked(capsys, folder.path)["next"] == locate, "it has been trained at full budget"
    assert execute(app, [str(folder.path)]) == 0
    said = capsys.readouterr().out
    assert f"best in the search: trial {found['best']['trial']:04d}" in said
    assert f"promoted: trial {won.trial.number:04d}: 1.00000 ± 0.00000 (2 seeds)" in said


def test_a_driver_elsewhere_whose_lock_does_not_show_here_is_known_by_what_it_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begun(tmp_path)
    (folder.path / ".lock").write_text("17 on another-machine")
    assert looked(capsys, folder.path)["state"] == "running"
    assert execute(app, [str(folder.path)]) == 0
    words = "tiny: running by process 17 on another-machine for 1s, as its ledger is being written"
    assert words in capsys.readouterr().out
    long_ago = time.time() - 3600
    os.utime(folder.database, (long_ago, long_ago))
    assert looked(capsys, folder.path)["state"] == "interrupted"
    os.utime(folder.database)
    (folder.path / ".lock").write_text(f"17 on {platform.node()}")
    assert looked(capsys, folder.path)["state"] == "interrupted", "here the lock tells all"


def test_a_study_that_nobody_began_can_be_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(tiny_study(tmp_path).to_yaml())
    found = looked(capsys, folder)
    assert (found["state"], found["trials"]["to_start"]) == ("never started", 3)
    assert found["next"] == f"python -m tuner.run --resume {folder}"
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_a_study_without_a_finished_trial_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begun(tmp_path, search={"trials": 3})
    ledger = Ledger(folder.database, tiny_study(tmp_path, search={"trials": 3}))
    ledger.finish(2, "failed", reason="no memory")
    ledger.close()
    assert looked(capsys, folder.path)["state"] == "finished"
    with sqlite3.connect(folder.database) as connection:
        connection.execute("UPDATE trials SET state = 'FAIL' WHERE number = 0")
    found = looked(capsys, folder.path, code=1)
    assert found["best"] is None
    assert len(found["failures"]) == 3
    assert found["next"] == f"python -m tuner.run --resume {folder.path} --trials 6"


def test_a_reached_target_is_the_end_and_says_what_lifts_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begun(tmp_path, search={"trials": 5, "target": 1.5})
    found = looked(capsys, folder.path)
    assert found["state"] == "finished"
    assert found["ended"] == "the target 1.5 is reached (trial 0000 has 1.00000)"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "holds no study"),
        (lambda folder: _spoilt(folder, b"not a database at all, but long enough" * 40),
         "study.db cannot be opened: file is not a database"),
        (lambda folder: _spoilt(folder, b""), "the ledger holds no study"),
    ],
)  # fmt: skip
def test_what_is_no_study_ends_with_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, words: str
) -> None:
    folder = tmp_path / "run"
    make(folder)
    assert execute(app, [str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def _spoilt(folder: Path, content: bytes) -> None:
    begun(folder.parent)
    (folder / "study.db").write_bytes(content)


def test_what_a_killed_writer_left_half_done_is_rolled_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begun(tmp_path)
    program = (
        "import os, sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "c.execute('PRAGMA cache_size = 1'); c.execute('PRAGMA cache_spill = 1')\n"
        "c.execute('BEGIN IMMEDIATE')\n"
        "c.execute('UPDATE trials SET state = ?', ('FAIL',))\n"
        "c.execute('CREATE TABLE junk (x)')\n"
        "for i in range(200): c.execute('INSERT INTO junk VALUES (?)', ('x' * 4000,))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(folder.database)], check=False, timeout=60)
    journal = folder.path / "study.db-journal"
    assert journal.exists(), "the writer left nothing half done: the test shows nothing"
    assert looked(capsys, folder.path)["trials"]["done"] == 1


def test_looking_keeps_no_driver_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = begun(tmp_path)
    glance = os.open(folder.path / ".lock", os.O_RDONLY)
    fcntl.flock(glance, fcntl.LOCK_SH)
    monkeypatch.setattr("tuner.folder.time.sleep", lambda _: fcntl.flock(glance, fcntl.LOCK_UN))
    try:
        RunFolder.existing(folder.path).release()
    finally:
        os.close(glance)


@pytest.mark.slow
@pytest.mark.long
def test_a_real_study_is_watched_from_another_process_until_it_ends(tmp_path: Path) -> None:
    config = write_study(
        tmp_path, training={"epochs": 150}, search={"trials": 4, "scheduler": "none"}
    )
    out = tmp_path / "run"
    driver = start("--config", config, "--local", "--out", out)
    read_until(driver, "trial 0000 epoch 2/150")
    first = json.loads(run(out, "--json", module="tuner.status").stdout)
    assert (first["state"], first["driver"]["pid"]) == ("running", driver.pid)
    assert first["report_age"] < 30
    kill(driver)
    assert json.loads(run(out, "--json", module="tuner.status").stdout)["state"] == "interrupted"
    again = start("--resume", out, "--local")
    read_until(again, "goes on after epoch")
    watched = run(out, "--json", "--watch", "0.5", module="tuner.status")
    assert watched.returncode == 0
    looks = [json.loads(line) for line in watched.stdout.splitlines()]
    assert looks[0]["state"] == "running"
    assert looks[-1]["state"] == "finished"
    assert any(look["seconds_left"] for look in looks[:-1]), "no time left was ever told"
    assert again.wait(timeout=60) == 0
