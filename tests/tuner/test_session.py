"""What begins, extends and ends a session, whoever runs the trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tuner.support import run_here, write_study
from tuner.config import load_study
from tuner.study import Ledger, TrialRecord


@pytest.fixture(autouse=True)
def unscored(monkeypatch: pytest.MonkeyPatch) -> None:
    """No winner is compared with NOMP: that takes longer than the trials here."""
    monkeypatch.setattr("tuner.session._score_winner", lambda folder, progress: None)


def trials_of(folder: Path) -> list[TrialRecord]:
    ledger = Ledger(folder / "study.db", load_study(folder / "config.yaml"))
    try:
        return ledger.trials()
    finally:
        ledger.close()


def outcomes(folder: Path) -> list[Any]:
    return [(t.number, t.state, t.seed, t.params, t.curve) for t in trials_of(folder)]


def test_a_study_that_was_extended_is_the_study_that_was_begun_so_large(tmp_path: Path) -> None:
    config = write_study(tmp_path)
    assert run_here("--config", config, "--local", "--trials", 3, "--out", tmp_path / "whole") == 0
    assert run_here("--config", config, "--local", "--trials", 2, "--out", tmp_path / "grown") == 0
    assert run_here("--resume", tmp_path / "grown", "--local", "--trials", 3) == 0
    assert outcomes(tmp_path / "grown") == outcomes(tmp_path / "whole")
    assert len({repr(trial.params) for trial in trials_of(tmp_path / "grown")}) == 3
    assert load_study(tmp_path / "grown" / "config.yaml").search.trials == 3


def test_a_study_with_nothing_left_connects_to_no_cluster(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = ("--address", "127.0.0.1:1")
    space = {"network.heads": {"type": "categorical", "choices": [1, 2]}}
    config = write_study(tmp_path, search={"space": space})
    out = tmp_path / "run"
    assert run_here("--config", config, "--local", "--trials", 1, "--out", out) == 0
    (out / "report.html").unlink()
    capsys.readouterr()
    assert run_here("--resume", out, *nowhere) == 0
    assert "nothing is left to run" in capsys.readouterr().out
    assert (out / "report.html").exists()
    assert run_here("--resume", out, *nowhere, "--trials", 2) == 2, "work is left"
    assert load_study(out / "config.yaml").search.trials == 1
    assert run_here("--resume", out, "--local", "--trials", 9) == 0
    assert run_here("--resume", out, *nowhere) == 0, "the space is used up"
