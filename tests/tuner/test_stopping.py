"""The stopping rules beside Ray Tune's own schedulers, and verdicts that outlive their driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.distributions import FloatDistribution
from optuna.storages import InMemoryStorage
from optuna.trial import create_trial
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule
from ray.tune.schedulers.trial_scheduler import TrialScheduler

from tests.tuner.support import tiny_study
from tuner.config import StudyConfig
from tuner.stopping import Halving, rule_of
from tuner.study import Ledger

EPOCHS = 11
Judge = Callable[[int, int, float], bool]  # trial, epoch, objective: whether it is stopped
Event = tuple[int, int, float]


def study_in(folder: Path, scheduler: str, **search: Any) -> StudyConfig:
    changes = {"scheduler": scheduler, "reduction_factor": 2, "trials": 400} | search
    return tiny_study(folder, search=changes, training={"epochs": EPOCHS})


class RayTrial:
    """As much of Ray's trial as its schedulers look at."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"ray-{number}"


def rays(scheduler: Any) -> Judge:
    """Ray's scheduler as a judge: asked before the last epoch, told of it then."""
    trials: dict[int, Any] = {}

    def stops(number: int, epoch: int, objective: float) -> bool:
        result = {"epoch": epoch, "objective": objective}
        if number not in trials:
            trials[number] = RayTrial(number)
            scheduler.on_trial_add(None, trials[number])
        if epoch == EPOCHS:
            scheduler.on_trial_complete(None, trials[number], result)
            return False
        decision = scheduler.on_trial_result(None, trials[number], result)
        return bool(decision == TrialScheduler.STOP)

    return stops


def asha(grace: int, factor: float) -> Any:
    return AsyncHyperBandScheduler(
        "epoch", "objective", "min", max_t=EPOCHS, grace_period=grace, reduction_factor=factor
    )


class PatientMedian(MedianStoppingRule):
    """Ray's rule, which pauses a trial for the sake of others while there are too few."""

    def _on_insufficient_samples(self, *_: Any) -> str:
        return str(TrialScheduler.CONTINUE)


def median(grace: int) -> Any:
    return PatientMedian("epoch", "objective", "min", grace_period=grace, min_samples_required=3)


def owns(ledger: Ledger) -> Judge:
    """The ledger as a judge."""

    def stops(number: int, epoch: int, objective: float) -> bool:
        stopped = ledger.report(number, {"epoch": epoch, "objective": objective}, "kept")
        if stopped:
            assert stopped == f"stopped after epoch {epoch}"
            ledger.finish(number, "pruned")
        elif epoch == EPOCHS:
            ledger.finish(number, "done", objective=objective)
        return stopped is not None

    return stops


def played(ledger: Ledger, judges: list[Judge], n_slots: int, n_trials: int) -> Iterator[bool]:
    """Trials side by side that report in a random order; each judge's verdict, which all share."""
    rng = np.random.default_rng(5)
    slots: list[list[Any]] = []
    begun = 0
    while begun < n_trials or slots:
        while begun < n_trials and len(slots) < n_slots:
            found = ledger.ask()
            assert found is not None
            slots.append([found.number, 0, rng.uniform(1.0, 2.0)])
            begun += 1
        slot = slots[rng.integers(len(slots))]
        slot[1] += 1
        slot[2] -= max(0.0, rng.normal(0.05, 0.1))  # not at every epoch
        verdicts = {judge(*slot) for judge in judges}
        assert len(verdicts) == 1, slot
        (stopped,) = verdicts
        yield stopped
        if stopped or slot[1] == EPOCHS:
            slots.remove(slot)


@pytest.mark.parametrize("n_slots", [1, 7])
@pytest.mark.parametrize(("grace", "factor"), [(1, 2), (2, 3), (3, 4)])
def test_asha_stops_whom_rays_does(tmp_path: Path, n_slots: int, grace: int, factor: int) -> None:
    study = study_in(tmp_path, "asha", grace_epochs=grace, reduction_factor=factor)
    ledger = Ledger(InMemoryStorage(), study)
    judges = [owns(ledger), rays(asha(grace, factor))]
    verdicts = list(played(ledger, judges, n_slots, 80))
    assert 0 < sum(verdicts) < 80


@pytest.mark.parametrize("n_slots", [1, 7])
@pytest.mark.parametrize("grace", [1, 3])
def test_the_median_rule_stops_whom_rays_does(tmp_path: Path, n_slots: int, grace: int) -> None:
    study = study_in(tmp_path, "median", grace_epochs=grace)
    ledger = Ledger(InMemoryStorage(), study)
    verdicts = list(played(ledger, [owns(ledger), rays(median(grace))], n_slots, 60))
    assert 0 < sum(verdicts) < 60


@pytest.mark.parametrize("n_slots", [1, 7])
def test_a_bracket_of_hyperband_stops_whom_an_asha_of_its_rungs_does(
    tmp_path: Path, n_slots: int
) -> None:
    study = study_in(tmp_path, "hyperband")
    rule = rule_of(study)
    assert isinstance(rule, Halving)
    each = [rays(asha(2**bracket, 2)) for bracket in range(4)]

    def stops(number: int, epoch: int, objective: float) -> bool:
        return each[rule.bracket_of(number)](number, epoch, objective)

    ledger = Ledger(InMemoryStorage(), study)
    verdicts = list(played(ledger, [owns(ledger), stops], n_slots, 120))
    assert 0 < sum(verdicts) < 120
    ends = {(rule.bracket_of(t.number), t.epoch) for t in ledger.trials() if t.state == "pruned"}
    assert {bracket for bracket, _ in ends} == {0, 1, 2, 3}
    assert all(epoch >= 2**bracket for bracket, epoch in ends)


def test_hyperbands_brackets_follow_from_number_and_seed_in_the_papers_shares(
    tmp_path: Path,
) -> None:
    rule = Halving(study_in(tmp_path, "hyperband"))
    again = Halving(study_in(tmp_path, "hyperband"))
    brackets = [rule.bracket_of(number) for number in range(2000)]
    assert brackets == [again.bracket_of(number) for number in range(2000)]
    other = Halving(study_in(tmp_path, "hyperband").replaced({"seed": 4}))
    assert brackets != [other.bracket_of(number) for number in range(2000)]
    # Of s = 3 .. 0: ceil(4 * 2^s / (s + 1)) = 8, 6, 4, 4 (Li et al. 2018, algorithm 1).
    for bracket, size in enumerate((8, 6, 4, 4)):
        assert brackets.count(bracket) / 2000 == pytest.approx(size / 22, abs=0.03)


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median"])
def test_who_is_as_good_as_the_others_is_not_stopped(tmp_path: Path, scheduler: str) -> None:
    ledger = Ledger(InMemoryStorage(), study_in(tmp_path, scheduler))
    judge = owns(ledger)
    for _ in range(12):
        found = ledger.ask()
        assert found is not None
        assert not any(judge(found.number, e, 1.3 - 0.1 * e) for e in range(1, EPOCHS + 1))


@pytest.mark.parametrize("scheduler", ["none", "asha-pausing", "pbt"])
def test_other_schedulers_have_no_rule(tmp_path: Path, scheduler: str) -> None:
    population = {"population": 4, "trials": 40} if scheduler == "pbt" else {}
    assert rule_of(study_in(tmp_path, scheduler, **population)) is None


def test_the_median_rule_needs_three_others_and_looks_at_ones_best(tmp_path: Path) -> None:
    ledger = Ledger(InMemoryStorage(), study_in(tmp_path, "median"))
    judge = owns(ledger)

    def played(*objectives: float) -> list[bool]:
        found = ledger.ask()
        assert found is not None
        return [judge(found.number, e, value) for e, value in enumerate(objectives, start=1)]

    for objective in (1.0, 2.0, 3.0):
        assert played(objective, objective) == [False, False], "too few to judge by"
    assert played(2.5) == [True]
    assert played(1.9, 9.0) == [False, False], "it has been better than the median"
    assert played(2.0) == [False], "equal is not worse"


@pytest.mark.parametrize("scheduler", ["asha", "hyperband", "median"])
def test_a_ledger_that_is_opened_again_judges_as_one_that_never_closed(
    tmp_path: Path, scheduler: str
) -> None:
    ends = []
    for closes in (False, True):
        folder = tmp_path / str(closes)
        study = study_in(folder, scheduler)
        rng = np.random.default_rng(1)
        ledger = Ledger(folder / "study.db", study)
        for _ in range(25):
            found = ledger.ask()
            assert found is not None
            value = rng.uniform(1.0, 2.0)
            for epoch in range(1, EPOCHS + 1):
                if rng.integers(12) == 0 and closes:
                    ledger.close()
                    ledger = Ledger(folder / "study.db", study)
                value -= rng.uniform(0.0, 0.1)
                if owns(ledger)(found.number, epoch, value):
                    break
        ends.append([(t.state, t.curve, t.reason) for t in ledger.trials()])
        ledger.close()
    assert ends[0] == ends[1]
    assert {"done", "pruned"} == {state for state, _, _ in ends[0]}


def worse_in(folder: Path) -> tuple[StudyConfig, Ledger, int]:
    """A study in which a second trial is worse than the first one at the first rung."""
    study = study_in(folder, "asha")
    ledger = Ledger(folder / "study.db", study)
    numbers = []
    for objective in (1.0, 2.0):
        found = ledger.ask()
        assert found is not None
        ledger.report(found.number, {"epoch": 1, "objective": objective}, "kept")
        numbers.append(found.number)
    return study, ledger, numbers[1]


def test_a_verdict_is_written_with_its_epoch_and_carried_out_by_the_next_driver(
    tmp_path: Path,
) -> None:
    study, ledger, number = worse_in(tmp_path)
    assert ledger.trial(number).state == "running"
    ledger.close()  # its driver died before it ended the trial
    reader = Ledger(tmp_path / "study.db", study, reading=True)
    assert reader.trial(number).state == "running", "who only looks ends nobody"
    reader.close()
    again = Ledger(tmp_path / "study.db", study)
    ended = again.trial(number)
    assert (ended.state, ended.reason) == ("pruned", "stopped after epoch 1")
    assert [orphan.number for orphan in again.orphans()] == [0]


def test_an_epoch_that_is_run_again_is_judged_as_it_was(tmp_path: Path) -> None:
    _, ledger, number = worse_in(tmp_path)
    assert ledger.report(number, {"epoch": 1, "objective": 0.5}), "it was stopped"
    assert ledger.report(number, {"epoch": 2, "objective": 0.5}), "and has not ended yet"
    # A machine was lost under the first one; others have been far better since.
    for _ in range(3):
        found = ledger.ask()
        assert found is not None
        ledger.report(found.number, {"epoch": 1, "objective": 0.1})
    assert ledger.report(0, {"epoch": 1, "objective": 1.0}) is None, "it was let go on"


def test_neither_a_last_epoch_nor_one_without_an_objective_is_judged(tmp_path: Path) -> None:
    _, ledger, _ = worse_in(tmp_path)
    found = ledger.ask()
    assert found is not None
    assert ledger.report(found.number, {"epoch": 1, "objective": float("nan")}) is None
    for epoch, more in ((2, {"early_stopped": True}), (EPOCHS, {})):
        ledger.report(0, {"epoch": epoch, "objective": 1.0})
        found = ledger.ask()
        assert found is not None
        worse = {"epoch": epoch, "objective": 5.0, **more}
        assert ledger.report(found.number, worse) is None


def test_a_failed_trial_is_compared_with_as_far_as_it_came(tmp_path: Path) -> None:
    _, ledger, number = worse_in(tmp_path)
    ledger.finish(0, "failed", reason="diverged")
    ledger.finish(number, "pruned")
    found = ledger.ask()
    assert found is not None
    assert ledger.report(found.number, {"epoch": 1, "objective": 1.8}), "1.0 and 2.0 came there"


def test_trials_of_an_earlier_study_are_in_no_rung(tmp_path: Path) -> None:
    beta = {"space": {"blend.beta": {"type": "float", "low": 0.0, "high": 0.6}}}
    ledger = Ledger(tmp_path / "study.db", study_in(tmp_path, "asha", **beta))
    for index in range(3):
        ledger.optuna_study.add_trial(
            create_trial(
                value=0.1,
                params={"blend.beta": index / 10},
                distributions={"blend.beta": FloatDistribution(0.0, 0.6)},
                user_attrs={"prior": f"x#{index}"},
                intermediate_values={1: 0.1},
            )
        )
    found = ledger.ask()
    assert found is not None
    assert ledger.report(found.number, {"epoch": 1, "objective": 5.0}) is None


def test_an_epoch_is_written_with_its_checkpoint_and_verdict_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path / "study.db", study_in(tmp_path, "asha"))
    numbers = []
    for _ in range(2):
        found = ledger.ask()
        assert found is not None
        numbers.append(found.number)
    ledger.report(numbers[0], {"epoch": 1, "objective": 1.0}, "kept")
    written: list[tuple[dict[int, float], set[str]]] = []

    def write_together(trial_id: int, values: dict[int, float], attrs: dict[str, Any]) -> None:
        written.append((values, set(attrs)))

    monkeypatch.setattr(ledger._storage, "write_together", write_together)
    monkeypatch.setattr(ledger._storage, "set_trial_user_attr", None)
    assert ledger.report(numbers[1], {"epoch": 1, "objective": 9.0}, "kept")
    assert written == [({1: 9.0}, {"epoch/00001", "checkpoint", "stopped"})]
