"""Searches in virtual time, beside a clock that is stepped second by second."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from benchmarks._simulator import (
    DriverCost,
    MedianPruned,
    MemoryLedger,
    PlainLedger,
    Run,
    Span,
    WaitingLedger,
    simulate,
)
from benchmarks._surrogate import Curve
from tests.tuner.support import tiny_study
from tuner.records import Assignment

EPOCHS = 9


def ledger_of(
    folder: Path, kind: type[MemoryLedger] = MemoryLedger, seed: int = 3, **search: Any
) -> MemoryLedger:
    changes = {"trials": 12, "sampler": "random", "reduction_factor": 3} | search
    return kind(tiny_study(folder, search=changes, training={"epochs": EPOCHS}, seed=seed))


def curve_of(assignment: Assignment) -> Curve:
    """Whole seconds, so that a clock can be stepped; the objective falls, in another order."""
    rng = np.random.default_rng(assignment.number)
    objective = rng.uniform(1.0, 2.0) + np.sort(rng.uniform(0.0, 0.5, EPOCHS))[::-1]
    return Curve(objective, rng.integers(1, 8, EPOCHS).astype(float))


def stepped(trials: int, gpus: int, ask: int, report: int, end: int) -> list[tuple[int, ...]]:
    """(number, GPU, start, end) of trials that nobody stops, by a clock of whole seconds."""
    queue: deque[tuple[str, int]] = deque(("ask", gpu) for gpu in range(gpus))
    left = [0] * gpus  # seconds of the epoch under way
    trial: list[tuple[int, int, int] | None] = [None] * gpus  # number, epochs done, start
    at_work: tuple[str, int] | None = None
    work = now = asked = 0
    spans = []
    while asked < trials or any(trial) or queue or at_work:
        while True:  # all that the driver can do in no time, and the start of what takes some
            if at_work and work == 0:
                task, gpu = at_work
                at_work = None
                if task == "ask" and asked < trials:
                    trial[gpu] = (asked, 0, now)
                    left[gpu] = int(curve_of(Assignment(asked, {}, 0)).seconds[0])
                    asked += 1
                elif task == "end":
                    queue.appendleft(("ask", gpu))
                elif task == "report":
                    number, done, start = trial[gpu]  # type: ignore[misc]
                    if done == EPOCHS:
                        trial[gpu] = None
                        queue.appendleft(("end", gpu))
                    else:
                        left[gpu] = int(curve_of(Assignment(number, {}, 0)).seconds[done])
            elif not at_work and queue:
                at_work = queue.popleft()
                costs = {"ask": ask if asked < trials else 0, "report": report, "end": end}
                work = costs[at_work[0]]
            else:
                break
        now += 1
        work = max(0, work - 1)
        for gpu in range(gpus):
            if left[gpu]:
                left[gpu] -= 1
                if not left[gpu]:
                    number, done, start = trial[gpu]  # type: ignore[misc]
                    trial[gpu] = (number, done + 1, start)
                    if done + 1 == EPOCHS:
                        spans.append((number, gpu, start, now))
                    queue.append(("report", gpu))
    return spans


@pytest.mark.parametrize("gpus", [1, 2, 5])
@pytest.mark.parametrize("costs", [(0, 0, 0), (2, 0, 0), (1, 1, 3), (5, 2, 1)])
def test_virtual_time_is_that_of_a_clock_stepped_by_seconds(
    tmp_path: Path, gpus: int, costs: tuple[int, int, int]
) -> None:
    ask, report, end = costs
    ledger = ledger_of(tmp_path, scheduler="none")
    cost = DriverCost(ask=lambda n: ask, report=report, end=lambda n: end)
    run = simulate(ledger, curve_of, gpus=gpus, cost=cost)
    found = [(s.number, s.gpu, s.start, s.end) for s in run.spans]
    expected = stepped(12, gpus, ask, report, end)
    assert [(n, s, e) for n, _, s, e in sorted(found)] == [
        (n, s, e) for n, _, s, e in sorted(expected)
    ]
    assert found == expected


def test_one_gpu_and_no_scheduler_cost_the_sum_of_all_epochs(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, scheduler="none")
    run = simulate(ledger, curve_of, gpus=1)
    total = sum(curve_of(Assignment(number, {}, 0)).seconds.sum() for number in range(12))
    assert run.seconds == run.busy == run.gpu_seconds == total
    assert run.idle == 0
    assert [span.number for span in run.spans] == list(range(12))
    assert {span.state for span in run.spans} == {"done"}


def searched(folder: Path, seed: int = 3, gpus: int = 3, **search: Any) -> Run:
    ledger = ledger_of(folder, seed=seed, scheduler="asha", **{"trials": 40} | search)
    return simulate(ledger, curve_of, gpus=gpus)


def test_a_gpu_never_runs_two_trials_at_once_and_every_trial_runs_once(tmp_path: Path) -> None:
    run = searched(tmp_path)
    assert sorted(span.number for span in run.spans) == list(range(40))
    for gpu in range(3):
        spans = sorted((s.start, s.end) for s in run.spans if s.gpu == gpu)
        assert all(start >= end for (_, end), (start, _) in pairwise(spans))
    assert run.busy == sum(span.busy for span in run.spans) <= run.gpu_seconds
    assert {span.epochs for span in run.spans} == {1, 3, 9}


@pytest.mark.parametrize("gpus", [1, 3])
def test_trials_that_wait_hold_no_gpu_and_pay_for_no_epoch_twice(tmp_path: Path, gpus: int) -> None:
    study = ledger_of(tmp_path, scheduler="asha-pausing", trials=27).config
    ledger = WaitingLedger(study)
    run = simulate(ledger, curve_of, gpus=gpus)
    assert sorted(span.number for span in run.spans) == list(range(27))
    assert not run.waiting
    trained = {span.number: curve_of(Assignment(span.number, {}, 0)) for span in run.spans}
    assert run.busy == sum(trained[s.number].seconds[: s.epochs].sum() for s in run.spans)
    assert [s.state for s in run.spans if s.epochs < EPOCHS] == ["pruned"] * (
        27 - len(list(run.done()))
    )
    last = {t.number: (t.state, t.epoch, t.curve[-1][1]) for t in ledger.trials()}
    assert last == {s.number: (s.state, s.epochs, s.objective) for s in run.spans}
    if gpus == 1:  # one in three at least goes on, and hardly more
        assert run.gpu_seconds == run.busy
        assert sum(s.epochs > 1 for s in run.spans) in range(9, 13)
    cut = WaitingLedger(study)
    half = simulate(cut, curve_of, gpus=gpus, gpu_seconds=run.gpu_seconds / 2)
    ended = {span.number for span in half.spans}
    assert half.waiting.keys() & ended == set()
    assert len(half.waiting) > 3


def test_a_seed_decides_everything(tmp_path: Path) -> None:
    tpe = {"sampler": "tpe", "startup_trials": 4}

    def proposed(seed: int) -> list[Any]:
        ledger = ledger_of(tmp_path, seed=seed, scheduler="asha", **tpe)
        run = simulate(ledger, curve_of, gpus=2)
        return [run.spans, [trial.params for trial in ledger.trials()]]

    assert proposed(3) == proposed(3)
    assert proposed(3)[1] != proposed(4)[1]


@pytest.mark.parametrize(
    ("kind", "told"), [(MemoryLedger, TrialState.PRUNED), (PlainLedger, TrialState.COMPLETE)]
)
def test_stopped_trials_are_told_as_the_ledger_tells_them(
    tmp_path: Path, kind: type[MemoryLedger], told: TrialState
) -> None:
    ledger = ledger_of(tmp_path, kind, scheduler="asha", trials=20)
    run = simulate(ledger, curve_of, gpus=1)
    states = {trial.number: trial for trial in ledger.optuna_study.trials}
    stopped = [span for span in run.spans if span.state == "pruned"]
    assert stopped
    for span in run.spans:
        trial = states[span.number]
        assert trial.state == (TrialState.COMPLETE if span.state == "done" else told)
        assert trial.last_step == span.epochs
        assert trial.intermediate_values[span.epochs] == span.objective
        if trial.state == TrialState.COMPLETE:
            assert trial.value == span.objective
    assert run.best() == min(s.objective for s in run.spans if s.epochs == EPOCHS)


@pytest.mark.parametrize(("kind", "scheduler"), [(MemoryLedger, "median"), (MedianPruned, "none")])
def test_a_median_rule_saves_epochs(
    tmp_path: Path, kind: type[MemoryLedger], scheduler: str
) -> None:
    ledger = ledger_of(tmp_path, kind, scheduler=scheduler, trials=20)
    run = simulate(ledger, curve_of, gpus=1)
    assert 0 < sum(span.state == "pruned" for span in run.spans) < 20
    assert run.seconds == sum(span.busy for span in run.spans)


def test_the_measure_stops_whom_optunas_median_pruner_does(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, MedianPruned, scheduler="none", trials=20)
    simulate(ledger, curve_of, gpus=1)
    plain = optuna.create_study(pruner=optuna.pruners.MedianPruner(3, 1, n_min_trials=3))
    expected = []
    for number in range(20):
        trial, last = plain.ask(), 0
        for last, value in enumerate(curve_of(Assignment(number, {}, 0)).objective, start=1):
            trial.report(value, last)
            if last < EPOCHS and trial.should_prune():
                plain.tell(trial, state=TrialState.PRUNED)
                break
        else:
            plain.tell(trial, value)
        expected.append(last)
    assert [trial.epoch for trial in ledger.trials()] == expected


def test_the_time_that_a_target_takes_counts_all_gpus_and_finished_trials_only(
    tmp_path: Path,
) -> None:
    run = searched(tmp_path)
    ends = sorted((s.end, s.objective) for s in run.spans if s.epochs == EPOCHS)
    target = ends[1][1]
    first = next(end for end, objective in ends if objective <= target)
    assert run.gpu_seconds_to(target) == 3 * first
    assert run.gpu_seconds_to(0.0) == float("inf")
    stopped, done = Span(0, 0, 0.0, 5.0, 1, 5.0, "pruned", 0.5), run.spans[-1]
    lower = replace(done, end=9.0, state="done", objective=1.0)
    assert Run(2, [stopped, lower]).gpu_seconds_to(1.0) == 18.0
    assert Run(2, [stopped, lower]).best() == 1.0


def test_time_that_is_used_up_cuts_what_runs(tmp_path: Path) -> None:
    whole = searched(tmp_path)
    ledger = ledger_of(tmp_path, scheduler="asha", trials=40)
    half = whole.gpu_seconds / 2
    cut = simulate(ledger, curve_of, gpus=3, gpu_seconds=half)
    assert cut.gpu_seconds == pytest.approx(half)
    assert cut.spans == [span for span in whole.spans if span.end <= half / 3]
    assert cut.busy == pytest.approx(half)  # without a driver's cost nobody waits
    assert any(trial.state == "running" for trial in ledger.trials())
