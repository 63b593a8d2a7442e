from __future__ import annotations

import os
import subprocess
import sys

import pytest

from model.memory import keep_freed_memory

MIB = 2**20
# Resident memory in place of page faults: not every kernel counts those.
SCRIPT = """
import torch
from model.memory import keep_freed_memory
torch.set_num_threads(1)
assert keep_freed_memory()
def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096
def step():
    # Together more than glibc's own adapting threshold lets a heap keep: twice the largest block.
    blocks = [torch.full((7 * 2**20,), 1.0) for _ in range(4)]
    return resident()
before = resident()
for _ in range(10):  # blocks find their place
    during = step()
print(during - before, resident() - before)
"""


def test_blocks_that_are_freed_stay_with_the_process() -> None:
    """glibc by itself keeps none to three of the four, as they come to lie."""
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    during, after = map(int, found.stdout.split())
    blocks = 4 * 28 * MIB
    assert during >= blocks
    assert after >= 0.95 * blocks


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_MMAP_THRESHOLD_", "65536"),
        ("MALLOC_TRIM_THRESHOLD_", "65536"),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=65536"),
    ],
)
def test_limits_of_the_environment_stay(name: str, value: str) -> None:
    script = "from model.memory import keep_freed_memory; print(keep_freed_memory())"
    found = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {name: value},
    )
    assert found.stdout.strip() == "False"


def test_asked_again_it_answers_the_same() -> None:
    assert keep_freed_memory() is keep_freed_memory()
