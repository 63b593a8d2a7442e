from __future__ import annotations

import math
from bdb import BdbQuit
from pathlib import Path
from typing import Any

import pytest

from model.config import TrialConfig
from model.training import Trainer
from tests.tuner.support import tiny_study
from tuner.trial import TrialRun


def config(folder: Path, **changes: Any) -> TrialConfig:
    return tiny_study(folder, **changes).trial_config({}, seed=5)


def test_a_trial_reports_its_trainers_metrics_until_it_has_finished(tmp_path: Path) -> None:
    trial = config(tmp_path)
    trainer = Trainer(trial)
    wanted = [trainer.run_epoch()["objective"] for _ in range(2)]
    run = TrialRun(trial)
    results = [run.step(), run.step()]
    assert [result["objective"] for result in results] == wanted
    assert [result["finished"] for result in results] == [False, True]
    assert not any(result["failed"] for result in results)


def test_a_diverging_trial_fails_with_its_reason_and_no_score(tmp_path: Path) -> None:
    training = {"learning_rate": 1e30, "gradient_clip": 1e30, "epochs": 5, "max_skipped_steps": 2}
    run = TrialRun(config(tmp_path, training=training))
    result: dict[str, Any] = {"failed": False, "finished": False}
    while not (result["failed"] or result["finished"]):
        result = run.step()
    assert result["failed"]
    assert result["reason"].startswith("diverged: ")
    assert math.isnan(result["objective"])
    assert not run.save(tmp_path / "checkpoint")


def test_bad_data_fails_the_trial_with_words(tmp_path: Path) -> None:
    result = TrialRun(config(tmp_path, data={"shards": str(tmp_path / "absent")})).step()
    assert result["failed"]
    assert result["reason"].startswith("data: ")
    assert "absent" in result["reason"]


def test_leaving_the_debugger_ends_the_session_and_fails_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def left(self: Trainer) -> dict[str, Any]:
        raise BdbQuit

    monkeypatch.setattr(Trainer, "run_epoch", left)
    with pytest.raises(KeyboardInterrupt):
        TrialRun(config(tmp_path)).step()


def test_an_exception_of_the_users_own_fails_the_trial_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Trainer) -> dict[str, Any]:
        raise ZeroDivisionError("division by zero\nin two lines")

    monkeypatch.setattr(Trainer, "run_epoch", broken)
    result = TrialRun(config(tmp_path)).step()
    assert result["failed"]
    assert result["reason"] == "ZeroDivisionError: division by zero in two lines"
    assert "Traceback" in result["traceback"]


def test_a_trial_goes_on_from_its_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    trial = config(tmp_path, training={"epochs": 3})
    whole = TrialRun(trial)
    wanted = [whole.step()["objective"] for _ in range(3)]
    first = TrialRun(trial)
    first.step()
    assert first.save(tmp_path / "checkpoint")
    first.close()
    second = TrialRun(trial, checkpoint=tmp_path / "checkpoint")
    results = [second.step(), second.step()]
    assert [result["epoch"] for result in results] == [2, 3]
    assert [result["objective"] for result in results] == wanted[1:]


def test_a_damaged_checkpoint_means_a_start_from_the_beginning(tmp_path: Path) -> None:
    trial = config(tmp_path)
    first = TrialRun(trial)
    objective = first.step()["objective"]
    first.save(tmp_path / "checkpoint")
    for path in (tmp_path / "checkpoint").iterdir():
        path.write_bytes(b"torn")
    again = TrialRun(trial, checkpoint=tmp_path / "checkpoint").step()
    assert (again["epoch"], again["objective"]) == (1, objective)


def test_a_trial_cut_after_its_last_epoch_only_tells_its_score(tmp_path: Path) -> None:
    trial = config(tmp_path)
    run = TrialRun(trial)
    run.step()
    objective = run.step()["objective"]
    run.save(tmp_path / "checkpoint")
    again = TrialRun(trial, checkpoint=tmp_path / "checkpoint").step()
    assert again["finished"]
    assert again["repeated"]
    assert (again["epoch"], again["objective"]) == (2, objective)
