from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from tests.tuner.support import tiny_study
from tuner.folder import RunFolder
from tuner.search import LedgerSearch
from tuner.study import Ledger
from tuner.telemetry import Progress
from tuner.trainable import CONFIG, NUMBER, RESUME, START


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
    search = search_over(ledger_in(tmp_path), tmp_path)
    assert isinstance(pickle.loads(pickle.dumps(search)), str)
