from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.tuner.support import tiny_study
from tuner.command import execute
from tuner.report import app, page
from tuner.study import Ledger


def ledger_with(folder: Path, *ends: str, **changes: Any) -> Ledger:
    search = {"trials": 20, "sampler": "random"}
    study = tiny_study(folder, search=search, **changes)
    (folder / "config.yaml").write_text(study.to_yaml())
    ledger = Ledger(folder / "study.db", study)
    for index, end in enumerate(ends):
        trial = ledger.ask()
        assert trial is not None
        objective = 2.0 - 0.1 * index
        ledger.report(trial.number, {"epoch": 1, "objective": objective, "skipped_steps": index})
        if end == "done":
            ledger.finish(trial.number, "done", objective=objective)
        elif end in ("pruned", "failed"):
            ledger.finish(trial.number, end, reason="<b>because</b>")  # type: ignore[arg-type]
    return ledger


@pytest.mark.parametrize(
    "ends",
    [
        (),
        ("running",),
        ("failed", "failed"),
        ("done",),
        ("done", "done", "pruned"),
        ("done", "failed", "done", "pruned", "done", "done", "running", "done"),
    ],
    ids=len,
)
def test_a_page_is_drawn_whatever_has_finished(tmp_path: Path, ends: tuple[str, ...]) -> None:
    text = page(ledger_with(tmp_path, *ends))
    assert "Cannot be drawn" not in text
    assert ("No trial has finished" in text) == ("done" not in ends)
    assert ("Importance of the parameters" in text) == (ends.count("done") >= 3)
    for number in range(len(ends)):
        assert f"<td>{number:04d}</td>" in text


@pytest.mark.parametrize(
    ("objective", "words"),
    [("nmse", "validation NMSE of R_pred"), ("f1", "1 - F1"), ("gospa", "validation GOSPA [m]")],
)
def test_the_page_says_what_was_minimised(tmp_path: Path, objective: str, words: str) -> None:
    text = page(ledger_with(tmp_path, "done", objective=objective))
    assert words in text
    assert ("NMSE of R_pred" in text) == (objective == "nmse")


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    text = page(ledger_with(tmp_path, "done", "done", "done", "done"))
    assert "Plotly.newPlot" in text
    assert not re.search(r"<(?:script|link|img)[^>]*(?:src|href)=", text)


def test_reasons_are_shown_as_text(tmp_path: Path) -> None:
    text = page(ledger_with(tmp_path, "failed"))
    assert "&lt;b&gt;because&lt;/b&gt;" in text
    assert "<b>because</b>" not in text


def test_the_command_writes_the_page_beside_the_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger_with(tmp_path, "done").close()
    assert execute(app, [str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert execute(app, [str(tmp_path / "absent")]) == 2
    assert "no such folder" in capsys.readouterr().err
