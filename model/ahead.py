"""A host that stays ahead of its device: it looks at values once it has asked for more work."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Look:
    """Values on their way from a device to the host.

    They set out when this is made, behind all that the device's current stream was asked for
    before. Who reads them waits until they have come, and for nothing that was asked for since.

    Args:
        values: (n,), on a CPU or a CUDA device.
    """

    def __init__(self, values: Tensor) -> None:
        # Into pinned memory, which PyTorch takes for copies to the host that nobody waits for.
        self._values = values.to("cpu", non_blocking=True)
        self._come: torch.cuda.Event | None = None
        if values.device.type != "cpu":
            self._come = torch.cuda.Event()
            self._come.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        """The n values."""
        if self._come is not None:
            self._come.synchronize()
        values: list[float] = self._values.tolist()
        return values


def ahead_of(device: torch.device) -> int:
    """Batches and steps that a device is asked for before the host looks at the ones before."""
    return 0 if device.type == "cpu" else 1


def delayed(items: Iterable[T], by: int) -> Iterator[T]:
    """Each of the items when ``by`` more have been made after it, or there are no more."""
    waiting: deque[T] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > by:
            yield waiting.popleft()
    yield from waiting
