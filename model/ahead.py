"""Asynchronous reads: the host queues more work on the device before it reads earlier values."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Look:
    """Values being copied asynchronously from a device to the host.

    Construction queues the copy on the device's current stream, after all work queued before.
    Reading waits for the copy, but not for work queued after it.

    Args:
        values: (n,), on a CPU or a CUDA device.
    """

    def __init__(self, values: Tensor) -> None:
        # PyTorch uses pinned memory for non-blocking copies to the host.
        self._values = values.to("cpu", non_blocking=True)
        self._come: torch.cuda.Event | None = None
        if values.device.type != "cpu":
            self._come = torch.cuda.Event()
            self._come.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        """Wait for the copy and return the n values."""
        if self._come is not None:
            self._come.synchronize()
        values: list[float] = self._values.tolist()
        return values


def ahead_of(device: torch.device) -> int:
    """Number of batches and steps queued on a device before the host reads earlier results."""
    return 0 if device.type == "cpu" else 1


def delayed(items: Iterable[T], by: int) -> Iterator[T]:
    """Yield each item once ``by`` later ones have been produced, or the input is exhausted."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > by:
            yield waiting.popleft()
    yield from waiting
