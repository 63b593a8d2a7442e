"""What a training step and the simulation of its scenes make the host wait for, on a device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import Trainer
from model.precision import Amp, PrecisionConfig
from tests.model.test_step_sizes import config_of

ROOT = Path(__file__).resolve().parents[2]

LOOK = "model/ahead.py: read"


@pytest.fixture(scope="module")
def waits() -> dict[str, dict[str, int]]:
    """Places that wait, by what was run on a device that is not there: tests/model/pretended.py."""
    finished = subprocess.run(
        [sys.executable, "-m", "tests.model.pretended"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    found: dict[str, dict[str, int]] = json.loads(finished.stdout)
    return found


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("family", ["candidate", "image", "snapshot"])
def test_the_device_has_work_whenever_the_host_looks_but_at_the_end_of_an_epoch(
    waits: dict[str, dict[str, int]], family: str, parts: int
) -> None:
    assert waits[f"{family}, {parts} parts"] == {LOOK: 1}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("family", ["candidate", "image", "snapshot"])
def test_cuda_sees_no_wait_in_training_steps(family: str, amp: Amp, tmp_path: Path) -> None:
    plain = config_of(family, 12, tmp_path)
    config = plain.model_copy(update={"precision": PrecisionConfig(amp=amp)})
    trainer = Trainer(config, "cuda")
    trainer.run_epoch()  # all that happens once
    batches = list(trainer.source.train_batches(1, 2, 0))
    trainer.source.train_batches = lambda *_: iter(batches * 2)  # type: ignore[method-assign]
    torch.cuda.set_sync_debug_mode("error")
    try:
        tally = trainer._train_epoch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tally.n_finite == 4


@pytest.mark.parametrize("kind", ["simulate", "simulate, DFT codes", "simulate, hardware errors"])
def test_a_simulation_waits_for_nothing(waits: dict[str, dict[str, int]], kind: str) -> None:
    assert waits[kind] == {}


@pytest.mark.parametrize(
    "estimator", ["R_samp", "R_samp, SVD", "candidates", "crb", "nomp", "nomp, blind", "somp"]
)
def test_an_estimator_keeps_to_its_device(waits: dict[str, dict[str, int]], estimator: str) -> None:
    """Operands on two devices would have ended it, as far as made-up values lead into it."""
    assert estimator in waits


def test_every_kind_of_wait_is_seen(waits: dict[str, dict[str, int]]) -> None:
    known = {name: places for name, places in waits.items() if name.startswith("known: ")}
    assert len(known) == 10
    for name, places in known.items():
        assert list(places.values()) == [1], name
