from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tuner.capacity import Capacity, Machine
from tuner.cluster import Cluster
from tuner.config import StudyConfig
from tuner.errors import StudyError
from tuner.place import choose_place

LISTED = "GPU 0: NVIDIA A10G (UUID: GPU-0)"


@pytest.fixture(autouse=True)
def no_gpu_in_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """The only program on PATH but the shell's own."""
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def notes_of(gpus: float | None = None) -> list[str]:
    study = StudyConfig()
    resources = study.resources.model_copy(update={"gpus_per_trial": gpus})
    notes: list[str] = []
    choose_place(study.model_copy(update={"resources": resources}), None, notes)
    return notes


@pytest.mark.parametrize(
    ("cuda", "why"),
    [("13.0", "its driver has to be 580 or newer"), (None, "this PyTorch is built without CUDA")],
)
def test_a_gpu_that_pytorch_cannot_use_is_told_with_the_likely_reason(
    cuda: str | None, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    nvidia_smi(tmp_path, monkeypatch, f'echo "{LISTED}"')
    first, second = notes_of()
    assert first.startswith("no GPU is used: trials run on the CPU")
    assert second.startswith(f"nvidia-smi lists a GPU that PyTorch cannot use: {why}")
    with pytest.raises(StudyError, match=f"1 GPU a trial asked, but nvidia-smi lists .*: {why}"):
        notes_of(gpus=1)


@pytest.mark.parametrize("is_here", [True, False])
def test_it_is_told_of_a_ray_on_this_machine_too_and_of_no_other(
    is_here: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, f'echo "{LISTED}"')
    cluster = Cluster("a Ray", Capacity(Machine(cpus=2)), None, None, is_here=is_here)
    notes: list[str] = []
    choose_place(StudyConfig(), cluster, notes)
    assert "no GPU is used (there is none): trials run on the CPU" in notes
    assert any(note.startswith("nvidia-smi lists a GPU") for note in notes) == is_here


@pytest.mark.parametrize(
    "script", ["exit 9", "echo 'NVIDIA-SMI has failed'; exit 9", "echo 'No devices were found'"]
)
def test_without_a_gpu_nothing_more_is_said(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, script)
    assert len(notes_of()) == 1
    with pytest.raises(StudyError, match="1 GPU a trial asked, but this machine has none"):
        notes_of(gpus=1)


def test_without_a_driver_nothing_more_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert len(notes_of()) == 1


def test_who_declined_or_hid_the_gpu_is_not_warned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(tmp_path, monkeypatch, f'echo "{LISTED}"')
    assert len(notes_of(gpus=0)) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert len(notes_of()) == 1
