from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial

from tests.tuner.support import tiny_study
from tuner.duration import format_duration, parse_duration
from tuner.errors import StudyError
from tuner.limits import Limits
from tuner.records import TrialRecord, record_of
from tuner.study import Ledger


def ledger_in(folder: Path, **search: Any) -> Ledger:
    return Ledger(folder / "study.db", tiny_study(folder, search=search))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("45s", 45), ("90m", 5400), ("1h30m", 5400), ("1.5h", 5400), ("2 d", 172800)],
)
def test_a_duration_is_read_with_and_without_units(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "1:30", "30m1h", "-5m", "2 hours"])
def test_another_form_of_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected seconds, or numbers with d, h, m or s"):
        parse_duration(text)


def test_a_duration_is_written_with_its_two_largest_units() -> None:
    written = [format_duration(value) for value in (0.25, 59.7, 3600, 5400, 90061, 86460)]
    assert written == ["0.25s", "1m", "1h", "1h30m", "1d1h", "1d"]


def test_time_counts_over_sessions_and_a_killed_one_forgets_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("tuner.limits.monotonic", lambda: now)
    first = Limits(ledger_in(tmp_path, time_budget=10))
    now = 5.0  # connecting to a cluster is not counted
    with first.counted():
        now = 9.0
    assert Limits(ledger_in(tmp_path)).seconds == 4.0
    killed = Limits(ledger_in(tmp_path, time_budget=10))
    with killed.counted():
        now += 5.9
        assert killed.reached() is None
        assert Limits(ledger_in(tmp_path)).seconds == pytest.approx(9.9)
        now += 0.2
        assert killed.reached() is not None


def test_a_trials_end_makes_a_record_of_the_winner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 10,000 trials of 27 epochs records of all took half a second at every trial's end."""
    made: list[int] = []

    def recorded(frozen: FrozenTrial) -> TrialRecord:
        made.append(frozen.number)
        return record_of(frozen)

    for target, expected in ((None, []), (0.1, [1])):
        ledger = ledger_in(tmp_path / str(target), trials=4, target=target)
        for objective in (2.0, 1.0, 1.0, 3.0):
            trial = ledger.ask()
            assert trial is not None
            ledger.report(trial.number, {"epoch": 1, "objective": objective})
            ledger.finish(trial.number, "done", objective=objective)
        limits = Limits(ledger)
        with monkeypatch.context() as patch:
            patch.setattr("tuner.study.record_of", recorded)
            made.clear()
            limits.look()
            assert made == expected
        assert ledger.best() == ledger.ranking()[0]


def test_a_running_trial_meets_no_target(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path, target=1.0)
    limits = Limits(ledger)
    trial = ledger.ask()
    assert trial is not None
    ledger.report(trial.number, {"epoch": 1, "objective": 0.5})
    limits.look()
    assert limits.reached() is None
    ledger.finish(trial.number, "done", objective=0.5)
    limits.look()
    ended = limits.reached()
    assert ended is not None
    assert "target 1 is reached (trial 0000 has 0.50000)" in ended.reason


def test_what_ends_the_trials_is_said_and_not_that_the_time_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = ledger_in(tmp_path)
    limits = Limits(ledger)

    def gone(seconds: float) -> None:
        raise OSError("attempt to write a readonly database")

    monkeypatch.setattr(ledger, "keep_seconds", gone)
    with pytest.raises(StudyError, match="the folder has gone"), limits.counted():
        raise StudyError("the folder has gone")
    with pytest.raises(OSError, match="readonly"), limits.counted():
        pass
