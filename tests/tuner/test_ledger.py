"""A run folder's ledger goes on with the study that it began with, and no other."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tests.tuner.postgres import Server
from tests.tuner.support import driver, ran, run_here, tiny_study, write_study
from tuner.command import execute
from tuner.config import load_study
from tuner.errors import StudyError
from tuner.folder import RunFolder
from tuner.ledger import open_ledger, read_ledger
from tuner.report import app as report_app
from tuner.status import app as status_app
from tuner.warmstart import read_prior


def begun(folder: Path, **changes: Any) -> RunFolder:
    """A study of one trial, whose driver has gone."""
    ledger = driver(folder, None, **changes)
    trial = ledger.ask()
    assert trial is not None
    ran(ledger, trial)
    ledger.close()
    return RunFolder(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scene.snr_db": (20.0, 30.0)}, r"scene.snr_db was \[.+\] and is \[20.0, 30.0\]"),
        ({"training.epochs": 3}, "training.epochs was 2 and is 3;?"),
        ({"search.sampler": "random"}, 'search.sampler was "tpe" and is "random"'),
        (
            {"seed": 77, "training.epochs": 3, "training.ema_decay": 0.25, "blend.beta": 0.25},
            r"blend.beta was .*; seed was 3 and is 77; training.ema_decay was .*; 1 more\.",
        ),
    ],
)
def test_a_study_whose_configuration_was_edited_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = begun(tmp_path)
    study = load_study(folder.config)
    with pytest.raises(StudyError, match=said) as caught:
        open_ledger(folder, study.replaced(changes))
    assert f"--warm-start {folder.path}" in str(caught.value)
    with pytest.raises(StudyError, match=said):
        read_ledger(folder, study.replaced(changes))
    open_ledger(folder, study).close()  # nothing of it was noted


def test_a_widened_space_is_another_study(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    edited = folder.config.read_text().replace("high: 0.6", "high: 0.8")
    folder.config.write_text(edited)
    where = re.escape("search.space.blend.beta.high was 0.6 and is 0.8")
    with pytest.raises(StudyError, match=where):
        open_ledger(folder, load_study(folder.config))


def test_how_far_a_study_goes_and_where_may_change(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    study = load_study(folder.config)
    changed = study.replaced(
        {
            "search.trials": 9,
            "search.promote": 2,
            "search.promote_seeds": 3,
            "search.time_budget": 60.0,
            "data.cache": tmp_path / "elsewhere",
            "resources.max_failures": 1,
        }
    )
    ledger = open_ledger(folder, changed)
    assert ledger.optuna_study.user_attrs["config"]["search"]["trials"] == 9
    ledger.close()


def test_before_its_first_trial_a_study_may_be_edited(tmp_path: Path) -> None:
    ledger = driver(tmp_path, None)
    ledger.close()
    study = load_study(RunFolder(tmp_path).config).replaced({"training.epochs": 3})
    ledger = open_ledger(RunFolder(tmp_path), study)
    assert ledger.optuna_study.user_attrs["config"]["training"]["epochs"] == 3
    ledger.close()


def test_another_name_does_not_begin_a_second_study(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    study = load_study(folder.config)
    with pytest.raises(StudyError, match=r"name is 'other', and the study in .* is 'tiny'"):
        open_ledger(folder, study.replaced({"name": "other"}))
    ledger = open_ledger(folder, study)
    assert len(ledger.trials()) == 1
    ledger.close()


def test_a_ledger_of_another_version_is_not_compared(tmp_path: Path) -> None:
    folder = begun(tmp_path)
    study = load_study(folder.config)
    ledger = open_ledger(folder, study)
    ledger.optuna_study.set_user_attr("config", {"gone": {"field": 1}})
    ledger.close()
    again = open_ledger(folder, study)
    assert [trial.number for trial in again.trials()] == [0]
    assert again.optuna_study.user_attrs["config"] == study.model_dump(mode="json")
    again.close()


def test_the_command_says_it_in_one_line(
    tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = write_study(tmp_path), tmp_path / "run"
    assert run_here("--config", config, "--local", "--out", out) == 0
    path = out / "config.yaml"
    path.write_text(path.read_text().replace("epochs: 2", "epochs: 4"))
    capsys.readouterr()
    resume = ("--resume", out, "--local", "--trials", 5)
    for command in (
        lambda: run_here(*resume),
        lambda: run_here(*resume, "--dry-run"),
        lambda: execute(status_app, [str(out)]),
        lambda: execute(report_app, [str(out)]),
        lambda: run_here("--config", config, "--local", "--dry-run", "--warm-start", out),
    ):
        assert command() == 2
        said = capsys.readouterr().err
        assert "training.epochs was 2 and is 4" in said
        assert "Traceback" not in said


@pytest.mark.parametrize(
    ("version", "changes", "refused"),
    [
        (1, {"objective": "nll"}, True),
        (2, {"objective": "nll"}, True),
        (3, {"objective": "nll"}, False),
        (1, {"scene": {"min_sources": 0}}, True),
        (2, {"scene": {"min_sources": 0}}, False),
        (1, {"objective": "gospa", "scene": {"min_sources": 0}}, False),
        (1, {}, False),
    ],
)
def test_trials_of_an_earlier_measure_are_not_ranked_with_new_ones(
    tmp_path: Path, version: int, changes: dict[str, Any], refused: bool
) -> None:
    folder = begun(tmp_path, **changes)
    study = load_study(folder.config)
    ledger = open_ledger(folder, study)
    assert ledger.optuna_study.user_attrs["scores"] == 3
    if version > 1:
        ledger.optuna_study.set_user_attr("scores", version)
    with ledger.optuna_study._storage._backend._backend._backend.engine.begin() as database:  # type: ignore[attr-defined]
        if version == 1:
            database.execute(text("DELETE FROM study_user_attributes WHERE key = 'scores'"))
    ledger.close()
    other = tiny_study(tmp_path / "new", **changes)
    if not refused:
        assert read_prior(tmp_path, other).trials
        open_ledger(folder, study).close()
        return
    with pytest.raises(StudyError, match="was another measure"):
        open_ledger(folder, study)
    with pytest.raises(StudyError, match=r"search\.warm_start: .* was another measure"):
        read_prior(tmp_path, other)


@pytest.mark.long
@pytest.mark.usefixtures("password")
def test_a_copy_of_the_folder_does_not_drive_a_databases_study(
    tmp_path: Path, server: Server
) -> None:
    ledger = driver(tmp_path / "run", server.fresh())
    trial = ledger.ask()
    assert trial is not None
    ran(ledger, trial)
    ledger.close()
    study = load_study(RunFolder(tmp_path / "run").config)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with pytest.raises(StudyError, match=r"is a copy of .*/run, and both would drive"):
        open_ledger(RunFolder(tmp_path / "copy"), study)
    open_ledger(RunFolder(tmp_path / "run"), study).close()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    ledger = open_ledger(RunFolder(tmp_path / "moved"), study)
    assert len(ledger.trials()) == 1
    ledger.close()
