"""What `make run` passes on."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("arguments", "names_a_study"),
    [
        ("", True),
        ("--out runs/mine", True),
        ("--resume runs/mine", False),
        ("--config=a.yaml", False),
    ],
)
def test_make_run_names_the_quickstart_unless_another_study_is_named(
    arguments: str, names_a_study: bool
) -> None:
    # Not as a part of the make that may run this test.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    shown = subprocess.run(
        ["make", "-n", "run", f"ARGS={arguments}"],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
    )
    command = shown.stdout.splitlines()[-1]
    assert "-m tuner.run" in command
    assert command.endswith(arguments)
    assert ("--config configs/quickstart.yaml" in command) == names_a_study
