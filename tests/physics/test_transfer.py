"""What goes to a device arrives there as it was."""

from __future__ import annotations

import torch

from physics.transfer import sent


def test_tensors_of_any_layout_arrive(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(4, 3, generator=generator, dtype=torch.complex64)
    for tensor in (
        plain,
        plain.mT,
        plain.conj(),
        plain[:1].expand(5, 3),
        plain[:0],
        plain.real > 0,
    ):
        there = sent(tensor, device)
        assert there.device.type == device.type
        assert there.dtype == tensor.dtype
        assert torch.equal(there.cpu(), tensor)
        assert torch.equal(sent(there, device), there)
