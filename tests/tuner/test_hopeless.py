"""Trials that are stopped for want of a chance to win: the ledger's verdict, whole searches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optuna.storages import InMemoryStorage

from tests.tuner.support import (
    FakeRun,
    run_here,
    tiny_study,
    trials_of,
    write_study,
)
from tuner.errors import ConfigError
from tuner.promotion import Promotion
from tuner.records import End
from tuner.study import Ledger

CHANCE = {"scheduler": "none", "least_chance": 0.05, "trials": 20}


def ledger_in(folder: Path, *curves: tuple[float, ...], **search: Any) -> Ledger:
    """A study whose trials have finished with these curves."""
    study = tiny_study(folder, search=CHANCE | search, training={"epochs": 3})
    ledger = Ledger(folder / "study.db", study)
    for curve in curves:
        finish(ledger, *curve)
    return ledger


def finish(ledger: Ledger, *curve: float) -> None:
    trial = ledger.ask()
    assert trial is not None
    for epoch, objective in enumerate(curve, start=1):
        ledger.report(trial.number, {"epoch": epoch, "objective": objective})
    ledger.finish(trial.number, "done", objective=curve[-1])


THREE = ((2.0, 1.5, 1.0), (2.2, 1.7, 1.2), (2.4, 1.9, 1.401))


def test_a_trial_that_falls_behind_is_hopeless_and_one_that_leads_is_not(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path, *THREE)
    assert ledger.hopeless(1, 1.9) is None
    assert ledger.hopeless(2, 1.5) is None
    assert "below 1 was" in str(ledger.hopeless(2, 30.0))


def test_three_trials_must_have_finished_at_this_budget(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path, *THREE[:2])
    running = ledger.ask()
    assert running is not None
    ledger.report(running.number, {"epoch": 1, "objective": 1.0})
    assert ledger.hopeless(1, 30.0) is None
    finish(ledger, *THREE[2])
    assert ledger.hopeless(1, 30.0) is not None
    ledger.close()
    study = tiny_study(tmp_path, search=CHANCE, training={"epochs": 4})
    longer = Ledger(tmp_path / "study.db", study)
    assert longer.hopeless(1, 30.0) is None


def test_grace_is_given_and_no_chance_is_asked_for_by_default(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path / "grace", *THREE, grace_epochs=2)
    assert ledger.hopeless(1, 30.0) is None
    assert ledger.hopeless(2, 30.0) is not None
    ledger = ledger_in(tmp_path / "default", *THREE, least_chance=0.0)
    assert ledger.hopeless(2, 30.0) is None


def test_who_may_be_promoted_goes_on(tmp_path: Path) -> None:
    curves = [(2.0 + 0.1 * n, 1.5 + 0.1 * n, 1.0 + 0.1 * n + 0.01 * (n % 2)) for n in range(6)]
    alone = ledger_in(tmp_path / "alone", *curves)
    assert alone.hopeless(2, 1.8) is not None
    promoting = ledger_in(tmp_path / "promoting", *curves, promote=5)
    assert promoting.hopeless(2, 1.8) is None
    assert promoting.hopeless(2, 2.3) is not None


def test_promoted_runs_are_not_stopped(tmp_path: Path) -> None:
    promotion = Promotion(ledger_in(tmp_path, *THREE, promote=2, promote_seeds=2))
    for curve in THREE:
        finish(promotion, *curve)
    assert promotion.hopeless(2, 30.0) is None


@pytest.mark.parametrize("scheduler", ["none", "asha"])
def test_a_local_search_stops_what_cannot_win_and_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    scheduler: str,
) -> None:
    monkeypatch.setattr("tuner.local.TrialRun", FakeRun)
    monkeypatch.setattr("tuner.conclusion._score_winner", lambda folder, study, progress: None)
    betas = [0.08, 0.04, 0.02, 0.5, 0.0, 0.55]  # the lower, the better
    config = write_study(
        tmp_path,
        training={"epochs": 5},
        search={
            "trials": len(betas),
            "reduction_factor": 4,
            "scheduler": scheduler,
            "least_chance": 0.05,
            "include_base": False,
            "enqueue": [{"blend.beta": beta} for beta in betas],
            "space": {"blend.beta": {"type": "float", "low": 0.0, "high": 0.6}},
        },
    )
    assert run_here("--config", config, "--local", "--out", tmp_path / "run") == 0
    trials = trials_of(tmp_path / "run")
    assert [t.state for t in trials] == ["done"] * 3 + ["pruned", "done", "pruned"]
    for number in (3, 5):
        assert "its chance to end below 0.2" in str(trials[number].reason)
        assert trials[number].epoch == 1
    assert [t.epoch for t in trials if t.state == "done"] == [5] * 4
    said = " ".join(capsys.readouterr().out.split())
    assert "trial 0003 pruned after epoch 1: its chance to end below 0.22 was " in said


def test_who_is_stopped_so_is_at_its_rung_for_those_who_come_after(tmp_path: Path) -> None:
    search = {"trials": 99, "scheduler": "asha", "least_chance": 0.05, "reduction_factor": 3}
    study = tiny_study(tmp_path, search=search, training={"epochs": 9})
    ledger = Ledger(InMemoryStorage(), study)

    def goes_on(*values: float) -> int:
        """A trial that reports these; how many epochs it was let train."""
        trial = ledger.ask()
        assert trial is not None
        for epoch, value in enumerate(values, start=1):
            stopped = ledger.report(trial.number, {"epoch": epoch, "objective": value})
            if stopped or epoch == 9:
                state: End = "done" if epoch == 9 else "pruned"
                ledger.finish(trial.number, state, objective=value if epoch == 9 else None)
                return epoch
        return len(values)

    ends = [goes_on(*(2.0 - 0.1 * n - 0.01 * n * e for e in range(9))) for n in range(5)]
    assert ends == [9] * 5, "each leads"
    assert [goes_on(*[5.0 + 0.01 * n] * 9) for n in range(15)] == [1] * 15
    # Among those five alone it would be too bad for its rung.
    assert goes_on(*(1.75 - 0.05 * e for e in range(9))) > 1


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ({"least_chance": 0.5}, "search.least_chance: got 0.5"),
        ({"least_chance": 0.05, "scheduler": "none", "cost": "flops"}, "search.cost: search.least"),
        (
            {"least_chance": 0.05, "scheduler": "pbt", "population": 4, "trials": 30},
            "search.least_chance: in a population the worst give way",
        ),
    ],
)
def test_where_it_would_mislead_it_is_refused(
    tmp_path: Path, search: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny_study(tmp_path, search=search, training={"epochs": 4})
    assert words in str(caught.value)
