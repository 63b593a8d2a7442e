"""Populations in the ledger, with trials that take no time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.samplers import RandomSampler
from optuna.storages import InMemoryStorage

from tests.tuner.mortal import dying_changes_nothing
from tests.tuner.support import FakeRun, tiny_study
from tuner.appraisal import epochs_expected
from tuner.config import StudyConfig
from tuner.folder import RunFolder, checkpoint_name
from tuner.forecast import Pace, time_left
from tuner.ledger import open_ledger
from tuner.local import run_local
from tuner.members import PopulationLedger
from tuner.records import HEIR, TrialRecord, trial_seed
from tuner.results import drop_losers
from tuner.rungs import epochs_in_all
from tuner.samplers import Viewing, without_heirs
from tuner.study import Ledger
from tuner.trial import MemoryExhausted
from tuner.warmstart import read_prior
from tuner.watchers import Watcher


@pytest.fixture(autouse=True)
def _no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.local.TrialRun", FakeRun)


def study_in(folder: Path, **search: Any) -> StudyConfig:
    changes = {"scheduler": "pbt", "population": 4, "perturbation_epochs": 2, "trials": 6} | search
    return tiny_study(folder, search=changes, training={"epochs": 6})


def go(storage: InMemoryStorage, study: StudyConfig, folder: Path) -> Ledger:
    """A session of the local mode."""
    ledger = PopulationLedger(storage, study)
    home = RunFolder(folder)
    run_local(
        ledger,
        home,
        Watcher(),
        device="cpu",
        stop=lambda: False,
        after=lambda: drop_losers(home, ledger, ledger.best()),
    )
    return ledger


def story(ledger: Ledger) -> list[Any]:
    """All that a ledger says, but times and places."""
    return [
        (t.number, t.state, t.params, t.seed, t.curve, t.reason)
        + ((t.heir.donor, t.heir.epoch, t.heir.replaces, t.heir.changed) if t.heir else ())
        for t in ledger.trials()
    ]


def heirs(ledger: Ledger) -> Iterator[tuple[TrialRecord, TrialRecord, TrialRecord]]:
    """Each successor, its donor, and who gave way."""
    for trial in ledger.trials():
        if trial.heir is not None:
            yield trial, ledger.trial(trial.heir.donor), ledger.trial(trial.heir.replaces)


def test_the_worst_end_and_successors_of_the_best_go_on_from_there(tmp_path: Path) -> None:
    ledger = go(InMemoryStorage(), study_in(tmp_path, quantile=0.5, trials=8), tmp_path)
    trials = ledger.trials()
    assert len(trials) == 8
    assert not ledger.has_work
    assert ledger.n_new == 0
    assert sorted(t.state for t in trials) == ["done"] * 4 + ["pruned"] * 4
    for heir, donor, loser in heirs(ledger):
        assert heir.heir is not None
        epoch = heir.heir.epoch
        assert heir.curve[0][0] == epoch + 1
        assert loser.epoch == epoch
        assert (
            loser.reason
            == f"gave way after epoch {epoch} to a successor of trial {donor.number:04d}"
        )
        there = sorted(dict(t.curve)[epoch] for t in trials if epoch in dict(t.curve))
        assert dict(donor.curve)[epoch] in there[:2]
        assert loser.curve[-1][1] in there[-2:]
        assert heir.params["network.heads"] == donor.params["network.heads"]
        assert heir.heir.changed == {
            path: [donor.params[path], heir.params[path]]
            for path in ("training.learning_rate", "blend.beta")
            if heir.params[path] != donor.params[path]
        }
        assert heir.seed == trial_seed(ledger.config.seed, heir.number)
        assert heir.note == f"from trial {donor.number:04d} after epoch {epoch}"
    assert len(list(heirs(ledger))) == 4
    assert [t.number for t in ledger.ranking()] == [
        t.number for t in sorted(trials, key=lambda t: (t.objective, t.number)) if t.state == "done"
    ]
    left = sorted(p.parent.name for p in tmp_path.glob("trials/*/checkpoint*"))
    assert left == [f"{ledger.ranking()[0].number:04d}"], "checkpoints of nobody are left"


@pytest.mark.parametrize("sampler", ["random", "tpe"])
@pytest.mark.parametrize("stride", [29, pytest.param(2, marks=pytest.mark.slow)])
def test_a_driver_that_dies_anywhere_changes_nothing(
    tmp_path: Path, sampler: str, stride: int
) -> None:
    study = study_in(tmp_path, sampler=sampler, startup_trials=2, trials=12)
    whole = dying_changes_nothing(lambda db, name: story(go(db, study, tmp_path / name)), stride)
    assert len(whole) == 12


@pytest.mark.parametrize("seed", range(4))
def test_many_slots_decide_as_one_does(tmp_path: Path, seed: int) -> None:
    study = study_in(tmp_path, trials=12, startup_trials=2)
    wanted = story(go(InMemoryStorage(), study, tmp_path / "one"))
    ledger = PopulationLedger(InMemoryStorage(), study)
    random = np.random.default_rng(seed)
    busy: dict[int, tuple[FakeRun, int | None]] = {}
    while True:
        ledger.settle()
        while len(busy) < 3 and (found := ledger.ask()) is not None:
            begun = found.checkpoint or found.donor
            run = FakeRun(ledger.trial_config(found), "cpu", Path(begun) if begun else None)
            assert run.epoch == found.epoch
            assert found.number not in busy
            busy[found.number] = run, found.until
        if not busy:
            assert not ledger.has_work
            break
        number = int(random.choice(list(busy)))
        run, until = busy[number]
        result = run.step()
        place = tmp_path / "many" / f"{number}-{run.epoch}"
        run.save(place)
        ledger.report(number, result, str(place))
        if result["finished"]:
            ledger.finish(number, "done", objective=result["objective"])
        elif run.epoch == until:
            ledger.hand_back(number)
        else:
            continue
        del busy[number]
    assert story(ledger) == wanted


def test_a_member_that_fails_gives_way_before_the_worst(tmp_path: Path) -> None:
    ledger = PopulationLedger(InMemoryStorage(), study_in(tmp_path))
    ledger.settle()
    for objective in (0.1, 0.2, 0.3):
        found = ledger.ask()
        assert found is not None
        for epoch in (1, 2):
            ledger.report(
                found.number, {"epoch": epoch, "objective": objective}, f"/kept/{found.number}"
            )
        ledger.hand_back(found.number)
    last = ledger.ask()
    assert last is not None
    ledger.finish(last.number, "failed", reason="diverged")
    assert ledger.settle() == [], "it had ended by itself"
    states = [trial.state for trial in ledger.trials()]
    assert states == ["running", "running", "running", "failed", "running"]
    heir = ledger.trial(4).heir
    assert heir is not None
    assert (heir.donor, heir.replaces, heir.location) == (0, 3, "/kept/0")


def test_what_an_heir_begins_with_is_kept_until_it_has_its_own(tmp_path: Path) -> None:
    ledger = PopulationLedger(InMemoryStorage(), study_in(tmp_path))
    ledger.settle()

    def kept(number: int, epoch: int) -> str:
        return f"/trials/{number:04d}/{checkpoint_name(epoch)}"

    def train(number: int, until: int, objective: float) -> None:
        for epoch in range(ledger.trial(number).epoch + 1, until + 1):
            ledger.report(number, {"epoch": epoch, "objective": objective}, kept(number, epoch))

    def dropped() -> set[str]:
        numbers = range(len(ledger.trials()))
        return set(ledger.unneeded((n, kept(n, e)) for n in numbers for e in range(1, 6)))

    for number in range(3):
        train(number, 2, 0.1 * number)
    train(0, 4, 0.05)  # its fate at 2 is certain
    # Of 2 whoever is the last may have to succeed it; what is newer may be on its way.
    assert dropped() == {kept(0, 1), kept(0, 3), kept(1, 1), kept(2, 1)}
    train(3, 2, 0.9)
    (ended,) = ledger.settle()
    assert ended.number == 3
    behind = {kept(0, 1), kept(0, 3), kept(1, 1), kept(2, 1)}
    assert dropped() == behind | {kept(3, epoch) for epoch in range(1, 6)}
    train(4, 3, 0.5)
    assert kept(0, 2) in dropped()
    assert kept(1, 2) not in dropped(), "it goes on from there"
    assert not {kept(4, 3), kept(4, 4)} & dropped()


def test_the_sampler_sees_no_successors(tmp_path: Path) -> None:
    seen: list[set[int]] = []

    class Recorder(RandomSampler):
        def sample_relative(self, study: optuna.Study, trial: Any, search_space: Any) -> Any:
            seen.append({t.number for t in study.get_trials(deepcopy=False)} - {trial.number})
            return super().sample_relative(study, trial, search_space)

    ledger = go(InMemoryStorage(), study_in(tmp_path), tmp_path)
    after_all = {t.number for t in ledger.trials()}
    followers = {t.number for t, _, _ in heirs(ledger)}
    assert followers
    study = ledger.optuna_study
    assert isinstance(study.sampler, Viewing)
    study.sampler = Viewing(Recorder(), without_heirs)
    asked = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
    assert seen == [after_all - followers]
    assert asked.number == len(after_all)
    assert all(HEIR in study.trials[number].user_attrs for number in followers)


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_a_second_population_learns_from_the_members_of_the_first(
    tmp_path: Path, sampler: str
) -> None:
    search = {"sampler": sampler, "startup_trials": 3, "trials": 12}
    ledger = go(InMemoryStorage(), study_in(tmp_path, **search), tmp_path)
    founders = [t for t in ledger.trials() if t.heir is None]
    assert [t.number for t in founders] == [0, 1, 2, 3, 6, 7, 8, 9]
    first_end = max(t.finished for t in ledger.trials()[:6] if t.finished)
    assert all(t.started and t.started >= first_end for t in founders[4:])
    assert len({repr(t.params) for t in founders}) == 8


def test_an_extended_study_is_that_of_so_many_trials(tmp_path: Path) -> None:
    storage = InMemoryStorage()
    shorter = go(storage, study_in(tmp_path, trials=9), tmp_path / "grown")
    assert len(shorter.trials()) == 6, "three trials are no population"
    assert not shorter.has_work
    grown = PopulationLedger(storage, study_in(tmp_path, trials=12))
    assert grown.has_work
    assert grown.n_new == 6
    again = go(storage, study_in(tmp_path, trials=12), tmp_path / "grown")
    assert story(again) == story(
        go(InMemoryStorage(), study_in(tmp_path, trials=12), tmp_path / "x")
    )


def test_new_trials_are_counted_while_a_population_is_under_way(tmp_path: Path) -> None:
    ledger = PopulationLedger(InMemoryStorage(), study_in(tmp_path, trials=12))
    assert (ledger.n_new, ledger.has_work) == (12, True)
    ledger.settle()
    assert (ledger.n_new, len(ledger.trials())) == (8, 4)


def test_a_small_space_founds_what_it_can(tmp_path: Path) -> None:
    space = {"blend.beta": {"type": "float", "low": 0.0, "high": 0.5, "step": 0.1}}
    study = study_in(tmp_path, space=space, population=6, trials=8, sampler="random", quantile=0.2)
    ledger = go(InMemoryStorage(), study, tmp_path)
    trials = ledger.trials()
    assert all(study.search.space["blend.beta"].contains(t.params["blend.beta"]) for t in trials)
    assert not any(t.state == "running" for t in trials)
    assert len([t for t in trials if t.heir]) == 2


def test_a_trial_that_ran_out_of_memory_still_ends_its_turn_at_the_milestone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(FakeRun):
        """Has no memory for the second epoch of trial 1 in one part."""

        def step(self) -> dict[str, Any]:
            narrow = self.config.training.accumulation == 1
            if self.epoch == 1 and self.config.seed == seeds[1] and narrow:
                raise MemoryExhausted("epoch 2: no room")
            return super().step()

    study = study_in(tmp_path)
    wanted = story(go(InMemoryStorage(), study, tmp_path / "whole"))
    seeds = [told[3] for told in wanted]
    monkeypatch.setattr("tuner.local.TrialRun", Full)
    ledger = go(InMemoryStorage(), study, tmp_path / "full")
    assert "out of memory in epoch 2" in ledger.trial(1).note
    assert story(ledger) == wanted


@pytest.mark.parametrize("epochs", [1, 5, 9, 14])
def test_a_stopped_session_goes_on_to_the_same_end(tmp_path: Path, epochs: int) -> None:
    study = study_in(tmp_path)
    wanted = story(go(InMemoryStorage(), study, tmp_path / "whole"))
    storage = InMemoryStorage()
    cut = PopulationLedger(storage, study)

    def stop() -> bool:
        return sum(len(trial.curve) for trial in cut.trials()) >= epochs

    home = RunFolder(tmp_path / "cut")
    run_local(cut, home, Watcher(), device="cpu", stop=stop, after=lambda: None)
    assert sum(len(trial.curve) for trial in cut.trials()) == epochs
    assert cut.has_work
    assert story(go(storage, study, tmp_path / "cut")) == wanted


def test_all_epochs_are_known_beforehand(tmp_path: Path) -> None:
    study = study_in(tmp_path, trials=14)
    ledger = go(InMemoryStorage(), study, tmp_path)
    search, epochs = study.search, study.training.epochs
    assert len(ledger.trials()) == search.planned_trials(epochs) == 12
    trained = sum(len(trial.curve) for trial in ledger.trials())
    assert trained == epochs_in_all(search, epochs) == 48
    assert epochs_expected(search, epochs) == (4.0, 4.0)
    half = [Pace("running", 3, (2.0,) * 3) for _ in range(8)]
    left = time_left(half, epochs=6, n_new=4, elapsed=12.0, in_all=48)
    assert left == pytest.approx((48 - 24) * 2.0 / 4)  # four side by side


def test_a_later_study_learns_nothing_from_successors(tmp_path: Path) -> None:
    folder = RunFolder.fresh(tmp_path / "run")
    study = study_in(tmp_path)
    folder.config.write_text(study.to_yaml())
    ledger = open_ledger(folder, study)
    assert isinstance(ledger, PopulationLedger)
    run_local(ledger, folder, Watcher(), device="cpu", stop=lambda: False, after=lambda: None)
    done = [trial for trial in ledger.trials() if trial.state == "done"]
    own = [trial for trial in done if trial.heir is None]
    assert 0 < len(own) < len(done)
    prior = read_prior(folder.path, tiny_study(tmp_path, training={"epochs": 6}))
    assert [trial.params for trial in prior.trials] == [trial.params for trial in own]
    assert f"{len(done) - len(own)} with another's weights" in prior.note
    assert len(ledger.finished_study().trials) == len(own), "importances are of own weights"
    ledger.close()
    folder.release()


def test_members_are_compared_by_the_weights_that_a_successor_would_get(tmp_path: Path) -> None:
    """Not by the best so far: the first had that long ago."""
    ledger = PopulationLedger(InMemoryStorage(), study_in(tmp_path))
    ledger.settle()
    own = [[0.1, 0.9], [0.5, 0.4], [0.6, 0.5], [0.7, 0.6]]
    for curve in own:
        found = ledger.ask()
        assert found is not None
        for epoch, value in enumerate(curve, start=1):
            metrics = {"epoch": epoch, "objective": min(curve[:epoch]), "nmse_pred": value}
            ledger.report(found.number, metrics, f"/kept/{found.number}")
        ledger.hand_back(found.number)
    (ended,) = ledger.settle()
    assert ended.number == 0
    heir = ledger.trial(4).heir
    assert heir is not None
    assert heir.donor == 1
