from __future__ import annotations

import os
import subprocess
import sys

import pytest

from model.memory import keep_freed_memory

SCRIPT = """
import resource, sys, torch
from model.memory import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def step():
    # Together more than glibc's own adapting threshold lets a heap keep: twice the largest block.
    return sum(t.sum() for t in [torch.full((7 * 2**20,), 1.0) for _ in range(4)])
for _ in range(10):  # blocks find their place
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True
    )
    return int(found.stdout)


def test_blocks_that_are_freed_come_again_without_page_faults() -> None:
    pages = 10 * 4 * 7 * 2**22 // 4096  # of all blocks; huge pages may save most of them
    assert faults("given back") > pages / 600
    assert faults("kept") < pages / 2000


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
