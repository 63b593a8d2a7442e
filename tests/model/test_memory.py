from __future__ import annotations

import subprocess
import sys

from model.memory import keep_freed_memory

SCRIPT = """
import resource, sys, torch
from model.memory import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def step():
    # Three blocks at once: glibc's own adapting threshold keeps one of them at most.
    return sum(t.sum() for t in [torch.full((2**22,), 1.0) for _ in range(3)])
for _ in range(3):  # blocks find their place
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
    pages = 10 * 3 * 2**24 // 4096
    assert faults("given back") > pages / 10  # transparent huge pages may save most
    assert faults("kept") < pages / 100


def test_asked_again_it_answers_the_same() -> None:
    assert keep_freed_memory() is keep_freed_memory()
