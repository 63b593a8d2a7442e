from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import Searcher

from tests.tuner.support import tiny_study
from tuner.folder import RunFolder
from tuner.search import LedgerASHA, LedgerSearch
from tuner.study import Ledger
from tuner.telemetry import Progress
from tuner.trainable import CONFIG, NUMBER, RESUME, START

ASHA = {"search": {"trials": 20, "reduction_factor": 2}, "training": {"epochs": 8}}


def ledger_in(folder: Path, **changes: Any) -> Ledger:
    return Ledger(folder / "study.db", tiny_study(folder, **changes))


def search_over(ledger: Ledger, folder: Path, **options: Any) -> LedgerSearch:
    progress = Progress(ledger.config, [])
    return LedgerSearch(ledger, progress, RunFolder(folder), device="cpu", **options)


def epoch(number: int, objective: float, **more: Any) -> dict[str, Any]:
    return {"epoch": number, "objective": objective, "failed": False, "finished": False, **more}


def test_a_trial_that_asha_stops_is_pruned_with_its_steps(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    search = search_over(ledger, tmp_path)
    search.suggest("a")
    search.reported("a", epoch(1, 2.0))
    search.on_trial_complete("a", epoch(1, 2.0))
    frozen = ledger.optuna_study.trials[0]
    assert frozen.state.name == "PRUNED"
    assert frozen.intermediate_values == {1: 2.0}


def test_a_nan_ends_a_trial_as_failed_and_leaves_nothing_running(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    search = search_over(ledger, tmp_path)
    search.suggest("a")
    failed = epoch(1, float("nan"), failed=True, reason="diverged: NaN", traceback="Traceback")
    search.reported("a", failed)
    search.on_trial_complete("a", failed)
    search.suggest("b")
    search.on_trial_complete("b", epoch(2, float("nan"), finished=True))
    assert [trial.state for trial in ledger.trials()] == ["failed", "failed"]
    assert ledger.trial(0).reason == "diverged: NaN"
    assert ledger.orphans() == []
    assert (tmp_path / "trials" / "0000" / "error.txt").read_text() == "Traceback"


def test_a_machine_lost_for_good_ends_its_trial_as_failed(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    search = search_over(ledger, tmp_path)
    search.suggest("a")
    search.reported("a", epoch(1, 0.1))
    search.lost("a", "failure 1")
    search.on_trial_complete("a", None, error=True)
    assert ledger.trial(0).state == "failed"
    assert "lost" in str(ledger.trial(0).reason)
    assert ledger.best() is None


def test_trials_that_were_cut_are_issued_first_and_from_their_checkpoints(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    before = search_over(ledger, tmp_path)
    first, second = before.suggest("a"), before.suggest("b")
    before.reported("b", epoch(1, 2.0))
    before.checkpointed("b", "/kept/checkpoint_000000", 1)
    after = search_over(ledger, tmp_path)
    issued = [after.suggest("c"), after.suggest("d"), after.suggest("e"), after.suggest("f")]
    assert issued[0] == first
    assert issued[1] == second | {RESUME: "/kept/checkpoint_000000", START: 1}
    assert issued[2][NUMBER] == 2
    assert issued[3] == Searcher.FINISHED


def test_nothing_is_proposed_once_the_run_is_to_stop(tmp_path: Path) -> None:
    search = search_over(ledger_in(tmp_path), tmp_path, stop=lambda: True)
    assert search.suggest("a") == Searcher.FINISHED


def test_a_proposal_carries_the_trials_whole_configuration(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    proposal = search_over(ledger, tmp_path).suggest("a")
    base = ledger.config.trial_config({}, ledger.trial(0).seed)
    assert proposal[CONFIG] == base.model_dump(mode="json")


def test_the_bridge_is_not_pickled_with_rays_snapshots(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    for part in (search_over(ledger, tmp_path), LedgerASHA(ledger)):
        assert isinstance(pickle.loads(pickle.dumps(part)), str)


def play(scheduler: AsyncHyperBandScheduler, number: int, objectives: list[float]) -> list[str]:
    """Ray's calls for one trial; the decision after each epoch."""
    trial: Any = SimpleNamespace(trial_id=f"ray-{number}", config={NUMBER: number})
    scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
    decisions = []
    for index, objective in enumerate(objectives, start=1):
        decisions.append(scheduler.on_trial_result(None, trial, epoch(index, objective)))  # type: ignore[arg-type]
        if decisions[-1] == "STOP":
            break
    return decisions


def test_rungs_are_rebuilt_from_the_ledger(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path, **ASHA)
    alive = LedgerASHA(ledger)
    curves = [[5.0, 4.0, 3.0, 2.0], [6.0], [4.0, 3.5, 3.2, 1.0], [4.5, 3.0]]
    for curve in curves:
        found = ledger.ask()
        assert found is not None
        decisions = play(alive, found.number, curve)
        for index, objective in enumerate(curve[: len(decisions)], start=1):
            ledger.report(found.number, {"epoch": index, "objective": objective})
        ledger.finish(found.number, "pruned")
    rebuilt = LedgerASHA(ledger)
    assert {k: sorted(v.values()) for k, v in rebuilt.rungs.items()} == {
        k: sorted(v.values()) for k, v in alive.rungs.items()
    }
    for objective in (4.2, 4.6, 7.0):
        later = {"alive": alive, "rebuilt": rebuilt}
        judged = {name: play(scheduler, 90, [objective]) for name, scheduler in later.items()}
        assert judged["alive"] == judged["rebuilt"]


def test_a_resumed_trial_keeps_its_rungs_and_is_judged_again_after_its_checkpoint(
    tmp_path: Path,
) -> None:
    ledger = ledger_in(tmp_path, **ASHA)
    found = ledger.ask()
    assert found is not None
    for index, objective in enumerate([5.0, 4.0, 3.0], start=1):
        ledger.report(found.number, {"epoch": index, "objective": objective})
    ledger.checkpointed(found.number, "/kept", 1)
    rebuilt = LedgerASHA(ledger)
    assert [len(recorded) for recorded in rebuilt.rungs.values()] == [0, 0, 0, 1]
    trial: Any = SimpleNamespace(trial_id="ray-7", config={NUMBER: found.number})
    rebuilt.on_trial_add(None, trial)
    rebuilt.on_trial_result(None, trial, epoch(2, 4.0))
    names = [set(recorded) for recorded in rebuilt.rungs.values()]
    assert names == [set(), set(), {"ray-7"}, {"ray-7"}]


@pytest.mark.parametrize("call", ["on_trial_result", "on_trial_complete"])
def test_a_failed_result_enters_no_rung(tmp_path: Path, call: str) -> None:
    scheduler = LedgerASHA(ledger_in(tmp_path, **ASHA))
    trial: Any = SimpleNamespace(trial_id="ray-0", config={NUMBER: 0})
    scheduler.on_trial_add(None, trial)
    getattr(scheduler, call)(None, trial, epoch(1, float("nan"), failed=True))
    assert not any(scheduler.rungs.values())
