"""ASHA with pauses: who goes on, beside the published algorithm; durable, and for real."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.samplers import RandomSampler
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from tests.tuner.events import scalars
from tests.tuner.mortal import dying_changes_nothing
from tests.tuner.pausing import EPOCHS, FACTOR, RUNGS, Recorder, Stretch, go, story, study_in
from tests.tuner.support import FakeRun
from tuner.config import StudyConfig
from tuner.folder import RunFolder
from tuner.local import run_local
from tuner.pausing import PausingLedger
from tuner.rungs import epochs_in_all
from tuner.samplers import Viewing, proposal_sampler, waiting_as_stopped
from tuner.study import Ledger
from tuner.tensorboard import TensorBoardLog
from tuner.trial import MemoryExhausted
from tuner.watchers import Watcher, Watchers


def published(
    curves: Mapping[int, Mapping[int, float]], factor: int, rungs: tuple[int, ...], wanted: int = 1
) -> list[Stretch]:
    """What the published algorithm trains on one worker, by looking at all, always."""
    values: dict[int, dict[int, float]] = {rung: {} for rung in rungs}
    promoted: dict[int, set[int]] = {rung: set() for rung in rungs}
    order: list[Stretch] = []
    done: set[int] = set()
    n_new = 0

    def train(number: int, since: int) -> None:
        until = min((rung for rung in rungs if rung > since), default=None)
        order.append((number, since, until))
        if until is None:
            done.add(number)
        else:
            values[until][number] = curves[number][until]

    def able(rung: int, most: int) -> list[int]:
        best = sorted(values[rung], key=lambda number: values[rung][number])
        return [n for n in best[:most] if n not in promoted[rung]]

    while True:
        for rung in reversed(rungs):
            found = able(rung, len(values[rung]) // factor)
            if found:
                break
        else:
            if n_new < len(curves):
                train(n_new, 0)
                n_new += 1
                continue
            ends = sorted(curves[number][EPOCHS] for number in done)
            bar = math.inf if len(done) < wanted else ends[wanted - 1]
            waiting = [
                (rung, [n for n in able(rung, len(curves)) if curves[n][rung] < bar])
                for rung in reversed(rungs)
            ]
            waiting = [(rung, better) for rung, better in waiting if better]
            if not waiting:
                return order
            rung, found = waiting[0]
        promoted[rung].add(found[0])
        train(found[0], rung)


def curves_of(study: StudyConfig, folder: Path) -> dict[int, dict[int, float]]:
    """Whole curves of the trials that chance proposes."""
    whole = Ledger(InMemoryStorage(), study.replaced({"search.scheduler": "none"}))
    run_local(
        whole, RunFolder(folder), Watcher(), device="cpu", stop=lambda: False, after=lambda: None
    )
    return {trial.number: dict(trial.curve) for trial in whole.trials()}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("trials", "factor", "promote"),
    [(24, 2, 0), (24, 2, 7), (40, 3, 0), (5, 3, 0), (7, 4, 3), (1, 2, 0)],
)
def test_one_slot_trains_what_the_published_algorithm_does(
    tmp_path: Path, trials: int, factor: int, promote: int
) -> None:
    study = study_in(tmp_path, trials=trials, reduction_factor=factor, promote=promote)
    rungs = tuple(factor**k for k in range(4) if factor**k < EPOCHS)
    wanted = published(curves_of(study, tmp_path / "whole"), factor, rungs, max(1, promote))
    recorder = Recorder()
    ledger = go(InMemoryStorage(), study, tmp_path / "run", recorder)
    assert recorder.stretches == wanted
    ended = {number: (since, until) for number, since, until in wanted}
    for trial in ledger.trials():
        _, until = ended[trial.number]
        assert trial.state == ("done" if until is None else "pruned")
        assert trial.reason == (None if until is None else f"stopped after epoch {until}")
        assert [epoch for epoch, _ in trial.curve] == list(range(1, (until or EPOCHS) + 1))
    assert not ledger.has_work
    assert sum(t.state == "done" for t in ledger.trials()) >= min(trials, max(1, promote))
    trained = sum(t.epoch for t in ledger.trials())
    known = epochs_in_all(study.search, EPOCHS)
    assert known is not None
    assert known <= trained <= 1.5 * known
    best = ledger.best()
    assert best is not None
    left = sorted(p.parent.name for p in (tmp_path / "run").glob("trials/*/checkpoint*"))
    assert left == [f"{best.number:04d}"], "checkpoints of nobody are left"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("sampler", ["random", "tpe"])
@pytest.mark.parametrize("stride", [37, pytest.param(3, marks=pytest.mark.slow)])
def test_a_driver_that_dies_anywhere_changes_nothing(
    tmp_path: Path, sampler: str, stride: int
) -> None:
    study = study_in(tmp_path, sampler=sampler, startup_trials=3, trials=12)
    dying_changes_nothing(lambda db, name: story(go(db, study, tmp_path / name).trials()), stride)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("epochs", [1, 6, 15, 30])
def test_a_stopped_session_goes_on_to_the_same_end(tmp_path: Path, epochs: int) -> None:
    study = study_in(tmp_path)
    wanted = story(go(InMemoryStorage(), study, tmp_path / "whole").trials())
    storage = InMemoryStorage()
    cut = PausingLedger(storage, study)

    def stop() -> bool:
        return sum(len(trial.curve) for trial in cut.trials()) >= epochs

    home = RunFolder(tmp_path / "cut")
    run_local(cut, home, Watcher(), device="cpu", stop=stop, after=lambda: None)
    assert sum(len(trial.curve) for trial in cut.trials()) == epochs
    assert cut.has_work
    assert story(go(storage, study, tmp_path / "cut").trials()) == wanted


@pytest.mark.parametrize("seed", range(4))
def test_many_slots_let_nobody_on_who_is_not_among_the_best(tmp_path: Path, seed: int) -> None:
    study = study_in(tmp_path)
    ledger = PausingLedger(InMemoryStorage(), study)
    random = np.random.default_rng(seed)
    busy: dict[int, tuple[FakeRun, int | None]] = {}
    rule = 0
    while True:
        ledger.settle()
        while len(busy) < 3:
            before = {t.number: dict(t.curve) for t in ledger.trials()}
            if (found := ledger.ask()) is None:
                break
            assert found.number not in busy
            given = Path(found.checkpoint) if found.checkpoint else None
            fake = FakeRun(ledger.trial_config(found), "cpu", given)
            assert fake.epoch == found.epoch
            busy[found.number] = fake, found.until
            if found.epoch in RUNGS and (busy.keys() - {found.number} or len(before) < 24):
                there = sorted(c[found.epoch] for c in before.values() if found.epoch in c)
                assert before[found.number][found.epoch] in there[: len(there) // FACTOR]
                rule += 1
        if not busy:
            break
        number = int(random.choice(list(busy)))
        fake, until = busy[number]
        result = fake.step()
        place = tmp_path / "many" / f"{number}-{fake.epoch}"
        fake.save(place)
        ledger.report(number, result, str(place))
        if result["finished"]:
            ledger.finish(number, "done", objective=result["objective"])
        elif fake.epoch == until:
            ledger.hand_back(number)
        else:
            continue
        del busy[number]
    assert rule > 10
    assert not ledger.has_work
    assert {trial.state for trial in ledger.trials()} == {"done", "pruned"}
    assert all(t.epoch in (*RUNGS, EPOCHS) for t in ledger.trials())


@pytest.mark.usefixtures("quick")
def test_a_trial_that_fails_is_no_more_among_those_who_may_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(FakeRun):
        """The best one ends in its third epoch."""

        def step(self) -> dict[str, Any]:
            result = super().step()
            if self.config.seed == seeds[best] and self.epoch == 3:
                result |= {"failed": True, "reason": "broken", "traceback": "?"}
            return result

    study = study_in(tmp_path)
    whole = go(InMemoryStorage(), study, tmp_path / "whole")
    seeds = [trial.seed for trial in whole.trials()]
    best = whole.ranking()[0].number
    monkeypatch.setattr("tuner.local.TrialRun", Failing)
    ledger = go(InMemoryStorage(), study, tmp_path / "run")
    assert (ledger.trial(best).state, ledger.trial(best).epoch) == ("failed", 2)
    assert ledger.best() is not None
    assert not ledger.has_work


@pytest.mark.usefixtures("quick")
def test_a_trial_that_ran_out_of_memory_still_waits_at_its_rung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(FakeRun):
        """Has no memory for the third epoch in one part."""

        def step(self) -> dict[str, Any]:
            if self.epoch == 2 and self.config.training.accumulation == 1:
                raise MemoryExhausted("epoch 3: no room")
            return super().step()

    study = study_in(tmp_path)
    wanted = story(go(InMemoryStorage(), study, tmp_path / "whole").trials())
    monkeypatch.setattr("tuner.local.TrialRun", Full)
    ledger = go(InMemoryStorage(), study, tmp_path / "full")
    assert story(ledger.trials()) == wanted
    assert any("out of memory in epoch 3" in t.note for t in ledger.trials())


def test_the_highest_rung_comes_first(tmp_path: Path) -> None:
    ledger = PausingLedger(InMemoryStorage(), study_in(tmp_path))
    for number, curve in enumerate(([2.0, 2.0], [3.0, 3.0], [1.0], [4.0])):
        assert ledger.ask() is not None
        for epoch, objective in enumerate(curve, start=1):
            ledger.report(number, {"epoch": epoch, "objective": objective}, f"at-{epoch}")
    for number in range(4):
        ledger.hand_back(number)
    found = [ledger.ask() for _ in range(3)]
    assert [(t.number, t.epoch, t.until) for t in found if t] == [(0, 2, 4), (2, 1, 2), (4, 0, 1)]


def test_who_are_to_be_promoted_come_to_their_end_side_by_side(tmp_path: Path) -> None:
    study = study_in(tmp_path, 27, trials=9, reduction_factor=3, promote=4)
    ledger = PausingLedger(InMemoryStorage(), study)
    objective = {number: 1.0 + number for number in range(9)}
    width = []
    while True:
        ledger.settle()
        found = []
        while len(found) < 4 and (trial := ledger.ask()) is not None:
            found.append(trial)
        if not found:
            break
        width.append((len(ledger.trials()), len(found)))
        for trial in found:
            for epoch in range(trial.epoch + 1, (trial.until or 27) + 1):
                told = {"epoch": epoch, "objective": objective[trial.number]}
                ledger.report(trial.number, told, f"at-{epoch}")
            if trial.until is None:
                ledger.finish(trial.number, "done", objective=objective[trial.number])
            else:
                ledger.hand_back(trial.number)
    assert [trial.number for trial in ledger.ranking()][:4] == [0, 1, 2, 3]
    assert len(ledger.ranking()) == 4
    assert max(n for begun, n in width[4:] if begun == 9) >= 3


def test_a_trial_whose_patience_ended_at_a_rung_is_ended_after_a_kill(tmp_path: Path) -> None:
    storage, study = InMemoryStorage(), study_in(tmp_path)
    ledger = PausingLedger(storage, study)
    for over in (False, True):
        found = ledger.ask()
        assert found is not None
        told = {"epoch": 1, "objective": 1.0 + over, "early_stopped": over}
        ledger.report(found.number, told, "at-1")
    ledger.hand_back(0)
    again = PausingLedger(storage, study)
    assert again.orphans() == []
    found = again.ask()
    assert found is not None
    assert (found.number, found.epoch) == (1, 1)


@pytest.mark.usefixtures("quick")
def test_a_trial_that_waits_has_one_checkpoint_and_no_open_file(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    ledger = PausingLedger(tmp_path / "study.db", study)
    log = TensorBoardLog(ledger, tmp_path / "tensorboard")
    most: list[int] = []

    class Counting(Watcher):
        def handed_back(self, number: int) -> None:
            kept = list((tmp_path / "run" / "trials").glob("*/checkpoint*"))
            assert len(kept) == len({path.parent for path in kept})
            most.append(len(log._files))

    home = RunFolder(tmp_path / "run")
    watchers = Watchers(log, Counting())
    run_local(ledger, home, watchers, device="cpu", stop=lambda: False, after=lambda: None)
    assert max(most) == 0
    for trial in ledger.trials():
        seen = scalars(tmp_path / "tensorboard" / f"trial-{trial.number:04d}")["objective"]
        assert [step for step, _ in seen] == [epoch for epoch, _ in trial.curve]


@pytest.mark.usefixtures("quick")
def test_an_extended_study_compares_new_trials_with_those_that_were_stopped(tmp_path: Path) -> None:
    storage, study = InMemoryStorage(), study_in(tmp_path)
    go(storage, study, tmp_path / "run")
    more = study.replaced({"search.trials": 30})
    recorder = Recorder()
    ledger = go(storage, more, tmp_path / "run", recorder)
    assert len(ledger.trials()) == 30
    assert {number for number, _, _ in recorder.stretches} == set(range(24, 30))
    first = sorted(dict(t.curve)[1] for t in ledger.trials())
    on = [n for n, since, _ in recorder.stretches if since == 1]
    assert all(dict(ledger.trial(n).curve)[1] in first[: 30 // FACTOR] for n in on)
    assert len(on) < 6


def test_a_sampler_sees_who_waits_as_stopped(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    ledger = PausingLedger(InMemoryStorage(), study)
    for epochs in (1, 3):
        found = ledger.ask()
        assert found is not None
        for epoch in range(1, epochs + 1):
            ledger.report(found.number, {"epoch": epoch, "objective": 1 / epochs}, f"at-{epoch}")
        if epochs == 1:
            ledger.hand_back(found.number)
    ledger.ask()
    trials = ledger.optuna_study.get_trials(deepcopy=False)
    seen = waiting_as_stopped(trials, RUNGS)
    assert [t.state for t in trials] == [TrialState.RUNNING] * 3
    assert [t.state for t in seen] == [TrialState.PRUNED, TrialState.RUNNING, TrialState.RUNNING]
    assert isinstance(proposal_sampler(study, 0), Viewing)
    other = study.replaced({"search.scheduler": "asha"})
    assert isinstance(proposal_sampler(other, 0), RandomSampler)
