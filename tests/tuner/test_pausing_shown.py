"""What is said and shown of trials that wait: report, live table, forecasts, a note."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.tuner.pausing import EPOCHS, study_in
from tuner.appraisal import epochs_expected
from tuner.folder import RunFolder
from tuner.forecast import Pace, time_left
from tuner.ledger import open_ledger, read_ledger
from tuner.liveview import StudyView
from tuner.pages.material import Material
from tuner.report import page
from tuner.rows import TrialRow
from tuner.rungs import epochs_in_all
from tuner.standing import StudyState, standing
from tuner.status import _show
from tuner.storage import PatientStorage


def waiting_study(folder: Path, waiting: int, **search: Any) -> RunFolder:
    """A run folder whose trials have gone to a rung so many times, and wait there."""
    study = study_in(folder, **search)
    run = RunFolder.fresh(folder / "run")
    run.config.write_text(study.to_yaml())
    ledger = open_ledger(run, study)
    for index in range(waiting):
        found = ledger.ask()
        assert found is not None
        ledger.report(found.number, {"epoch": found.epoch + 1, "objective": index + 1.0}, "at")
        ledger.hand_back(found.number)
    ledger.close()
    run.release()
    return run


def test_a_report_and_a_forecast_know_of_those_who_wait(tmp_path: Path) -> None:
    folder, study = waiting_study(tmp_path, 3), study_in(tmp_path)
    ledger = read_ledger(folder, study)
    text = page(Material.read(folder, ledger))
    assert "ASHA with pauses" in text
    assert "waits here" in text
    assert "could not be drawn" not in text
    ledger.close()
    assert epochs_expected(study.search, EPOCHS) == (1 + 1 / 2 + 2 / 4 + 4 / 8 + 1 / 16, EPOCHS)


def test_to_look_at_a_study_is_to_read_its_trials_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trials that wait are running to Optuna, which reads those anew whenever it is asked."""
    run = waiting_study(tmp_path, 5)
    reads: list[str] = []
    for name in ("get_all_trials", "get_trial"):
        read = getattr(PatientStorage, name)

        def counted(
            self: Any, *arguments: Any, of: Any = read, name: str = name, **rest: Any
        ) -> Any:
            reads.append(name)
            return of(self, *arguments, **rest)

        monkeypatch.setattr(PatientStorage, name, counted)
    look = standing(run.path)
    assert look.counts()["running"] == 4  # one went on
    assert reads == ["get_all_trials"]
    assert standing(run.path).counts() == look.counts()
    assert reads == ["get_all_trials"] * 2


@pytest.mark.parametrize("state", ["running", "interrupted"])
def test_a_look_says_how_many_wait(tmp_path: Path, state: StudyState) -> None:
    look = replace(standing(waiting_study(tmp_path, 4).path), state=state)
    stream = io.StringIO()
    _show(look, Console(file=stream, width=120, force_terminal=False))
    wanted = {"running": "3 running (3 of them waiting)", "interrupted": "3 to go on"}
    assert f"trials: {wanted[state]}, 0 done" in stream.getvalue()


def test_the_live_table_shows_who_trains_before_who_waits(tmp_path: Path) -> None:
    study = study_in(tmp_path, trials=60)
    rows = []
    for number in range(50):
        row = TrialRow(number, {}, epoch=1, objective=float(number))
        row.metrics = {"scenes_per_second": 100.0}
        if number < 48:
            row.wait()
        rows.append(row)
    stream = io.StringIO()
    Console(file=stream, width=120, height=30, force_terminal=False).print(
        StudyView(study, rows, 10.0)
    )
    text = stream.getvalue()
    shown = re.findall(r"^ *(\d{4}) ", text, re.MULTILINE)
    assert shown[:3] == ["0048", "0049", "0000"]
    assert "50 running (48 of them waiting)" in text
    assert "200 scenes/s" in text


def test_a_forecast_counts_no_more_points_than_there_are(tmp_path: Path) -> None:
    space = {"network.heads": {"type": "categorical", "choices": [2, 4]}}
    assert epochs_in_all(study_in(tmp_path, trials=99, space=space).search, EPOCHS) == 2 + 8
    late = [Pace("pruned", 9, (2.0,) * 9)]
    assert time_left(late, epochs=9, n_new=3, elapsed=18.0, in_all=9) == pytest.approx(6.0)
