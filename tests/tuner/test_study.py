from __future__ import annotations

import math
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import InMemoryStorage

from tests.tuner.support import tiny_study
from tuner.records import Assignment, PriorTrial, trial_seed
from tuner.study import Ledger


def ledger_in(folder: Path, **changes: Any) -> Ledger:
    return Ledger(folder / "study.db", tiny_study(folder, **changes))


def asked(ledger: Ledger) -> Assignment:
    found = ledger.ask()
    assert found is not None
    return found


def run(ledger: Ledger, *objectives: float) -> int:
    """A trial that reports these objectives and stays running."""
    number = asked(ledger).number
    for epoch, objective in enumerate(objectives, start=1):
        ledger.report(number, {"epoch": epoch, "objective": objective})
    return number


def test_the_configurations_own_values_are_tried_first_then_the_enqueued(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path, search={"enqueue": [{"blend.beta": 0.55}]})
    first, second = asked(ledger), asked(ledger)
    assert first.params == ledger.config.base_point()
    assert second.params["blend.beta"] == 0.55


def test_no_more_trials_are_proposed_than_asked_for(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    numbers = [asked(ledger).number for _ in range(3)]
    assert numbers == [0, 1, 2]
    assert ledger.ask() is None


def test_a_study_can_be_extended(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path, search={"trials": 1})
    ledger.finish(run(ledger, 1.0), "done", objective=1.0)
    assert ledger.ask() is None
    ledger.close()
    longer = ledger_in(tmp_path, search={"trials": 2})
    assert asked(longer).number == 1
    assert longer.ask() is None


def test_seeds_differ_between_trials_and_follow_from_the_study_seed(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    seeds = [asked(ledger).seed for _ in range(3)]
    assert seeds == [trial_seed(3, number) for number in range(3)]
    assert len(set(seeds)) == 3
    assert trial_seed(4, 0) != trial_seed(3, 0)


def test_proposals_do_not_depend_on_where_a_session_began(tmp_path: Path) -> None:
    def propose(folder: Path, *, reopened: bool) -> list[dict[str, Any]]:
        folder.mkdir()
        ledger = ledger_in(folder, search={"trials": 6})
        found = []
        for index in range(6):
            if reopened:
                ledger.close()
                ledger = ledger_in(folder, search={"trials": 6})
            trial = asked(ledger)
            found.append(trial.params)
            ledger.finish(trial.number, "done", objective=1.0 + index)
        return found

    whole = propose(tmp_path / "whole", reopened=False)
    assert propose(tmp_path / "reopened", reopened=True) == whole
    assert len({repr(params) for params in whole}) == 6


def test_trap_a_crash_never_ranks_best(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    crashed, sound = run(ledger, 0.001), run(ledger, 2.0, 1.5)
    ledger.finish(crashed, "failed", reason="ValueError: crash", traceback="Traceback ...")
    ledger.finish(sound, "done", objective=1.5)
    assert [trial.number for trial in ledger.ranking()] == [sound]
    assert ledger.trial(crashed).reason == "ValueError: crash"


@pytest.mark.parametrize("objective", [math.nan, math.inf, -math.inf, None])
def test_a_trial_without_a_finite_objective_has_failed(
    tmp_path: Path, objective: float | None
) -> None:
    ledger = ledger_in(tmp_path)
    number = run(ledger, 2.0)
    assert ledger.finish(number, "done", objective=objective) == "failed"
    assert ledger.trial(number).state == "failed"
    assert "objective is" in str(ledger.trial(number).reason)
    assert ledger.best() is None


def test_trap_a_stopped_trial_is_pruned_with_its_steps_and_never_ranks(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    number = run(ledger, 3.0, 2.0)
    ledger.finish(number, "pruned", reason="stopped after epoch 2")
    frozen = ledger.optuna_study.trials[number]
    assert frozen.state.name == "PRUNED"
    assert frozen.intermediate_values == {1: 3.0, 2: 2.0}
    assert ledger.ranking() == []


def test_trials_of_another_budget_never_rank(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    ledger.finish(run(ledger, 1.0), "done", objective=1.0)
    ledger.close()
    longer = ledger_in(tmp_path, training={"epochs": 5})
    assert longer.ranking() == []
    ledger.close()


def test_an_epoch_that_is_run_again_replaces_its_record(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    number = run(ledger, 3.0, 2.0)
    ledger.report(number, {"epoch": 2, "objective": 2.5, "skipped_steps": 4})
    record = ledger.trial(number)
    assert record.curve == [(1, 3.0), (2, 2.5)]
    assert record.metrics["skipped_steps"] == 4
    assert ledger.optuna_study.trials[number].intermediate_values[2] == 2.5


def test_a_configuration_is_not_evaluated_twice(tmp_path: Path) -> None:
    space = {"network.heads": {"type": "categorical", "choices": [1, 2, 4]}}
    ledger = ledger_in(tmp_path, search={"trials": 50, "space": space, "sampler": "random"})
    proposed = []
    while (trial := ledger.ask()) is not None:
        proposed.append(trial.params["network.heads"])
        ledger.finish(trial.number, "done", objective=1.0)
    assert sorted(map(int, map(str, proposed))) == [1, 2, 4]
    assert len(ledger.trials()) == 3


def test_every_point_of_a_finite_space_is_found_by_a_sampler_that_repeats_itself(
    tmp_path: Path,
) -> None:
    choices = [8, 16, 24, 32, 40, 48]
    axis = {"type": "categorical", "choices": choices}
    space = {"training.batch_size": axis, "loss.decoys": axis}
    # An earlier study has tried some of the worst, which is no reason to leave them out.
    prior = [
        PriorTrial(f"earlier:{decoys}", {"training.batch_size": 48, "loss.decoys": decoys}, 99.0)
        for decoys in choices
    ]
    study = tiny_study(
        tmp_path, search={"trials": 36, "space": space, "sampler": "tpe", "include_base": False}
    )
    ledger = Ledger(InMemoryStorage(), study, lambda: prior)
    proposed = []
    while (trial := ledger.ask()) is not None:
        point = tuple(map(int, map(str, trial.params.values())))
        proposed.append(point)
        ledger.finish(trial.number, "done", objective=float(sum(point)))
    assert sorted(proposed) == sorted(product(choices, choices))
    rejected = len(ledger.optuna_study.trials) - len(prior) - len(proposed)
    assert 0 < rejected <= 3 * len(proposed), "it is asked three times, then chance is"


def test_a_point_is_the_same_however_its_steps_were_rounded(tmp_path: Path) -> None:
    axis = {"type": "float", "low": 0.1, "high": 0.8, "step": 0.1}
    space = {"blend.beta": axis, "blend.shrinkage": axis}
    search = {"trials": 64, "space": space, "sampler": "random", "include_base": False}
    search["enqueue"] = [
        {"blend.beta": 0.3, "blend.shrinkage": 0.6}
    ]  # 0.30000000000000004 of Optuna
    ledger = Ledger(InMemoryStorage(), tiny_study(tmp_path, search=search))
    proposed = []
    while (trial := ledger.ask()) is not None:
        proposed.append(tuple(round(10 * float(str(value))) for value in trial.params.values()))
        ledger.finish(trial.number, "done", objective=1.0)
    assert sorted(proposed) == sorted(product(range(1, 9), range(1, 9)))


@pytest.mark.slow
def test_a_sampler_that_has_found_the_best_corner_does_not_end_the_study(tmp_path: Path) -> None:
    axis = {"type": "float", "low": 0.0, "high": 1.0}
    search = {
        "trials": 20,
        "sampler": "gp",
        "startup_trials": 4,
        "include_base": False,
        "space": {"loss.existence": axis, "loss.position": axis},
    }
    ledger = Ledger(InMemoryStorage(), tiny_study(tmp_path, search=search))
    proposed = []
    while (trial := ledger.ask()) is not None:
        proposed.append(trial.params)
        objective = float(sum(map(float, map(str, trial.params.values()))))
        ledger.finish(trial.number, "done", objective=objective)
    assert len(proposed) == 20
    assert {"loss.existence": 0.0, "loss.position": 0.0} in proposed, "the corner was not found"


def test_running_trials_come_back_with_number_parameters_seed_and_checkpoint(
    tmp_path: Path,
) -> None:
    ledger = ledger_in(tmp_path)
    first, second = asked(ledger), asked(ledger)
    ledger.report(first.number, {"epoch": 1, "objective": 2.0}, "/kept/checkpoint")
    ledger.close()
    again = ledger_in(tmp_path)
    orphans = again.orphans()
    assert orphans == [
        Assignment(first.number, first.params, first.seed, "/kept/checkpoint", 1),
        second,
    ]
    again.finish(first.number, "done", objective=1.0)
    assert [orphan.number for orphan in again.orphans()] == [second.number]


def test_judging_and_resuming_a_trial_ask_the_sampler_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = ledger_in(tmp_path)
    number = run(ledger, 1.0)

    def asked_again(*arguments: Any) -> None:
        raise AssertionError("the sampler was asked for a trial that has its parameters")

    monkeypatch.setattr(ledger.optuna_study.sampler, "infer_relative_search_space", asked_again)
    ledger.report(number, {"epoch": 2, "objective": 1.0})
    assert [orphan.number for orphan in ledger.orphans()] == [number]


def test_every_epoch_is_kept_with_the_time_of_its_report_and_no_metric_more(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    before = time.time()
    number = run(ledger, 1.0, 0.5)
    trial = ledger.trial(number)
    assert list(trial.reported) == [1, 2]
    assert before <= trial.reported[1] <= trial.reported[2] <= time.time()
    assert trial.epochs == {1: {"epoch": 1, "objective": 1.0}, 2: {"epoch": 2, "objective": 0.5}}


def test_who_only_reads_proposes_nothing(tmp_path: Path) -> None:
    study = tiny_study(tmp_path)
    with pytest.raises(KeyError):  # there is no study, and looking makes none
        Ledger(tmp_path / "study.db", study, reading=True)
    ledger = ledger_in(tmp_path)
    before = ledger.optuna_study.get_trials()
    reader = Ledger(tmp_path / "study.db", study, reading=True)
    assert reader.optuna_study.get_trials() == before
    assert asked(ledger).params == study.base_point()
    assert reader.trials() == []  # it has looked
    again = Ledger(tmp_path / "study.db", study, reading=True)
    assert [trial.number for trial in again.trials()] == [0]


def test_a_trials_seconds_and_fallbacks_are_those_of_all_its_epochs(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    trial = asked(ledger)
    assert ledger.trial(trial.number).gpu_seconds is None
    for epoch, fallbacks in ((1, 3), (2, 9), (2, 4)):  # the second one is run again
        metrics = {"epoch": epoch, "objective": 1.0, "epoch_seconds": 2.0, "gpu_seconds": 0.5}
        ledger.report(trial.number, {**metrics, "solver_fallbacks": fallbacks})
    found = ledger.trial(trial.number)
    assert (found.seconds, found.gpu_seconds, found.fallbacks) == (4.0, 1.0, 7)
