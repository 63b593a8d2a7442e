"""Trials that are kept in memory beside the database by the one process that writes them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.testing.pytest_storages import StorageTestCase
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event, text
from sqlalchemy.exc import IntegrityError

from tests.tuner.support import shown, tiny_study
from tuner.draft import Draft
from tuner.owned import OwnedStorage
from tuner.storage import open_storage, sqlite_url
from tuner.study import Ledger

SPACE = {
    "rate": FloatDistribution(1e-4, 1e-2, log=True),
    "heads": CategoricalDistribution([1, 2, "four", None]),
    "depth": IntDistribution(1, 9, step=2),
}


def owned(folder: Path) -> OwnedStorage:
    return OwnedStorage(open_storage(sqlite_url(folder / "study.db")))  # type: ignore[abstract]


class TestOptunasOwnRules(StorageTestCase):
    """What Optuna asks of every storage."""

    test_pickle_storage = None  # it stays in the process that owns it

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Iterator[BaseStorage]:
        storage = owned(tmp_path)
        yield storage
        storage.remove_session()


def in_database(folder: Path) -> list[FrozenTrial]:
    """The trials as another process finds them."""
    storage = open_storage(sqlite_url(folder / "study.db"))
    trials = storage.get_all_trials(1)
    storage.remove_session()
    return trials


def write_something(storage: OwnedStorage, study_id: int, rng: random.Random) -> None:
    """One write of any kind to any trial."""
    running = storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
    kind = rng.randrange(8)
    if kind == 0 or not running:
        template = optuna.trial.create_trial(
            state=rng.choice([TrialState.RUNNING, TrialState.WAITING]),
            params={"rate": rng.uniform(1e-4, 1e-2), "heads": rng.choice([1, 2, "four", None])},
            distributions={name: SPACE[name] for name in ("rate", "heads")},
            user_attrs={"pair": (1, 2)},
            system_attrs={"fixed_params": {"depth": 3}},
        )
        storage.create_new_trial(study_id, rng.choice([None, template]))
        return
    trial_id = rng.choice(running)._trial_id
    if kind == 1:
        name, inside = rng.choice([("rate", 0.005), ("heads", 2.0), ("depth", 5.0)])
        storage.set_trial_param(trial_id, name, inside, SPACE[name])
    elif kind == 2:
        value = rng.choice([rng.random(), math.nan, math.inf, 1e-300])
        storage.set_trial_intermediate_value(trial_id, rng.randrange(5), value)
    elif kind == 3:
        storage.set_trial_user_attr(trial_id, f"epoch/{rng.randrange(5)}", {"f1": rng.random()})
    elif kind == 4:
        storage.set_trial_user_attr(trial_id, "shape", (rng.random(), {"tuple": (1,)}))
    elif kind == 5:
        storage.set_trial_system_attr(trial_id, "rung", [rng.random(), None])
    elif kind == 6:
        attrs = {f"epoch/{rng.randrange(5)}": {"f1": rng.random()}, "shape": (1, {"tuple": (2,)})}
        values = {step: rng.random() for step in range(rng.randrange(3))}
        storage.write_together(trial_id, values, attrs)
    else:
        ends: list[tuple[TrialState, list[float] | None]] = [
            (TrialState.COMPLETE, [rng.random()]),
            (TrialState.PRUNED, None),
            (TrialState.FAIL, None),
        ]
        storage.set_trial_state_values(trial_id, *rng.choice(ends))


@pytest.mark.parametrize("seed", range(2))
def test_memory_holds_what_the_database_does(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    storage = owned(tmp_path)
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "study")
    for count in range(1, 101):
        write_something(storage, study_id, rng)
        if count % 10 == 0:
            found = storage.get_all_trials(study_id, deepcopy=False)
            assert shown(found) == shown(in_database(tmp_path))
        if rng.random() < 0.05:  # a session that ends, and the next one
            storage.remove_session()
            storage = owned(tmp_path)
    trials = storage.get_all_trials(study_id)
    assert [storage.get_trial(trial._trial_id).number for trial in trials] == [*range(len(trials))]


def test_what_is_written_together_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    storage = owned(tmp_path)
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "study")
    trial_id = storage.create_new_trial(study_id)
    commits: list[object] = []
    engine = storage._backend._backend._backend.engine  # type: ignore[attr-defined]
    event.listen(engine, "commit", commits.append)
    storage.write_together(trial_id, {1: 0.5, 2: math.nan}, {"a": [1], "b": "text"})
    storage.write_together(trial_id, {2: 0.25}, {"b": "other"})
    storage.write_together(trial_id, {}, {})
    assert len(commits) <= 3
    with pytest.raises(TypeError, match="serializable"):
        storage.write_together(trial_id, {3: 1.0}, {"c": object()})
    with storage._backend._backend._backend.engine.begin() as database:  # type: ignore[attr-defined]
        database.execute(text("CREATE TRIGGER no BEFORE INSERT ON trial_user_attributes "
                              "BEGIN SELECT RAISE(ABORT, 'no'); END"))  # fmt: skip
    with pytest.raises(IntegrityError):
        storage.write_together(trial_id, {4: 1.0}, {"d": 1})
    storage.set_trial_state_values(trial_id, TrialState.FAIL)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        storage.write_together(trial_id, {5: 1.0}, {"b": "late"})
    (kept,) = in_database(tmp_path)
    assert kept.intermediate_values == {1: 0.5, 2: 0.25}
    assert kept.user_attrs == {"a": [1], "b": "other"}
    assert shown([kept]) == shown([storage.get_trial(trial_id)])


def test_a_trial_that_somebody_has_stays_as_it_was(tmp_path: Path) -> None:
    storage = owned(tmp_path)
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "study")
    trial_id = storage.create_new_trial(study_id)
    before = storage.get_all_trials(study_id, deepcopy=False)
    storage.set_trial_user_attr(trial_id, "epoch/00001", 1)
    storage.set_trial_intermediate_value(trial_id, 1, 0.5)
    storage.set_trial_state_values(trial_id, TrialState.PRUNED)
    assert before[0].user_attrs == before[0].intermediate_values == {}
    assert before[0].state == TrialState.RUNNING


def test_another_writer_is_noticed_before_numbers_are_mixed_up(tmp_path: Path) -> None:
    storage = owned(tmp_path)
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "study")
    storage.create_new_trial(study_id)
    other = open_storage(sqlite_url(tmp_path / "study.db"))
    other.create_new_trial(study_id)
    other.remove_session()
    with pytest.raises(RuntimeError, match="trial 2 was made where 1 was the next"):
        storage.create_new_trial(study_id)


def read_by_a_proposal(ledger: Ledger, n_running: int) -> int:
    """Statements of a proposal and what they bind, while so many more trials run."""
    for _ in range(n_running):
        trial = ledger.ask()
        assert trial is not None
        for epoch in (1, 2, 3):
            ledger.report(trial.number, {"epoch": epoch, "objective": 0.5})
    read = 0

    def count(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        nonlocal read
        read += 1 + len(parameters)  # trials are asked for by the hundred, in one statement

    engine = ledger._database._backend._backend.engine  # type: ignore[attr-defined]
    event.listen(engine, "before_cursor_execute", count)
    assert ledger.ask() is not None
    event.remove(engine, "before_cursor_execute", count)
    return read


def test_a_proposal_reads_no_more_however_many_trials_run(tmp_path: Path) -> None:
    search = {
        "trials": 100,
        "startup_trials": 3,
        "space": {
            "training.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
            "blend.beta": {"type": "float", "low": 0.0, "high": 0.6},
        },
    }
    ledger = Ledger(tmp_path / "study.db", tiny_study(tmp_path, search=search))
    few = read_by_a_proposal(ledger, 4)
    many = read_by_a_proposal(ledger, 30)
    assert many == few
    ledger.close()


def test_a_draft_of_an_owned_study_is_kept_back(tmp_path: Path) -> None:
    storage = owned(tmp_path)
    study = optuna.create_study(storage=storage, study_name="study")
    draft, twin = Draft.of(study)
    trial = twin.ask({"rate": SPACE["rate"]})
    assert in_database(tmp_path) == []
    assert study.trials == []
    draft.write()
    (kept,) = in_database(tmp_path)
    assert kept.params == trial.params == study.trials[0].params
