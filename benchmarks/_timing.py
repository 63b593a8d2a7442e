"""Timing of alternating runs, and the memory that a call adds."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def alternate(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, with all calls alternating in every round.

    Alternating spreads slow periods of the machine over the calls, so that the ratio of medians of
    a run is reliable on a busy machine too. Every timed call follows an untimed one of the same
    function, so that it is not affected by the caches and the memory left by the others.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the rounds of slow / fast."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


class PeakMemory(TorchDispatchMode):
    """Tracks the bytes of tensors alive at the same time, beyond those from before the block.

    Results of operations are counted, the scratch space inside a LAPACK call is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        borrowed = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage(), borrowed)
        return result

    def _count(self, storage: Any, borrowed: set[int]) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if not size or address in borrowed or address in self._known:
            return
        self._known.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


def peak_bytes(call: Callable[[], object]) -> int:
    """Peak memory of a call in bytes, beyond its arguments."""
    with PeakMemory() as memory:
        call()
    return memory.peak


def parser(description: str) -> argparse.ArgumentParser:
    """Parser with the arguments of all benchmarks."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    p.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=9, help="timed rounds (default: %(default)s)")
    return p


def machine_name(device: torch.device) -> str:
    """Name of the GPU, or name and number of cores of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def save(figures: dict[str, Any], path: Path | None, device: torch.device | str) -> None:
    """Write the figures with a description of the machine.

    Args:
        device: where the figures were computed; a GPU does not appear in CPU benchmarks.
    """
    if path is not None:
        machine = {
            "name": machine_name(torch.device(device)),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        path.write_text(json.dumps({**figures, "machine": machine}, indent=2) + "\n")


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"
