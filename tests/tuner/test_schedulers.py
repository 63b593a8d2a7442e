from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from tests.tuner.support import tiny_study
from tuner.schedulers import LedgerASHA, LedgerHyperband, LedgerMedian, make_scheduler
from tuner.study import Ledger
from tuner.trainable import NUMBER


class RayTrial:
    """As much of Ray's trial as schedulers look at."""

    def __init__(self, trial_id: str, config: dict[str, Any]) -> None:
        self.trial_id, self.config = trial_id, config


ASHA: dict[str, Any] = {"trials": 20, "reduction_factor": 2}  # and eight epochs


def ledger_in(folder: Path, **search: Any) -> Ledger:
    return Ledger(folder / "study.db", tiny_study(folder, search=search, training={"epochs": 8}))


def epoch(number: int, objective: float, **more: Any) -> dict[str, Any]:
    return {"epoch": number, "objective": objective, "failed": False, "finished": False, **more}


def test_no_scheduler_is_pickled_with_rays_snapshots(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    for judge in (LedgerASHA(ledger), LedgerHyperband(ledger), LedgerMedian(ledger)):
        assert isinstance(pickle.loads(pickle.dumps(judge)), str)


def play(scheduler: Any, number: int, objectives: list[float]) -> list[str]:
    """Ray's calls for one trial; the decision after each epoch."""
    trial: Any = RayTrial(trial_id=f"ray-{number}", config={NUMBER: number})
    scheduler.on_trial_add(None, trial)
    decisions = []
    for index, objective in enumerate(objectives, start=1):
        decisions.append(scheduler.on_trial_result(None, trial, epoch(index, objective)))
        if decisions[-1] == "STOP":
            break
    return decisions


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median"])
def test_what_a_scheduler_judges_by_is_rebuilt_from_the_ledger(
    tmp_path: Path, scheduler: str
) -> None:
    ledger = ledger_in(tmp_path, **ASHA, scheduler=scheduler)
    alive = make_scheduler(ledger)
    curves = [[5.0, 4.0, 3.0, 2.0], [6.0], [4.0, 3.5, 3.2, 1.0], [4.5, 3.0], [5.5, 5.0], [7.0, 6.0]]
    for curve in curves:
        found = ledger.ask()
        assert found is not None
        decisions = play(alive, found.number, curve)
        for index, objective in enumerate(curve[: len(decisions)], start=1):
            ledger.report(found.number, {"epoch": index, "objective": objective})
        ledger.finish(found.number, "pruned")
    rebuilt = make_scheduler(ledger)
    assert state_of(rebuilt) == state_of(alive)
    assert any(state_of(alive).values())
    verdicts = set()
    for number in range(90, 96):  # hyperband sends them to its several brackets
        for objective in (3.2, 9.0):
            judged = [play(known, number, [objective] * 4) for known in (alive, rebuilt)]
            assert judged[0] == judged[1]
            verdicts |= set(judged[0])
    assert verdicts == {"STOP", "CONTINUE"}


def state_of(scheduler: Any) -> dict[Any, Any]:
    """What it judges by, whatever the trials are called."""
    if isinstance(scheduler, LedgerMedian):
        return {"results": sorted(scheduler.results.values())}
    return {rung: sorted(recorded.values()) for rung, recorded in scheduler.rungs.items()}


def test_hyperband_spares_trials_longer_in_every_bracket(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path, **ASHA, scheduler="hyperband")
    scheduler = LedgerHyperband(ledger)
    brackets = [scheduler.bracket_of(number) for number in range(60)]
    assert brackets == [LedgerHyperband(ledger).bracket_of(number) for number in range(60)]
    shares = [brackets.count(bracket) for bracket in range(4)]
    assert shares[0] == max(shares)
    assert min(shares) > 0
    stopped: dict[int, set[int]] = {}
    for number, bracket in enumerate(brackets):  # each is worse than all before it
        decisions = play(scheduler, number, [10.0 + number] * 7)
        stopped.setdefault(bracket, set()).add(len(decisions) if "STOP" in decisions else 8)
    # The first trial of a bracket has nobody to be worse than; the others end at its first rung.
    assert stopped == {0: {8, 1}, 1: {8, 2}, 2: {8, 4}, 3: {8}}


def test_the_median_rule_needs_three_others_and_counts_an_epoch_once(tmp_path: Path) -> None:
    scheduler = LedgerMedian(ledger_in(tmp_path, **ASHA, scheduler="median"))
    for number, objective in enumerate((1.0, 2.0, 3.0)):
        assert play(scheduler, number, [objective] * 2) == ["CONTINUE"] * 2, "too few to judge by"
    assert play(scheduler, 3, [2.5]) == ["STOP"]
    assert play(scheduler, 4, [1.9, 1.9]) == ["CONTINUE"] * 2
    trial: Any = RayTrial(trial_id="ray-5", config={NUMBER: 5})
    scheduler.on_trial_add(None, trial)
    for number, objective in ((1, 2.0), (2, 1.5), (1, 2.0)):  # a lost machine
        scheduler.on_trial_result(None, trial, epoch(number, objective))
    assert scheduler.results["ray-5"] == [(1, 2.0)]
    scheduler.on_trial_complete(None, trial, epoch(1, 2.0))
    assert scheduler.results["ray-5"] == [(1, 2.0)]


def test_a_resumed_trial_is_compared_by_its_own_name_and_from_its_checkpoint(
    tmp_path: Path,
) -> None:
    ledger = ledger_in(tmp_path, **ASHA, scheduler="median")
    found = ledger.ask()
    assert found is not None
    for index, objective in enumerate([5.0, 4.0, 3.0], start=1):
        kept = "/kept" if index == 1 else None
        ledger.report(found.number, {"epoch": index, "objective": objective}, kept)
    rebuilt = LedgerMedian(ledger)
    trial: Any = RayTrial(trial_id="ray-7", config={NUMBER: found.number})
    rebuilt.on_trial_add(None, trial)
    assert rebuilt.results == {"ray-7": [(1, 5.0)]}


def test_a_resumed_trial_keeps_its_rungs_and_is_judged_again_after_its_checkpoint(
    tmp_path: Path,
) -> None:
    ledger = ledger_in(tmp_path, **ASHA)
    found = ledger.ask()
    assert found is not None
    for index, objective in enumerate([5.0, 4.0, 3.0], start=1):
        kept = "/kept" if index == 1 else None
        ledger.report(found.number, {"epoch": index, "objective": objective}, kept)
    rebuilt = LedgerASHA(ledger)
    assert [len(recorded) for recorded in rebuilt.rungs.values()] == [0, 0, 0, 1]
    trial: Any = RayTrial(trial_id="ray-7", config={NUMBER: found.number})
    rebuilt.on_trial_add(None, trial)
    rebuilt.on_trial_result(None, trial, epoch(2, 4.0))
    names = [set(recorded) for recorded in rebuilt.rungs.values()]
    assert names == [set(), set(), {"ray-7"}, {"ray-7"}]


def test_a_failed_result_is_judged_by_nobody(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path, **ASHA)
    judges: list[Any] = [LedgerASHA(ledger), LedgerMedian(ledger)]
    for judge in judges:
        for call in ("on_trial_result", "on_trial_complete"):
            trial: Any = RayTrial(trial_id=call, config={NUMBER: 0})
            judge.on_trial_add(None, trial)
            getattr(judge, call)(None, trial, epoch(1, float("nan"), failed=True))
        assert not any(state_of(judge).values())


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median"])
def test_a_trial_that_goes_on_as_another_of_rays_is_judged_once(
    tmp_path: Path, scheduler: str
) -> None:
    judges = []
    for restarts in (False, True):
        ledger = ledger_in(tmp_path / str(restarts), **ASHA, scheduler=scheduler)
        judge: Any = make_scheduler(ledger)
        for number in (1, 2, 3):
            play(judge, number, [4.0 + number] * 4)
        trial: Any = RayTrial("ray-0", {NUMBER: 0})
        judge.on_trial_add(None, trial)
        decisions = []
        for index, objective in enumerate([5.5, 5.2, 4.9, 4.8], start=1):
            if index == 3 and restarts:  # its actor died while it took it; an epoch is run again
                judge.on_trial_remove(None, trial)
                trial = RayTrial("ray-0b", {NUMBER: 0})
                judge.on_trial_add(None, trial)
                decisions.append(judge.on_trial_result(None, trial, epoch(2, 5.2)))
            decisions.append(judge.on_trial_result(None, trial, epoch(index, objective)))
        judges.append((set(decisions), sorted(map(sorted, values_of(judge)))))
    assert judges[0] == judges[1]
    assert any(judges[0][1])


def values_of(judge: Any) -> list[list[float]]:
    """What is compared with, whoever it is of."""
    if isinstance(judge, LedgerMedian):
        return [[objective for _, objective in curve] for curve in judge.results.values()]
    return [list(recorded.values()) for recorded in judge.rungs.values()]
