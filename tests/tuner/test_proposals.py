"""A driver that dies amid a proposal: what the next session proposes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from tests.tuner.support import tiny_study
from tuner.records import Assignment
from tuner.study import Ledger

SPACE: dict[str, Any] = {
    "training.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
    "network.heads": {"type": "categorical", "choices": [1, 2, 4]},
    "blend.beta": {"type": "float", "low": 0.0, "high": 0.6},
    "training.weight_decay": {"type": "float", "low": 1e-6, "high": 1e-2, "log": True},
}

SEED = 0  # its second proposal repeats the first


class Death(BaseException):
    """kill -9, as far as the ledger can tell."""


# Points of which a parameter is given, and the others are drawn.
POINTS = [{"blend.beta": 0.05 * index} for index in range(1, 8)]


def ledger_in(folder: Path, sampler: str, points: Sequence[dict[str, Any]] = ()) -> Ledger:
    folder.mkdir(exist_ok=True)
    search = {"trials": 8, "startup_trials": 3, "space": SPACE, "sampler": sampler}
    search["enqueue"] = list(points)
    return Ledger(folder / "study.db", tiny_study(folder, search=search))


def finish(ledger: Ledger, trial: Assignment | None) -> Assignment:
    assert trial is not None
    objective = float(trial.params["blend.beta"]) + 0.01 * trial.number  # type: ignore[arg-type]
    ledger.report(trial.number, {"epoch": 1, "objective": objective})
    ledger.finish(trial.number, "done", objective=objective)
    return trial


def dies_in(ledger: Ledger, method: str, after: int) -> None:
    """Let the driver die when it has written so often."""
    write = getattr(ledger._storage, method)
    written = 0

    def until(*arguments: Any, **named: Any) -> Any:
        nonlocal written
        if written == after:
            raise Death
        written += 1
        return write(*arguments, **named)

    setattr(ledger._storage, method, until)


def commits(ledger: Ledger) -> list[list[str]]:
    """What is brought to the disk from now on: the statements of each transaction that writes."""
    engine = ledger._database._backend._backend.engine  # type: ignore[attr-defined]
    pending: list[str] = []
    found: list[list[str]] = []

    @event.listens_for(engine, "before_cursor_execute")
    def note(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if not statement.startswith(("SELECT", "PRAGMA")):
            pending.append(statement.split("(")[0])

    @event.listens_for(engine, "commit")
    def commit(connection: Any) -> None:
        if pending:
            found.append(list(pending))
            pending.clear()

    return found


@pytest.mark.parametrize("sampler", ["random", "tpe", "tpe-univariate", "cmaes"])
@pytest.mark.parametrize("number", [1, 5])
def test_a_proposal_is_one_commit_and_what_dies_amid_it_leaves_nothing(
    tmp_path: Path, sampler: str, number: int
) -> None:
    whole = ledger_in(tmp_path / "whole", sampler)
    wanted = [finish(whole, whole.ask()) for _ in range(number + 2)]
    cut = ledger_in(tmp_path / "cut", sampler)
    for _ in range(number):
        finish(cut, cut.ask())
    dies_in(cut, "create_new_trial", 0)
    with pytest.raises(Death):
        cut.ask()
    cut.close()
    again = ledger_in(tmp_path / "cut", sampler)
    assert again.orphans() == []
    written = commits(again)
    trial = again.ask()
    assert len(written) == 1
    assert finish(again, trial) == wanted[number]
    assert again.ask() == wanted[number + 1]


@pytest.mark.parametrize("sampler", ["random", "tpe", "tpe-univariate", "cmaes"])
@pytest.mark.parametrize("drawn", [0, 3, 4])
@pytest.mark.parametrize("number", [1, 5])
def test_what_is_proposed_of_an_enqueued_point_is_what_would_have_been(
    tmp_path: Path, sampler: str, drawn: int, number: int
) -> None:
    whole = ledger_in(tmp_path / "whole", sampler, POINTS)
    wanted = [finish(whole, whole.ask()) for _ in range(number + 2)]
    cut = ledger_in(tmp_path / "cut", sampler, POINTS)
    for _ in range(number):
        finish(cut, cut.ask())
    method = "set_trial_param" if drawn < len(SPACE) else "set_trial_user_attr"
    dies_in(cut, method, drawn if drawn < len(SPACE) else 0)
    with pytest.raises(Death):
        cut.ask()
    cut.close()
    again = ledger_in(tmp_path / "cut", sampler, POINTS)
    (orphan,) = again.orphans()
    assert orphan == wanted[number]
    assert again.trial(number).budget == 2, "it would never rank"
    finish(again, orphan)
    assert again.ask() == wanted[number + 1]


def test_a_repetition_amid_which_the_driver_died_is_not_run(tmp_path: Path) -> None:
    def ledger() -> Ledger:
        space = {"network.heads": {"type": "categorical", "choices": [1, 2]}}
        search = {"trials": 2, "space": space, "sampler": "random", "startup_trials": 0}
        return Ledger(tmp_path / "study.db", tiny_study(tmp_path, seed=SEED, search=search))

    first = ledger()
    trial = first.ask()
    assert trial is not None
    write = first._storage.set_trial_user_attr

    def until(identifier: int, key: str, value: Any) -> None:
        if key == "duplicate_of":
            raise Death
        write(identifier, key, value)

    first._storage.set_trial_user_attr = until  # type: ignore[method-assign]
    with pytest.raises(Death):
        first.ask()
    first.close()
    again = ledger()
    assert [orphan.number for orphan in again.orphans()] == [trial.number]
    other = again.ask()
    assert other is not None
    assert other.params != trial.params
