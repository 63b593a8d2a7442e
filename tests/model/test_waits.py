"""What a training step and the simulation of its scenes make the host wait for, on a device."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SOLVED = "physics/tikhonov.py: solve_unchecked"  # whether the SVD has to solve some scenes again
SPLIT = "physics/subspace.py: forward"  # whether the eigendecomposition succeeded
LOOKED_AT = "model/training.py: _train_step"  # terms of the loss and the gradient's norm


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


@pytest.mark.parametrize("family", ["candidate", "image", "snapshot"])
def test_a_training_step_waits_for_its_device_at_three_places(
    waits: dict[str, dict[str, int]], family: str
) -> None:
    assert waits[family] == {SOLVED: 1, SPLIT: 1, LOOKED_AT: 1}


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
    assert len(known) == 9
    for name, places in known.items():
        assert list(places.values()) == [1], name
