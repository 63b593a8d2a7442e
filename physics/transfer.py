"""From the host to a device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; the host goes on before it has come there.

    What the device computes with it comes after it. From ordinary memory the host would wait until
    the device has done all that was asked of it before: the tensor goes by pinned memory, which
    PyTorch keeps until it has been read.
    """
    if device.type in ("cpu", "meta") or tensor.device.type != "cpu":
        return tensor.to(device)
    # Contiguous: rows that share their memory cannot be pinned as they lie.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)
