"""What begins, extends and ends a session, whoever runs the trials."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from model.training import Trainer
from tests.tiny import TINY_CANDIDATE
from tests.tuner.support import Clock, FakeRun, run_here, write_study
from tuner import conclusion, evaluation, session
from tuner.command import execute
from tuner.config import load_study
from tuner.folder import RunFolder
from tuner.records import Assignment, TrialRecord
from tuner.standing import standing
from tuner.status import app as status_app
from tuner.study import Ledger
from tuner.telemetry import Progress

SCORE_WINNER = conclusion._score_winner
NOWHERE = ("--address", "127.0.0.1:1")  # a cluster that is not there: exit 2 where it is asked for


@pytest.fixture(autouse=True)
def unscored(monkeypatch: pytest.MonkeyPatch) -> None:
    """No winner is compared with NOMP: that takes longer than the trials here."""
    monkeypatch.setattr("tuner.conclusion._score_winner", lambda folder, study, progress: None)


def trials_of(folder: Path) -> list[TrialRecord]:
    ledger = Ledger(folder / "study.db", load_study(folder / "config.yaml"))
    try:
        return ledger.trials()
    finally:
        ledger.close()


def outcomes(folder: Path) -> list[Any]:
    return [(t.number, t.state, t.seed, t.params, t.curve) for t in trials_of(folder)]


@pytest.fixture
def fake_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of no time."""
    monkeypatch.setattr("tuner.local.TrialRun", FakeRun)


def test_a_time_budget_ends_a_study_in_good_order_and_a_larger_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    config = write_study(tmp_path, training={"epochs": 3}, search={"scheduler": "none"})
    out = tmp_path / "run"
    assert run_here("--config", config, "--local", "--time-budget", "4m", "--out", out) == 0
    said = capsys.readouterr().out
    assert "trials: 1 to go on, 1 done" in said
    assert "ended early: the time budget of 4m is used up (4m over all sessions)" in said
    assert f"--resume {out} --local --time-budget none" in said
    assert (out / "best.json").exists()
    assert [(t.state, t.epoch) for t in trials_of(out)] == [("done", 3), ("running", 1)]
    first = outcomes(out)[0]
    look = standing(out)
    assert look.next_command == f"python -m tuner.train --from {out}"
    assert look.mode == " --local"
    assert f"--resume {out} --local --time-budget none" in (out / "report.html").read_text()

    assert run_here("--resume", out, *NOWHERE) == 0, "a cluster was asked for without need"
    assert "nothing is left to run: the time budget of 4m" in capsys.readouterr().out
    assert standing(out).mode == " --local", "nothing was run in another way"
    clock.now = 1e6  # between sessions no time counts
    assert run_here("--resume", out, "--local", "--time-budget", "6m") == 0
    assert "trial 0001 goes on after epoch 1" in capsys.readouterr().out
    assert [(t.state, t.epoch) for t in trials_of(out)] == [("done", 3), ("done", 3)]
    assert outcomes(out)[0] == first
    assert load_study(out / "config.yaml").search.time_budget == 360.0


@pytest.mark.usefixtures("fake_trials")
def test_a_budget_without_a_finished_trial_ends_with_1_and_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Clock(monkeypatch)
    config = write_study(tmp_path)
    assert (
        run_here("--config", config, "--local", "--time-budget", 60, "--out", tmp_path / "r") == 1
    )
    said = capsys.readouterr().out
    assert "ended early: the time budget of 1m is used up" in said
    assert "no trial finished" in said
    assert [(t.state, t.epoch) for t in trials_of(tmp_path / "r")] == [("running", 1)]
    assert execute(status_app, [str(tmp_path / "r")]) == 1
    told = capsys.readouterr().out
    assert "ended early: the time budget of 1m is used up" in told
    assert f"next: python -m tuner.run --resume {tmp_path / 'r'} --local --time-budget none" in told


@pytest.mark.usefixtures("fake_trials")
def test_a_target_ends_a_study_once_a_trial_finishes_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_study(tmp_path, search={"scheduler": "none"})
    out = tmp_path / "run"
    assert run_here("--config", config, "--local", "--target", 1e9, "--out", out) == 0
    said = capsys.readouterr().out
    assert "ended early: the target 1e+09 is reached (trial 0000 has " in said
    assert [(t.state, t.epoch) for t in trials_of(out)] == [("done", 2)]
    assert run_here("--resume", out, *NOWHERE) == 0
    assert "ended early" not in capsys.readouterr().out
    assert run_here("--resume", out, "--local", "--target", "none", "--trials", 2) == 0
    assert "ended early" not in capsys.readouterr().out
    assert [trial.state for trial in trials_of(out)] == ["done", "done"]


@pytest.mark.usefixtures("fake_trials")
def test_a_study_that_was_extended_is_the_study_that_was_begun_so_large(tmp_path: Path) -> None:
    config = write_study(tmp_path)
    assert run_here("--config", config, "--local", "--trials", 3, "--out", tmp_path / "whole") == 0
    assert run_here("--config", config, "--local", "--trials", 2, "--out", tmp_path / "grown") == 0
    assert run_here("--resume", tmp_path / "grown", "--local", "--trials", 3) == 0
    assert outcomes(tmp_path / "grown") == outcomes(tmp_path / "whole")
    assert len({repr(trial.params) for trial in trials_of(tmp_path / "grown")}) == 3
    assert load_study(tmp_path / "grown" / "config.yaml").search.trials == 3


@pytest.mark.usefixtures("fake_trials")
def test_a_study_with_nothing_left_connects_to_no_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"network.heads": {"type": "categorical", "choices": [1, 2]}}
    config = write_study(tmp_path, search={"space": space})
    out = tmp_path / "run"
    assert run_here("--config", config, "--local", "--trials", 1, "--out", out) == 0
    said = capsys.readouterr().out
    assert "own values" not in said, "there was nothing beside them"
    (out / "report.html").unlink()
    capsys.readouterr()
    assert run_here("--resume", out, *NOWHERE) == 0
    said = capsys.readouterr().out
    assert "nothing is left to run: all trials have run (--trials 2 goes on)" in said
    assert (out / "report.html").exists()
    assert run_here("--resume", out, *NOWHERE, "--trials", 2) == 2, "work is left"
    assert load_study(out / "config.yaml").search.trials == 1
    assert run_here("--resume", out, "--local", "--trials", 9) == 0
    assert run_here("--resume", out, *NOWHERE) == 0, "the space is used up"


def test_mistakes_are_told_before_a_cluster_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_study(tmp_path)
    out = RunFolder.fresh(tmp_path / "run")
    out.config.write_text("")
    out.release()
    foreign = tmp_path / "foreign"
    (foreign / "best").mkdir(parents=True)
    (foreign / "best" / "config.json").write_text("mine")
    (foreign / "trials").mkdir()  # of a session that was cut before it began
    (foreign / "report.html").write_text("mine")
    over = "--out: .*/foreign holds no study, but best, report.html, which .* would write over"
    for arguments, complaint in (
        (("--config", config, "--out", foreign), over),
        (("--config", config, "--out", foreign, "--dry-run"), over),
        (
            ("--set", "training.epochs", 3),
            ".* extra argument.*; a field is changed with --set a.b=VALUE, in",
        ),
        (("--config", config, "--out", out.path), "--out: .* already holds a study"),
        (("--config", config, "--out", out.path, "--dry-run"), "--out: .* already holds a study"),
        (("--config", config, "--out", "x" * 300), "--out: cannot write to .*: File name too long"),
        (("--set", "training.learning_rat=1"), "--set: training.learning_rat: unknown field"),
        (("--trials", 0), "--trials: search.trials: got 0"),
    ):
        assert run_here(*arguments, *NOWHERE) == 2
        told = capsys.readouterr().err
        assert re.fullmatch(f"error: {complaint}.*\n", told), told


def test_a_ray_that_does_not_come_up_is_told_in_a_line_and_leaves_the_folder_free(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with other work Ray gives up on its own node, by a bare Exception."""

    def busy(**options: Any) -> None:
        raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.setattr("ray.init", busy)
    out = tmp_path / "run"
    asked = ("--config", write_study(tmp_path), "--address", "local", "--out", out)
    assert run_here(*asked) == 2
    told = capsys.readouterr().err
    assert re.fullmatch(
        "error: --address: cannot start Ray here: The current node timed out .*; try again when "
        "less runs here, or --local, which needs no Ray\n",
        told,
    ), told
    assert not (out / "config.yaml").exists()


def test_writing_the_results_takes_a_tenth_of_the_drivers_time_and_the_last_ones_are_whole(
    tmp_path: Path, fake_trials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, written = 0.0, []
    write = session.write_trials

    def slowly(folder: RunFolder, ledger: Ledger) -> None:
        nonlocal now
        now += 1.0
        written.append(len(ledger.trials()))
        write(folder, ledger)

    def asked(ledger: Ledger) -> Assignment | None:
        nonlocal now
        now += 4.0
        return propose(ledger)

    propose = Ledger.ask
    monkeypatch.setattr(Ledger, "ask", asked)
    monkeypatch.setattr(session, "write_trials", slowly)
    monkeypatch.setattr(conclusion, "write_trials", slowly)
    monkeypatch.setattr(session, "monotonic", lambda: now)
    config = write_study(tmp_path, search={"trials": 8, "scheduler": "none"})
    out = tmp_path / "run"
    assert run_here("--config", config, "--local", "--out", out) == 0
    assert written == [1, 4, 7, 8]  # nine seconds of rest; the last at the session's end
    assert len((out / "trials.csv").read_text(encoding="utf-8").splitlines()) == 9
    kept = [path.parent.name for path in (out / "trials").glob("*/checkpoint*")]
    assert len(kept) == 1


def test_a_second_ctrl_c_while_results_are_written_says_how_to_go_on(
    tmp_path: Path,
    fake_trials: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    config, out = write_study(tmp_path), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(FakeRun, "step", interrupted)
        patch.setattr(conclusion, "write_report", interrupted)
        assert run_here("--config", config, "--local", "--out", out) == 130
    on = f"go on with: python -m tuner.run --resume {out} --local"
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"interrupted while the results were written; {on}"
    assert run_here("--resume", out, "--local") == 0


def test_a_disk_that_fills_amid_an_epoch_ends_the_session_and_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(trainer: Trainer) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/cache")

    config, out = write_study(tmp_path), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_epoch", full)
        assert run_here("--config", config, "--local", "--out", out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "(No space left on device: /tmp/cache)" in line
    assert [trial.state for trial in trials_of(out)] == ["running"]


def test_a_study_is_not_cut_below_what_has_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_study(
        tmp_path, search={"trials": 3, "scheduler": "none"}, training={"epochs": 1}
    )
    out = tmp_path / "run"
    assert run_here("--config", config, "--local", "--out", out) == 0
    kept = (out / "config.yaml").read_text()
    capsys.readouterr()
    assert run_here("--resume", out, "--local", "--trials", 2) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "search.trials (--trials): got 2, and 3 trials" in told
    assert (out / "config.yaml").read_text() == kept
    assert run_here("--resume", out, "--local", "--trials", 3) == 0


def test_a_winner_that_stays_is_scored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(conclusion, "_score_winner", SCORE_WINNER)
    scored: list[str] = []
    real = evaluation.evaluate_suite

    def counting(*arguments: Any, **named: Any) -> dict[str, Any]:
        scored.append(arguments[0])
        return real(*arguments, **named)

    def told() -> list[str]:
        return [line for line in capsys.readouterr().out.splitlines() if "F1" in line]

    monkeypatch.setattr(evaluation, "evaluate_suite", counting)
    search = {"trials": 1, "scheduler": "none"}
    config = write_study(tmp_path, search=search, training={"epochs": 1})
    out = tmp_path / "run"
    assert run_here("--config", config, "--local", "--out", out) == 0
    first = told()
    assert len(first) == 4
    assert first[-1].startswith("winner less NOMP [95 %]: F1 ")
    assert run_here("--resume", out, "--local") == 0
    assert told() == first
    assert len(scored) == 1
    content = json.loads((out / "evaluation.json").read_text())
    del content["suites"]["nominal"]["paired_gospa_m"]  # as an earlier version left it
    for damaged in ("{", "[]", '{"network": 3}', json.dumps(content)):
        (out / "evaluation.json").write_text(damaged)
        assert run_here("--resume", out, "--local") == 0
        assert told() == first
    assert len(scored) == 5
    progress = Progress(load_study(out / "config.yaml"), [])
    decision = json.loads((out / "best" / "decision.json").read_text())
    (out / "best" / "decision.json").write_text(json.dumps(decision | {"threshold": 0.9}))
    SCORE_WINNER(RunFolder(out), load_study(out / "config.yaml"), progress)
    assert len(scored) == 6, "another network"
    SCORE_WINNER(RunFolder(out), load_study(out / "config.yaml"), progress)
    assert len(scored) == 6


@pytest.mark.usefixtures("fake_trials")
def test_candidates_are_said_to_be_found_where_trials_are_left_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = yaml.safe_load(write_study(tmp_path).read_text(encoding="utf-8"))
    text["network"] = TINY_CANDIDATE
    text["scene"] |= {"n_antennas": 6, "n_snapshots": 6}
    text["search"] |= {"trials": 1, "space": {}}
    config = tmp_path / "candidate.yaml"
    config.write_text(yaml.safe_dump(text), encoding="utf-8")
    assert run_here("--config", config, "--local", "--out", tmp_path / "run") == 0
    assert "candidates of all scenes are found first" in capsys.readouterr().out
    assert run_here("--resume", tmp_path / "run", *NOWHERE) == 0
    said = capsys.readouterr().out
    assert "nothing is left to run" in said
    assert "found first" not in said
