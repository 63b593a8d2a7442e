"""ASHA with pauses: who of those that wait ends, and when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import InMemoryStorage

from tests.tuner.pausing import EPOCHS, Recorder, go, study_in
from tests.tuner.support import FakeRun
from tuner.folder import RunFolder
from tuner.pausing import SPARE, PausingLedger
from tuner.records import TrialRecord
from tuner.rungs import most_waiting
from tuner.search import LedgerSearch
from tuner.study import Ledger
from tuner.trainable import CHECKPOINT, UNTIL
from tuner.watchers import Watcher


def wait_in(ledger: PausingLedger, objectives: Sequence[float]) -> None:
    """Trials that wait at the first rung."""
    for objective in objectives:
        found = ledger.ask()
        assert found is not None
        ledger.report(found.number, {"epoch": 1, "objective": objective}, "at-1")
    for number in range(len(objectives)):
        ledger.hand_back(number)


@pytest.mark.parametrize(
    ("waiting", "trials", "promote", "outdone"),
    [
        (8, 9, 0, [4, 5, 6, 7]),
        (8, 10, 0, [5, 6, 7]),
        (8, 9, 2, [5, 6, 7]),
        (8, 9, 5, []),
        (8, 17, 0, []),
        (4, 4, 0, []),
    ],
)
def test_who_may_not_be_among_the_best_any_more_ends(
    tmp_path: Path, waiting: int, trials: int, promote: int, outdone: list[int]
) -> None:
    study = study_in(tmp_path, trials=trials, promote=promote)
    ledger = PausingLedger(InMemoryStorage(), study)
    wait_in(ledger, [1.0 + number for number in range(waiting)])
    found = ledger.settle()
    assert [t.number for t in found] == outdone
    assert all((t.state, t.reason) == ("pruned", "stopped after epoch 1") for t in found)
    assert ledger.settle() == []


def test_at_a_higher_rung_those_count_who_may_come_there_yet(tmp_path: Path) -> None:
    ledger = PausingLedger(InMemoryStorage(), study_in(tmp_path, trials=12))
    wait_in(ledger, [1.0 + number for number in range(10)])
    for number in range(5):  # as if they had gone on
        ledger.report(number, {"epoch": 2, "objective": 1.0 + number}, "at-2")
    found = [ledger.ask() for _ in range(5)]  # two of the best at the second rung, then new ones
    assert [t.number for t in found if t][:2] == [0, 1]
    assert [t.number for t in found if t][-2:] == [10, 11]
    ended = [t.number for t in ledger.settle()]
    assert 4 not in ended, "five, and two more that may come there: three of seven may go on"
    for number in (10, 11):
        ledger.report(number, {"epoch": 1, "objective": 50.0}, "at-1")
        ledger.hand_back(number)
    while more := ledger.settle():
        ended += [t.number for t in more]
    assert 4 in ended, "nobody comes to its rung any more"


@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize(("trials", "factor"), [(27, 3), (9, 3), (24, 2), (2, 2)])
@pytest.mark.parametrize("at", [9, 20])
def test_a_leader_that_fails_late_leaves_a_winner(
    tmp_path: Path, trials: int, factor: int, slots: int, at: int
) -> None:
    study = study_in(tmp_path, 27, trials=trials, reduction_factor=factor)
    ledger = PausingLedger(InMemoryStorage(), study)
    busy: dict[int, tuple[FakeRun, int | None]] = {}
    failed = 0
    while True:
        ledger.settle()
        while len(busy) < slots and (found := ledger.ask()) is not None:
            given = Path(found.checkpoint) if found.checkpoint else None
            busy[found.number] = FakeRun(ledger.trial_config(found), "cpu", given), found.until
        if not busy:
            break
        number = max(busy, key=lambda n: busy[n][0].epoch)
        fake, until = busy[number]
        result = fake.step()
        if fake.epoch == at and failed < 2:  # the first two that come there
            failed += 1
            ledger.finish(number, "failed", reason="diverged: loss is nan")
            del busy[number]
            continue
        place = tmp_path / f"{number}-{fake.epoch}"
        fake.save(place)
        ledger.report(number, result, str(place))
        if result["finished"]:
            ledger.finish(number, "done", objective=result["objective"])
            del busy[number]
        elif fake.epoch == until:
            ledger.hand_back(number)
            del busy[number]
    assert failed == min(2, trials)
    assert n_done(ledger.trials()) >= (trials > 2)
    assert not ledger.has_work


def test_who_ended_by_itself_where_it_waits_is_done_and_not_stopped(tmp_path: Path) -> None:
    storage, study = InMemoryStorage(), study_in(tmp_path, trials=9)
    ledger = PausingLedger(storage, study)
    wait_in(ledger, [1.0 + number for number in range(7)])
    found = ledger.ask()
    while found is not None and found.epoch:
        found = ledger.ask()
    assert found is not None
    told = {"epoch": 1, "objective": 9.0, "early_stopped": True}
    ledger.report(found.number, told, "at-1")
    again = PausingLedger(storage, study)  # the driver was killed before the end was written
    assert [t.number for t in again.settle()] == [4, 5, 6]
    going_on = again.ask()
    assert going_on is not None
    assert (going_on.number, going_on.epoch) == (found.number, 1)


def test_who_stood_better_and_failed_keeps_nobody_from_being_foremost(tmp_path: Path) -> None:
    ledger = PausingLedger(InMemoryStorage(), study_in(tmp_path, trials=9))
    wait_in(ledger, [1.0 + number for number in range(8)])
    for number in (0, 1):
        ledger.finish(number, "failed", reason="broken")
    assert [t.number for t in ledger.settle()] == [6, 7], "four that are sound are kept"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("factor", [2, 3])
def test_of_many_a_part_waits_at_a_time(tmp_path: Path, factor: int) -> None:
    study = study_in(tmp_path, trials=48, reduction_factor=factor)
    most: list[int] = []

    class Counting(Watcher):
        def handed_back(self, number: int) -> None:
            most.append(len(list((tmp_path / "run" / "trials").glob("*/checkpoint*"))))

    ledger = go(InMemoryStorage(), study, tmp_path / "run", Counting())
    assert len(ledger.trials()) == 48
    assert most_waiting(study.search) == 48 // factor
    assert 0.8 * 48 // factor < max(most) <= 48 // factor + 2 * SPARE


def test_a_trial_that_lost_its_chance_while_it_waited_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = PausingLedger(InMemoryStorage(), study_in(tmp_path))
    for number in range(2):
        assert ledger.ask() is not None
        ledger.report(number, {"epoch": 1, "objective": 1.0 + number}, "at-1")
    ledger.hand_back(0)
    ledger.hand_back(1)
    monkeypatch.setattr(ledger, "hopeless", lambda *_: "no chance")
    found = ledger.ask()
    assert found is not None
    assert found.number == 2
    monkeypatch.undo()
    found = ledger.ask()
    assert found is not None
    assert found.number == 0


@pytest.mark.usefixtures("quick")
def test_who_has_no_chance_any_more_is_not_taken_from_where_he_waits(tmp_path: Path) -> None:
    study = study_in(tmp_path, trials=40)
    patient, recorder = Recorder(), Recorder()
    go(InMemoryStorage(), study, tmp_path / "run", patient)
    changed = study.replaced({"search.least_chance": 0.2})
    ledger = go(InMemoryStorage(), changed, tmp_path / "hopeless", recorder)
    assert len(recorder.stretches) < len(patient.stretches)
    reasons = {t.reason for t in ledger.trials() if t.state == "pruned"}
    assert any("chance" in str(reason) for reason in reasons)
    assert any(str(reason).startswith("stopped after epoch") for reason in reasons)
    assert not ledger.has_work


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("promote", [0, 2])
def test_nobody_is_stopped_who_stands_better_than_who_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, promote: int
) -> None:
    class Flat(FakeRun):
        """Bad ones come to no more after their third epoch, as patience sees it."""

        def step(self) -> dict[str, Any]:
            result = super().step()
            bad = not 1e-4 < self.config.training.learning_rate < 1e-2
            if bad and self.epoch == 3:
                result |= {"finished": True, "early_stopped": True}
            return result

    monkeypatch.setattr("tuner.local.TrialRun", Flat)
    space = {"training.learning_rate": {"type": "float", "low": 1e-6, "high": 1.0, "log": True}}
    study = study_in(
        tmp_path, 27, trials=14, reduction_factor=3, grace_epochs=3, space=space, promote=promote
    )
    ledger = go(InMemoryStorage(), study, tmp_path / "run")
    ranking = [trial.objective for trial in ledger.ranking()]
    last = ranking[max(1, promote) - 1]
    stopped = [trial.objective for trial in ledger.trials() if trial.state == "pruned"]
    assert last is not None
    assert stopped
    assert all(objective is None or objective >= last for objective in stopped)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("points", range(7, 17))
def test_who_waits_is_ended_where_proposals_run_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: int
) -> None:
    def twin(self: Ledger, params: object, started: list[object]) -> int | None:
        return 0 if len(started) >= points else None

    monkeypatch.setattr(Ledger, "_twin", twin)
    ledger = go(InMemoryStorage(), study_in(tmp_path), tmp_path / "run")
    assert len(ledger.trials()) == points
    assert {trial.state for trial in ledger.trials()} == {"done", "pruned"}


def test_on_ray_too_a_trial_without_a_chance_ends_at_its_rung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = PausingLedger(InMemoryStorage(), study_in(tmp_path))
    search = LedgerSearch(ledger, Watcher(), RunFolder(tmp_path), device="cpu")
    for name in ("a", "b"):
        assert search.suggest(name)[UNTIL] == 1
        result = {
            "epoch": 1, "objective": 2.0, "failed": False, "finished": False, "paused": True,
            CHECKPOINT: f"at-{name}",
        }  # fmt: skip
        monkeypatch.setattr(
            ledger._verdicts, "hopeless", lambda *_, name=name: "no chance" * (name == "b") or None
        )
        assert search.reported(name, result) == (name == "b")
        search.on_trial_complete(name, result)
    assert [(t.state, t.reason) for t in ledger.trials()] == [
        ("running", None), ("pruned", "no chance"),
    ]  # fmt: skip


@pytest.mark.usefixtures("quick")
def test_a_small_space_ends_when_its_points_have_run(tmp_path: Path) -> None:
    space = {"network.heads": {"type": "categorical", "choices": [2, 4]}}
    ledger = go(InMemoryStorage(), study_in(tmp_path, space=space), tmp_path / "run")
    assert sorted(t.state for t in ledger.trials()) == ["done", "pruned"]
    assert not ledger.has_work


def in_time(
    folder: Path, minutes: int, slots: int, promote: int = 0, slow: int = 1
) -> list[TrialRecord]:
    """Trials of a study that is cut after so many minutes.

    An epoch takes a minute each, or ``slow`` of them of every second trial.
    """
    study = study_in(folder, trials=200, time_budget=60.0 * minutes, promote=promote)
    ledger = PausingLedger(InMemoryStorage(), study)
    busy: dict[int, tuple[FakeRun, int | None]] = {}
    due: dict[int, int] = {}
    for minute in range(1, minutes + 1):
        ledger.settle()
        while len(busy) < slots and (found := ledger.ask()) is not None:
            given = Path(found.checkpoint) if found.checkpoint else None
            busy[found.number] = FakeRun(ledger.trial_config(found), "cpu", given), found.until
        for number, (fake, until) in list(busy.items()):
            each = slow if number % 2 else 1
            due[number] = due.get(number, 0) + 1
            if due[number] % each:
                continue
            result = fake.step() | {"epoch_seconds": 60.0 * each}
            fake.save(folder / f"{number}-{fake.epoch}")
            ledger.report(number, result, str(folder / f"{number}-{fake.epoch}"))
            if result["finished"]:
                ledger.finish(number, "done", objective=result["objective"])
            elif fake.epoch == until:
                ledger.hand_back(number)
            if result["finished"] or fake.epoch == until:
                del busy[number]
        ledger.keep_seconds(60.0 * minute)
    return ledger.trials()


def n_done(trials: list[TrialRecord]) -> int:
    return sum(trial.state == "done" for trial in trials)


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_a_study_whose_time_ends_has_a_winner(tmp_path: Path, slots: int) -> None:
    for minutes in range(EPOCHS + 2, 60, 4):  # the slack for trials that become slower: a fifth
        trials = in_time(tmp_path / f"{minutes}", minutes, slots)
        assert n_done(trials) >= 1, f"{minutes} minutes"
        assert len(trials) >= min(slots, 1 + (minutes - EPOCHS) // 3)


def test_epochs_that_take_longer_with_some_leave_a_winner_nearly_always(tmp_path: Path) -> None:
    budgets = range(30, 200, 10)
    winners = [n_done(in_time(tmp_path / f"{m}", m, 1, slow=4)) >= 1 for m in budgets]
    assert sum(winners) >= len(winners) - 1


def test_no_time_is_spent_on_a_winner_that_cannot_be_had(tmp_path: Path) -> None:
    trials = in_time(tmp_path, EPOCHS - 2, 1)
    assert n_done(trials) == 0
    assert len(trials) > 2, "it looks at more than one"


def test_as_many_finish_in_time_as_are_to_be_promoted(tmp_path: Path) -> None:
    assert n_done(in_time(tmp_path, 24, 3, promote=3)) == 3
