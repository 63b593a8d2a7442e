"""Transfers from the host to a device without synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without making the host wait.

    Later work on the device is ordered after the copy. From pageable memory the host would wait
    until the device has finished all queued work, so the tensor is copied through pinned memory,
    which PyTorch keeps until it has been read.
    """
    if device.type in ("cpu", "meta") or tensor.device.type != "cpu":
        return tensor.to(device)
    # Made contiguous first: rows that share memory cannot be pinned directly.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)
