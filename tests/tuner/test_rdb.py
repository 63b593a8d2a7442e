"""A trial that is written in few statements is the one that Optuna writes in many."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.testing.pytest_storages import StorageTestCase
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event, inspect, text

from tests.tuner.postgres import Server
from tests.tuner.support import shown
from tuner.rdb import BatchedStorage
from tuner.storage import connect_args, parse_url

DISTRIBUTIONS = {
    "rate": FloatDistribution(1e-4, 1e-2, log=True),
    "share": FloatDistribution(0.0, 1.0, step=0.25),
    "heads": CategoricalDistribution([1, 2, "four", None]),
    "depth": IntDistribution(1, 9, step=2),
    **{f"more_{index}": FloatDistribution(0.0, 1.0) for index in range(11)},
}
PARAMS = {"rate": 3.1e-3, "share": 0.75, "heads": None, "depth": 5} | {
    f"more_{index}": (index + 1) / 13 for index in range(11)
}


def in_sqlite(kind: type[RDBStorage], path: Path) -> RDBStorage:
    return kind(f"sqlite:///{path}")


class TestOptunasOwnRules(StorageTestCase):
    """What Optuna asks of every storage."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Iterator[RDBStorage]:
        storage = in_sqlite(BatchedStorage, tmp_path / "study.db")
        yield storage
        storage.remove_session()


def templates() -> list[FrozenTrial | None]:
    """A proposal, one that was enqueued, ends of an earlier study, and no template."""
    known: dict[str, Any] = {"params": PARAMS, "distributions": DISTRIBUTIONS}
    attrs: dict[str, Any] = {"seed": 2**62, "pair": (1, "ü"), "nothing": None}
    made = [
        optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=attrs, **known),
        optuna.trial.create_trial(
            state=TrialState.WAITING, system_attrs={"fixed_params": {"heads": "four"}}
        ),
        optuna.trial.create_trial(
            value=0.25, intermediate_values={1: 0.5, 2: math.nan}, user_attrs=attrs, **known
        ),
        optuna.trial.create_trial(
            state=TrialState.FAIL, system_attrs={"cma:0": "00ff" * 400}, **known
        ),
    ]
    for template in made:
        template.datetime_start = datetime(2026, 5, 4, 3, 2, 1, 99)  # noqa: DTZ001 - as Optuna's
        if template.state.is_finished():
            template.datetime_complete = datetime(2026, 5, 4, 3, 2, 2)  # noqa: DTZ001
    return [*made, None]


def tables(storage: RDBStorage) -> dict[str, list[str]]:
    """All rows of trials, without the number that each row has and times taken now."""
    found = {}
    with storage.engine.begin() as database:
        for table in inspect(storage.engine).get_table_names():
            if not table.startswith("trial"):
                continue
            rows = database.execute(text(f"SELECT * FROM {table}")).mappings()
            own = f"{table.removesuffix('s')}_id" if table != "trials" else ""
            found[table] = sorted(
                str({k: v for k, v in row.items() if k not in (own, "param_id")}) for row in rows
            )
    return found


def filled(storage: RDBStorage) -> RDBStorage:
    for name in ("first", "second"):
        study_id = storage.create_new_study([StudyDirection.MINIMIZE], name)
        for template in templates()[:-1]:
            storage.create_new_trial(study_id, template)
    return storage


def test_the_tables_are_those_that_optuna_fills(tmp_path: Path) -> None:
    ours = filled(in_sqlite(BatchedStorage, tmp_path / "ours.db"))
    theirs = filled(in_sqlite(RDBStorage, tmp_path / "theirs.db"))
    assert tables(ours) == tables(theirs)
    assert len(tables(ours)["trial_params"]) == 2 * 3 * len(PARAMS)
    (read,) = (t for t in theirs.get_all_trials(1) if t.state == TrialState.RUNNING)
    (kept,) = (t for t in ours.get_all_trials(1) if t.state == TrialState.RUNNING)
    assert kept == read
    assert kept.params == PARAMS
    assert kept.user_attrs == {"seed": 2**62, "pair": [1, "ü"], "nothing": None}


def test_a_trial_costs_few_statements_and_one_commit(tmp_path: Path) -> None:
    statements: list[str] = []
    commits: list[object] = []
    storage = in_sqlite(BatchedStorage, tmp_path / "study.db")
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "study")
    event.listen(
        storage.engine, "before_cursor_execute", lambda *given: statements.append(given[2])
    )
    event.listen(storage.engine, "commit", commits.append)
    storage.create_new_trial(study_id, templates()[0])
    # The study is locked, the trial made and counted, and then its parameters and attributes.
    assert len(statements) <= 6, statements
    assert len(commits) == 1


@pytest.mark.parametrize("template", templates())
def test_a_trial_is_there_whole_or_not_at_all(tmp_path: Path, template: FrozenTrial | None) -> None:
    storage = in_sqlite(BatchedStorage, tmp_path / "study.db")
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "study")
    with storage.engine.begin() as database:
        for table in ("trial_params", "trial_system_attributes", "trials"):
            on = "UPDATE" if table == "trials" else "INSERT"
            database.execute(text(f"CREATE TRIGGER no_{table} BEFORE {on} ON {table} "
                                  "BEGIN SELECT RAISE(ABORT, 'no'); END"))  # fmt: skip
    with pytest.raises(Exception, match="no"):
        storage.create_new_trial(study_id, template)
    assert tables(storage) == {table: [] for table in tables(storage)}


@pytest.mark.long
@pytest.mark.usefixtures("password")
def test_postgresql_keeps_the_same(tmp_path: Path, server: Server) -> None:
    url = parse_url(server.fresh())
    storage = BatchedStorage(
        url.render_as_string(hide_password=False),
        engine_kwargs={"connect_args": connect_args(url)},
    )
    filled(storage)
    storage.write_together(1, {1: 0.5, 2: math.inf}, {"a": [1], "seed": 3})
    storage.write_together(1, {2: math.nan}, {"a": "other"})
    theirs = filled(in_sqlite(RDBStorage, tmp_path / "theirs.db"))
    for step, value in ((1, 0.5), (2, math.nan)):
        theirs.set_trial_intermediate_value(1, step, value)
    for key, attr in (("a", "other"), ("seed", 3)):
        theirs.set_trial_user_attr(1, key, attr)
    for study_id in (1, 2):
        ours, wanted = (s.get_all_trials(study_id) for s in (storage, theirs))
        assert shown(ours) == shown(wanted)
    storage.remove_session()
    storage.engine.dispose()
