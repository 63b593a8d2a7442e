"""Checkpoints on disk: whole or not at all, and never pickle."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model import Trainer
from model.checkpoint import (
    Checkpoint,
    CheckpointError,
    export_best,
    load_tensors,
    read_config,
    save_tensors,
)
from model.files import replacing, write_text
from tests.tiny import tiny_config

TENSORS = {
    "weight": torch.arange(6.0).reshape(2, 3).T,
    "scalar": torch.tensor(3),
    "empty": torch.zeros(0, 3),
    "mask": torch.tensor([True, False]),
    "symbols": torch.tensor([1.0 + 2.0j, -1.0j]),
    "conjugated": torch.tensor([1.0 + 2.0j, -1.0j]).conj(),
    "negated": torch.tensor([1.0 + 2.0j]).conj().imag,
    "fp16": torch.tensor([0.5], dtype=torch.float16),
}


@pytest.mark.parametrize("more", [{}, {"bf16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}])
def test_tensors_come_back_as_they_were(tmp_path: Path, more: dict[str, torch.Tensor]) -> None:
    tensors = TENSORS | more
    save_tensors(tmp_path / "ours", tensors, {"a": "b", "c": "d"})
    back, metadata = load_tensors(tmp_path / "ours")
    assert metadata == {"a": "b", "c": "d"}
    torch.testing.assert_close(back, dict(sorted(tensors.items())), rtol=0, atol=0)
    whole = {k: v.resolve_conj().resolve_neg().contiguous() for k, v in tensors.items()}
    save_file(whole, tmp_path / "torch", metadata)
    assert load_file(tmp_path / "torch").keys() == back.keys()
    (ours, theirs) = ((tmp_path / name).read_bytes() for name in ("ours", "torch"))
    # Metadata come in no order: what follows the head is the same to the byte.
    assert len(ours) == len(theirs)
    head = 8 + int.from_bytes(ours[:8], "little")
    assert ours[head:] == theirs[head:]


def test_a_failure_while_writing_leaves_the_old_file_whole(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    write_text(target, "old")

    def fail() -> None:
        with replacing(target) as fresh:
            fresh.write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config())
    trainer.run_epoch()
    trainer.save(tmp_path)
    trainer.run_epoch()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises((OSError, SafetensorError)):
            trainer.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    restored = Trainer(tiny_config())
    restored.load(tmp_path)
    assert restored.epoch == 1


def test_a_process_killed_while_saving_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from model import Trainer
from tests.tiny import tiny_config
trainer = Trainer(tiny_config())
trainer.run_epoch()
folder = Path(sys.argv[1])
trainer.save(folder)
print("saved", flush=True)
while True:
    trainer.save(folder)
"""
    for delay in (0.05, 0.17, 0.31):
        folder = tmp_path / f"{delay}" / "c"
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(folder)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"saved\n"
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        trainer = Trainer(tiny_config())
        trainer.load(folder)
        assert trainer.epoch == 1


def test_a_checkpoint_is_one_file_of_safetensors(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config())
    trainer.run_epoch()
    trainer.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    assert len(load_file(tmp_path / "checkpoint.safetensors")) > len(trainer.best_weights) * 3


def test_a_pickle_in_place_of_a_checkpoint_is_refused_and_never_run(tmp_path: Path) -> None:
    trace = tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (trace,))

    trainer = Trainer(tiny_config())
    for write in (pickle.dump, torch.save):
        with (tmp_path / "checkpoint.safetensors").open("wb") as file:
            write(Evil(), file)
        with pytest.raises(CheckpointError, match="not readable as safetensors"):
            trainer.load(tmp_path)
    assert not trace.exists()


def test_nothing_is_exported_before_an_epoch_was_scored(tmp_path: Path) -> None:
    Trainer(tiny_config()).save(tmp_path / "c")
    with pytest.raises(CheckpointError, match="no epoch was scored"):
        export_best(tmp_path / "c", tmp_path / "best")
    assert not (tmp_path / "best").exists()


def test_the_configuration_is_read_back_equal(tmp_path: Path) -> None:
    config = tiny_config(seed=7)
    trainer = Trainer(config)
    trainer.run_epoch()
    trainer.save(tmp_path / "c")
    export_best(tmp_path / "c", tmp_path / "best")
    assert read_config(tmp_path / "best") == config == Checkpoint.load(tmp_path / "c").config


def test_an_unknown_key_in_a_saved_configuration_is_named(tmp_path: Path) -> None:
    write_text(tmp_path / "config.json", json.dumps({"network": {"widht": 3}}))
    with pytest.raises(CheckpointError, match=r"network\.widht holds '3'"):
        read_config(tmp_path)
