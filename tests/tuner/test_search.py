from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search import Searcher

from tests.tuner.support import tiny_study
from tuner.distributed import LedgerStopper
from tuner.folder import RunFolder
from tuner.members import PopulationLedger
from tuner.search import LedgerCallback, LedgerSearch
from tuner.study import Ledger
from tuner.telemetry import Progress
from tuner.trainable import CONFIG, DONOR, NUMBER, RESUME, UNTIL


def ledger_in(folder: Path, **changes: Any) -> Ledger:
    return Ledger(folder / "study.db", tiny_study(folder, **changes))


def search_over(ledger: Ledger, folder: Path, **options: Any) -> LedgerSearch:
    progress = Progress(ledger.config, [])
    return LedgerSearch(ledger, progress, RunFolder(folder), device="cpu", **options)


def epoch(number: int, objective: float, **more: Any) -> dict[str, Any]:
    return {"epoch": number, "objective": objective, "failed": False, "finished": False, **more}


def test_a_trial_without_a_chance_ends_with_the_reason_and_a_failed_one_is_not_asked_about(
    tmp_path: Path,
) -> None:
    ledger = ledger_in(tmp_path, search={"trials": 9, "scheduler": "none", "least_chance": 0.05})
    search = search_over(ledger, tmp_path)
    stop = LedgerStopper(search, lambda: False)
    for name, first, last in (("a", 2.0, 1.0), ("b", 2.2, 1.2), ("c", 2.4, 1.401)):
        search.suggest(name)
        for result in (epoch(1, first), epoch(2, last, finished=True)):
            assert not stop(name, result)
        search.on_trial_complete(name, result)
    search.suggest("d")
    assert not stop("d", {"failed": True, "reason": "diverged"})
    assert stop("d", epoch(1, 30.0))
    search.suggest("e")
    assert not stop("e", epoch(1, 1.9))
    search.on_trial_complete("d", epoch(1, 30.0))
    ended = ledger.trial(3)
    assert (ended.state, ended.epoch) == ("pruned", 1)
    assert str(ended.reason).startswith("stopped after epoch 1 at 30: its chance to end below 1 ")


def test_a_trial_that_asha_stops_is_pruned_with_its_steps(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    search = search_over(ledger, tmp_path)
    search.suggest("a")
    search.reported("a", epoch(1, 2.0))
    search.on_trial_complete("a", epoch(1, 2.0))
    frozen = ledger.optuna_study.trials[0]
    assert frozen.state.name == "PRUNED"
    assert frozen.intermediate_values == {1: 2.0}


def test_who_was_stopped_before_the_driver_died_is_not_issued_again(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    before = search_over(ledger, tmp_path)
    before.suggest("a"), before.suggest("b")
    assert not before.reported("a", epoch(1, 1.0, checkpoint="/kept/a"))
    assert before.reported("b", epoch(1, 2.0, checkpoint="/kept/b"))
    ledger.close()
    again = ledger_in(tmp_path)
    after = search_over(again, tmp_path)
    assert [after.suggest(name)[NUMBER] for name in ("c", "d")] == [0, 2]
    assert [trial.state for trial in again.trials()] == ["running", "pruned", "running"]


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


def test_trials_that_were_cut_are_issued_first_and_from_their_checkpoints(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    before = search_over(ledger, tmp_path)
    first, second = before.suggest("a"), before.suggest("b")
    before.reported("b", epoch(1, 2.0, checkpoint="/kept/checkpoint-00001"))
    after = search_over(ledger, tmp_path)
    issued = [after.suggest("c"), after.suggest("d"), after.suggest("e"), after.suggest("f")]
    assert issued[0] == first
    assert issued[1] == second | {RESUME: "/kept/checkpoint-00001"}
    assert issued[2][NUMBER] == 2
    assert issued[3] is None, "none is left, but those that run may be handed back"


def test_a_trial_begins_when_a_machine_has_taken_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = search_over(ledger_in(tmp_path), tmp_path)
    callback: Any = LedgerCallback(search)
    for name in ("a", "b"):
        search.suggest(name)
    assert capsys.readouterr().out == ""
    callback.on_trial_start(0, [], SimpleNamespace(trial_id="b"))
    assert capsys.readouterr().out.startswith("trial 0001 starts: ")
    callback.on_trial_start(0, [], SimpleNamespace(trial_id="b"))  # on another, after it was lost
    assert capsys.readouterr().out == ""


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


def test_members_of_a_population_take_turns_and_the_worst_gives_way(tmp_path: Path) -> None:
    population = {"scheduler": "pbt", "population": 2, "perturbation_epochs": 1, "trials": 3}
    study = tiny_study(tmp_path, search=population)
    ledger = PopulationLedger(tmp_path / "study.db", study)
    ended: list[int] = []
    search = search_over(ledger, tmp_path, after=lambda: ended.extend(ended_in(ledger)))

    def report(trial_id: str, number: int, objective: float, **more: Any) -> None:
        result = epoch(number, objective, checkpoint=f"/kept/{trial_id}", **more)
        search.reported(trial_id, result)
        search.on_trial_complete(trial_id, result)

    first, second = search.suggest("a"), search.suggest("b")
    assert [order[NUMBER] for order in (first, second)] == [0, 1]
    assert [order[UNTIL] for order in (first, second)] == [1, 1]
    assert search.suggest("c") is None, "one waits for the other"
    report("a", 1, 2.0, paused=True)
    assert search.suggest("d") is None, "its fate is not certain"
    report("b", 1, 1.0, paused=True)
    assert ended == []
    third = search.suggest("e")
    assert ended == [0]
    assert (third[NUMBER], third[RESUME], third[UNTIL]) == (1, "/kept/b", 2)
    heir = search.suggest("f")
    assert (heir[NUMBER], heir[RESUME]) == (2, None)
    assert (heir[DONOR], heir[UNTIL]) == ("/kept/b", 2)
    report("e", 2, 0.9, finished=True)
    assert search.suggest("g") is None
    report("f", 2, 0.8, finished=True)
    assert search.suggest("h") == Searcher.FINISHED
    assert [trial.state for trial in ledger.trials()] == ["pruned", "done", "done"]


def test_a_trial_whose_machine_is_lost_goes_on_from_the_last_checkpoint_in_the_ledger(
    tmp_path: Path,
) -> None:
    search = search_over(ledger_in(tmp_path), tmp_path)
    assert search.suggest("a")[RESUME] is None
    assert search.lost("a", "its node died") == {RESUME: None}
    for number in (1, 2):
        search.reported("a", epoch(number, 1.0, checkpoint=f"/kept/{number}"))
    assert search.lost("a", "its node died") == {RESUME: "/kept/2"}
    changes = search.lost("a", "MemoryExhausted: epoch 3: no memory")
    assert changes[RESUME] == "/kept/2"


def test_a_storage_that_stays_out_ends_the_session_and_fails_no_trial(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path, resources={"max_failures": 1})
    search = search_over(ledger, tmp_path)
    search.suggest("a")
    reason = "tuner.checkpoints.StorageOut: the storage cannot be used: s3://bucket/run"
    assert search.lost("a", reason) == {RESUME: None}
    assert search.cut_short is None
    assert search.lost("a", reason) == {}
    assert f"{reason}; nothing that was finished is lost" in str(search.cut_short)
    assert search.suggest("b") == Searcher.FINISHED
    assert ledger.trial(0).state == "running"


def ended_in(ledger: Ledger) -> list[int]:
    return [trial.number for trial in ledger.trials() if trial.state == "pruned"]


def test_memory_that_ran_out_while_an_actor_took_a_trial_is_no_lost_machine_too(
    tmp_path: Path,
) -> None:
    ledger = ledger_in(tmp_path, resources={"max_failures": 0})
    search = search_over(ledger, tmp_path)
    search.suggest("a")
    assert search.lost("a", "MemoryExhausted: epoch 1: no memory").keys() == {CONFIG, RESUME}
    search.on_trial_complete("a", None, error=True)  # Ray's second report of the same death
    again = search.suggest("b")
    assert again[NUMBER] == 0
    assert again[CONFIG]["training"]["accumulation"] == 2
    assert ledger.trial(0).state == "running"


def failed_at_once(reason: str, node: str) -> dict[str, Any]:
    place = {"node_id": node, "node": f"host-{node}"}
    return epoch(1, float("nan"), failed=True, reason=reason, traceback="", **place)


def test_a_node_that_fails_trial_after_trial_ends_the_session_and_not_the_study(
    tmp_path: Path,
) -> None:
    ledger = ledger_in(tmp_path, search={"trials": 30}, resources={"max_failures": 2})
    n_nodes = 1  # as long as an autoscaler has not added any
    search = search_over(ledger, tmp_path, n_nodes=lambda: n_nodes)
    n_nodes = 3
    search.suggest("works")
    for number in range(4):  # elsewhere trials finish epochs, and there now and then
        name = f"now and then {number}"
        search.suggest(name)
        search.on_trial_complete(name, failed_at_once("data: no such data folder", "bad"))
        search.reported("works", epoch(number + 1, 0.5, node_id="good"))
        if number == 1:
            search.suggest("once")
            search.reported("once", epoch(1, 0.5, node_id="bad"))
    assert search.cut_short is None
    search.suggest("last")
    search.on_trial_complete("last", failed_at_once("data: no such data folder", "bad"))
    said = str(search.cut_short)
    assert "3 trials in a row have failed on host-bad before they had finished an epoch" in said
    assert "data: no such data folder" in said
    assert f"--resume {tmp_path}" in said
    assert search.suggest("none") == Searcher.FINISHED
    states = [trial.state for trial in ledger.trials()]
    assert states == ["running", "failed", "failed", "running", "failed", "failed", "failed"]


def test_what_diverges_and_what_fails_later_says_nothing_of_its_node(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path, search={"trials": 30}, resources={"max_failures": 1})
    search = search_over(ledger, tmp_path)
    for number in range(6):
        name = str(number)
        search.suggest(name)
        diverged = failed_at_once("diverged: 5 non-finite steps in a row", "any")
        later = failed_at_once("ValueError: late", "any") | {"epoch": 2}
        search.reported(name, epoch(1, 0.5, node_id="other"))
        search.on_trial_complete(name, diverged if number % 2 else later)
    assert search.cut_short is None


def test_failures_of_several_kinds_or_beside_trials_at_work_are_no_nodes(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path, search={"trials": 40}, resources={"max_failures": 2})
    search = search_over(ledger, tmp_path)
    for name in ("one", "two", "three"):
        search.suggest(name)  # in a long first epoch, on the only node
    for number in range(12):
        search.suggest(str(number))
        search.on_trial_complete(str(number), failed_at_once(f"ValueError: width {number}", "n"))
    assert search.cut_short is None, "each for another reason"
    for number in range(12, 17):
        search.suggest(str(number))
        search.on_trial_complete(str(number), failed_at_once("ValueError: heads", "n"))
    assert search.cut_short is None, "three are at work there, and may show that it works"
    search.suggest("17")
    search.on_trial_complete("17", failed_at_once("ValueError: heads", "n"))
    assert "6 trials in a row" in str(search.cut_short)


def test_a_member_that_fails_at_once_where_it_goes_on_says_something_of_the_node(
    tmp_path: Path,
) -> None:
    ledger = ledger_in(tmp_path, search={"trials": 40}, resources={"max_failures": 0})
    search = search_over(ledger, tmp_path)
    search.suggest("a")  # from a checkpoint of an earlier session
    search.on_trial_complete("a", failed_at_once("data: gone", "n") | {"epoch": 7})
    assert search.cut_short is not None


def test_a_gpu_that_no_longer_answers_fails_no_trial(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path, search={"trials": 30}, resources={"max_failures": 2})
    search = search_over(ledger, tmp_path)
    search.suggest("a")
    reason = "tuner.trial.DeviceLost: cuda of host-3 no longer answers: CUDA error: ECC"
    for _ in range(2):
        assert RESUME in search.lost("a", reason)
        assert search.cut_short is None
    assert search.lost("a", reason) == {}
    assert "cuda of host-3 no longer answers" in str(search.cut_short)
    assert search.suggest("b") == Searcher.FINISHED
    assert ledger.trial(0).state == "running", "it goes on when the machine is mended"
    other = search_over(ledger_in(tmp_path / "other", resources={"max_failures": 0}), tmp_path)
    other.suggest("a")
    assert "give_up" in other.lost("a", "ActorDiedError: The actor died unexpectedly"), "a crash"
