"""Processes that end under a trial: what is tried again, how often, and with what."""

from __future__ import annotations

import errno
import os
import resource
import signal
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search import Searcher

from model.training import Trainer
from tests.tuner.clusters import Head, actors, started_head
from tests.tuner.support import read_until, run, start, tiny_study, wait_for, write_study
from tuner.config import load_study
from tuner.folder import RunFolder
from tuner.records import TrialRecord
from tuner.search import LedgerCallback, LedgerSearch
from tuner.study import Ledger
from tuner.telemetry import Progress
from tuner.trainable import CONFIG, GIVE_UP, NUMBER, RESUME
from tuner.trial import DiskExhausted, TrialRun

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """One for all tests here, whose processes give freed memory back: they need it again."""
    with started_head(MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="65536") as found:
        yield found


def trials_of(folder: Path) -> list[TrialRecord]:
    ledger = Ledger(folder / "study.db", load_study(folder / "config.yaml"))
    try:
        return ledger.trials()
    finally:
        ledger.close()


def search_in(folder: Path, **changes: Any) -> tuple[Ledger, LedgerSearch]:
    ledger = Ledger(folder / "study.db", tiny_study(folder, **changes))
    progress = Progress(ledger.config, [])
    return ledger, LedgerSearch(ledger, progress, RunFolder(folder), device="cpu")


def epoch(number: int) -> dict[str, Any]:
    return {"epoch": number, "objective": 1.0 / number, "failed": False, "finished": False}


def test_losses_are_counted_in_a_row_and_a_finished_epoch_ends_the_row(tmp_path: Path) -> None:
    ledger, search = search_in(tmp_path, resources={"max_failures": 2})
    search.suggest("a")
    for number in (1, 2, 3):
        assert [search.lost("a", "gone") for _ in range(2)] == [{RESUME: None}] * 2
        search.reported("a", epoch(number))
    assert [search.lost("a", "gone") for _ in range(2)] == [{RESUME: None}] * 2
    (reason,) = search.lost("a", "gone").values()
    assert reason.startswith("lost: its process ended 3 times in a row before it had finished an ")
    assert "(gone)" in reason
    assert ledger.trial(0).note == "machine lost 9 times (last: gone)"


def test_a_full_disk_in_an_actor_ends_the_session_and_not_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(trainer: Trainer) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/tmp/cache")
        except OSError as error:
            raise RuntimeError("the backend failed") from error

    monkeypatch.setattr(Trainer, "run_epoch", full)
    ledger, search = search_in(tmp_path)
    search.suggest("a")
    with pytest.raises(DiskExhausted) as caught:
        TrialRun(ledger.config.trial_config({}, 0)).step()
    # As Ray writes it.
    text = "".join(traceback.format_exception(caught.value))
    (tmp_path / "error.txt").write_text(f"Failure # 1 (occurred at 2026-01-01)\n{text}")
    trial: Any = SimpleNamespace(
        trial_id="a", error_file=str(tmp_path / "error.txt"), num_failures=1, config={}
    )
    LedgerCallback(search).on_trial_recover(0, [], trial)
    assert "DiskExhausted: No space left on device: /tmp/cache); nothing" in str(search.cut_short)
    assert [trial.number for trial in ledger.trials() if trial.state == "running"] == [0]
    assert ledger.trial(0).note == "", "it has lost no machine"


def test_memory_is_halved_once_and_counts_as_no_loss(tmp_path: Path) -> None:
    ledger, search = search_in(tmp_path, resources={"max_failures": 0})
    search.suggest("a")
    changes = search.lost("a", "tuner.trial.MemoryExhausted: epoch 1: no room")
    assert changes[CONFIG]["training"]["accumulation"] == 2
    again = search.lost("a", "which exceeds the memory usage threshold of 0.95")
    assert again[GIVE_UP].startswith("out of memory with half the batch too (which exceeds")
    assert ledger.trial(0).state == "running", "it ends on its next actor"


def test_a_trial_that_not_even_an_actor_could_be_had_for_ends_with_its_reason(
    tmp_path: Path,
) -> None:
    ledger, search = search_in(tmp_path, resources={"max_failures": 0})
    search.suggest("a")
    search.lost("a", "gone")
    search.on_trial_complete("a", None, error=True)
    trial = ledger.trial(0)
    assert trial.state == "failed"
    assert str(trial.reason).startswith("lost: its process ended 1 times in a row")


def test_a_death_that_ray_reports_twice_is_one_and_the_trial_goes_on(tmp_path: Path) -> None:
    ledger, search = search_in(tmp_path, search={"trials": 1})
    first = search.suggest("a")
    search.lost("a", "gone")
    search.on_trial_complete("a", None, error=True)
    assert ledger.trial(0).state == "running"
    again = search.suggest("b")
    assert again[NUMBER] == first[NUMBER] == 0
    assert again[CONFIG] == first[CONFIG]
    assert ledger.trial(0).note == "machine lost once (last: gone)"
    assert search.suggest("c") is None, "it may be handed back once more"
    search.reported("b", {"epoch": 1, "objective": 1.0})
    search.on_trial_complete("b", {"epoch": 2, "objective": 1.0, "finished": True})
    assert ledger.trial(0).state == "done"
    assert search.suggest("c") == Searcher.FINISHED


def test_a_trial_that_ray_abandons_again_and_again_is_given_up(tmp_path: Path) -> None:
    ledger, search = search_in(tmp_path, search={"trials": 1}, resources={"max_failures": 2})
    for name in ("a", "b", "c"):
        assert search.suggest(name)[NUMBER] == 0
        search.on_trial_complete(name, None, error=True)
    trial = ledger.trial(0)
    assert trial.state == "failed"
    assert "3 times in a row before it had finished an epoch" in str(trial.reason)
    assert search.suggest("d") == Searcher.FINISHED


def test_the_last_trial_that_cannot_be_built_ends_the_search(tmp_path: Path) -> None:
    ledger, search = search_in(tmp_path, search={"trials": 1})
    with pytest.MonkeyPatch.context() as patched:

        def refused(found: object) -> object:
            raise ValueError("no such network")

        patched.setattr(ledger, "trial_config", refused)
        assert search.suggest("a") == Searcher.FINISHED
    assert ledger.trial(0).reason == "configuration: no such network"


@pytest.mark.slow
def test_a_trial_that_ends_its_process_every_time_is_given_up(tmp_path: Path, head: Head) -> None:
    config = write_study(
        tmp_path,
        training={"epochs": 2},
        search={"trials": 1, "scheduler": "none"},
        data={"train_scenes": 20_000},  # seconds
        resources={"max_failures": 1},
    )
    out = tmp_path / "run"
    process = start("--config", config, "--address", head.address, "--out", out)
    over = threading.Event()

    def kill_all() -> None:
        while not over.wait(0.02):
            for victim in actors(head):
                os.kill(victim, signal.SIGKILL)

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        over.set()
        killer.join()
    assert process.returncode == 1, output
    (trial,) = trials_of(out)
    assert trial.state == "failed", output
    assert "2 times in a row before it had finished an epoch" in str(trial.reason)
    assert "looks like a lost machine" in str(trial.reason)
    assert trial.note.startswith("machine lost 2 times (last: ")


@pytest.mark.slow
def test_a_trial_whose_actor_dies_while_it_takes_it_goes_on(tmp_path: Path, head: Head) -> None:
    """Ray reports that twice; whether the kill meets it is a matter of milliseconds."""
    config = write_study(
        tmp_path, training={"epochs": 1}, search={"trials": 8, "scheduler": "none"}
    )
    out = tmp_path / "run"
    command = ("--config", config, "--address", head.address, "--out", out)
    process = start(*command, "--concurrent", 1)
    for number in range(1, 8):
        read_until(process, f"trial {number:04d} starts")
        for victim in actors(head):
            os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    trials = trials_of(out)
    assert [trial.state for trial in trials] == ["done"] * 8, output
    assert sum("machine lost" in trial.note for trial in trials) > 0, "nobody was hit"


def confine(pid: int, spare: int) -> None:
    """Let a process have so many more bytes and no more."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + spare
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_an_actor_without_memory_is_followed_by_one_with_half_the_batch(
    tmp_path: Path, head: Head, times: int
) -> None:
    config = write_study(
        tmp_path,
        training={"epochs": 6, "batch_size": 512},
        network={"width": 64, "depth": 4, "conv_channels": 32},
        scene={"n_snapshots": 16},
        data={"train_scenes": 512},
        search={"trials": 1, "scheduler": "none"},
        resources={"max_failures": 0},
    )
    out = tmp_path / "run"
    wait_for(lambda: not actors(head))
    process = start("--config", config, "--address", head.address, "--out", out)
    for wanted in ("epoch 1/6", "epoch 4/6")[:times]:
        read_until(process, wanted)
        for victim in actors(head):
            confine(victim, 2**26)  # enough for Ray, not for a step
    output, _ = process.communicate(timeout=240)
    (trial,) = trials_of(out)
    assert trial.accumulation == 2, output
    assert "out of memory in epoch " in trial.note
    if times == 1:
        assert process.returncode == 0, output
        assert trial.state == "done", trial.reason
        assert [number for number, _ in trial.curve] == [1, 2, 3, 4, 5, 6]
    else:
        assert trial.state == "failed"
        assert str(trial.reason).startswith("out of memory with half the batch too (")
        assert "allocate" in str(trial.reason)


@pytest.mark.slow
def test_what_rays_memory_monitor_kills_has_its_second_chance(tmp_path: Path) -> None:
    # A machine that is too full whatever runs on it.
    fullness = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
    config = write_study(tmp_path, search={"trials": 1, "scheduler": "none"})
    out = tmp_path / "run"
    with started_head(**fullness) as full:
        finished = run(*("--config", config, "--address", full.address, "--out", out), timeout=180)
    assert finished.returncode == 1, finished.stdout + finished.stderr
    (trial,) = trials_of(out)
    assert trial.state == "failed"
    assert str(trial.reason).startswith("out of memory with half the batch too (")
    assert "memory" in str(trial.reason).partition("(")[2], trial.reason
    assert trial.accumulation == 2
