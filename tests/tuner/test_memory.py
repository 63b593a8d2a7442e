"""Memory that is not enough: real allocations that really fail."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tuner.support import kill, read_until, run, start, tiny_study, write_study
from tuner.config import load_study
from tuner.records import Assignment, TrialRecord
from tuner.study import Ledger
from tuner.trial import MemoryExhausted, TrialRun, is_out_of_memory

pytestmark = pytest.mark.long

# A step of the whole batch takes some 490 MB, one in two parts 340 MB, in four 190 MB.
BIG: dict[str, Any] = {
    "data": {"train_scenes": 512, "val_scenes": 8},
    "scene": {"n_snapshots": 16},
    "network": {"width": 64, "depth": 4, "conv_channels": 32},
    "training": {"batch_size": 512, "epochs": 2},
    "search": {
        "trials": 2,
        "scheduler": "none",
        "space": {"training.batch_size": {"type": "categorical", "choices": [512, 64]}},
    },
}
ENOUGH_FOR_HALF, TOO_LITTLE = 400, 230
# One arena, and what is freed goes back to the system: the limit is on the address space.
PLAIN_MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}


def confined(memory_mb: int, *arguments: object) -> list[object]:
    return ["--memory-mb", memory_mb, "--", *arguments]


def trials_of(folder: Path) -> list[TrialRecord]:
    ledger = Ledger(folder / "study.db", load_study(folder / "config.yaml"))
    try:
        return ledger.trials()
    finally:
        ledger.close()


def assert_halved(trial: TrialRecord) -> None:
    assert trial.state == "done", trial.reason
    assert [e for e, _ in trial.curve] == [1, 2]
    assert trial.accumulation == 2
    said = r"out of memory in epoch [12], goes on with its batches in 2 parts"
    assert re.fullmatch(said, trial.note)


@pytest.mark.slow
def test_a_trial_without_memory_is_tried_again_with_half_the_batch(tmp_path: Path) -> None:
    config, out = write_study(tmp_path, **BIG), tmp_path / "run"
    command = confined(ENOUGH_FOR_HALF, "--config", config, "--local", "--out", out)
    finished = run(*command, module="benchmarks._confined", timeout=280, **PLAIN_MALLOC)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    first, second = trials_of(out)
    assert_halved(first)
    assert (second.state, second.accumulation, second.note) == ("done", None, "")
    assert "allocate" in finished.stdout
    with (out / "trials.csv").open() as stream:
        assert [row["note"] for row in csv.DictReader(stream)] == [first.note, ""]
    assert first.note in (out / "report.html").read_text()
    if json.loads((out / "best.json").read_text())["trial"] == 0:
        held = json.loads((out / "best.json").read_text())["config"]["training"]
        assert (held["batch_size"], held["accumulation"]) == (512, 2)
    calm = run("--config", config, "--local", "--out", tmp_path / "calm", timeout=280)
    assert calm.returncode == 0, calm.stdout + calm.stderr
    for halved, whole in zip(first.curve, trials_of(tmp_path / "calm")[0].curve, strict=True):
        # The same gradients, summed in another order, and other draws of dropout.
        assert halved[1] == pytest.approx(whole[1], rel=1e-3)


@pytest.mark.slow
def test_the_second_chance_is_one_and_outlives_the_driver(tmp_path: Path) -> None:
    config, out = write_study(tmp_path, **BIG), tmp_path / "run"
    command = confined(ENOUGH_FOR_HALF, "--config", config, "--local", "--out", out)
    process = start(*command, module="benchmarks._confined", **PLAIN_MALLOC)
    read_until(process, "goes on with its batches in 2 parts")
    kill(process)
    command = confined(TOO_LITTLE, "--resume", out, "--local")
    resumed = run(*command, module="benchmarks._confined", timeout=280, **PLAIN_MALLOC)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    first, second = trials_of(out)
    assert first.state == "failed"
    assert str(first.reason).startswith("out of memory with half the batch too (epoch ")
    assert "lower training.batch_size" in str(first.reason)
    assert first.accumulation == 2
    assert second.state == "done"


@pytest.mark.slow
def test_memory_that_ends_in_the_middle_costs_no_finished_epoch(tmp_path: Path) -> None:
    config, out = write_study(tmp_path, **BIG), tmp_path / "run"
    process = start("--config", config, "--local", "--out", out)
    read_until(process, "trial 0000 epoch 1/2")
    kill(process)
    before = trials_of(out)[0].epochs
    command = confined(ENOUGH_FOR_HALF, "--resume", out, "--local")
    resumed = run(*command, module="benchmarks._confined", timeout=280, **PLAIN_MALLOC)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    trial = trials_of(out)[0]
    assert_halved(trial)
    assert trial.epochs[1] == before[1]


def ledger_in(folder: Path, **changes: Any) -> Ledger:
    return Ledger(folder / "study.db", tiny_study(folder, **changes))


def asked(ledger: Ledger) -> Assignment:
    trial = ledger.ask()
    assert trial is not None
    return trial


def test_the_ledger_halves_a_trial_once_in_all_sessions(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path)
    trial = asked(ledger)
    ledger.report(trial.number, {"epoch": 1, "objective": 0.5}, "/kept/checkpoint-00001")
    assert ledger.out_of_memory(trial.number, "no room") == 2
    assert ledger.out_of_memory(trial.number, "no room") is None
    ledger.close()
    (again,) = ledger_in(tmp_path).orphans()
    assert (again.number, again.params, again.seed) == (trial.number, trial.params, trial.seed)
    assert (again.checkpoint, again.epoch, again.accumulation) == ("/kept/checkpoint-00001", 1, 2)
    reopened = ledger_in(tmp_path)
    training = reopened.trial_config(again).training
    assert (training.batch_size, training.accumulation) == (8, 2)
    assert reopened.out_of_memory(trial.number, "no room") is None
    assert "out of memory in epoch 2" in reopened.trial(trial.number).note


def test_parts_are_doubled_and_single_scenes_are_not_halved(tmp_path: Path) -> None:
    ledger = ledger_in(tmp_path, training={"accumulation": 3})
    assert ledger.out_of_memory(asked(ledger).number, "no room") == 6
    (tmp_path / "single").mkdir()
    ledger = ledger_in(tmp_path / "single", training={"accumulation": 8})
    assert ledger.out_of_memory(asked(ledger).number, "no room") is None


def test_an_allocation_that_fails_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)  # of the allocator, not of a mock
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_trial_without_memory_keeps_nothing_and_is_no_failure_of_its_own(
    tmp_path: Path,
) -> None:
    config = tiny_study(tmp_path, data={"train_scenes": 8}).trial_config({}, seed=5)
    run = TrialRun(config)
    run.step()
    assert run._trainer is not None

    def fill() -> None:
        torch.empty(2**50)

    run._trainer.run_epoch = fill  # type: ignore[assignment, method-assign]
    with pytest.raises(MemoryExhausted, match=r"^epoch 2: .*allocate"):
        run.step()
    assert run._trainer is None
