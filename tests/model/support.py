"""What tests of networks with cells of their own share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.prediction import Prediction


def judged_slots(
    n_scenes: int,
    n_slots: int,
    n_cells: int,
    *,
    seed: int = 0,
    sharpness: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Prediction:
    """A prediction with cells of its own, drawn: directions, evenly spaced ranges, weights."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=dtype)

    size = (n_scenes, n_slots)
    near, span = uniform(0.5, 4.0, *size, 1), uniform(0.2, 6.0, *size, 1)
    ranges = near + span * torch.linspace(0, 1, n_cells, dtype=dtype)
    directions = torch.stack([uniform(-1.0, 1.0, *size), uniform(-0.5, 0.5, *size)], -1)
    cells = torch.cat(
        [directions.unsqueeze(2).expand(-1, -1, n_cells, -1), ranges.unsqueeze(-1)], -1
    )
    score = sharpness * torch.randn(*size, n_cells, generator=generator, dtype=dtype)
    root = math.radians(1.0) * torch.randn(*size, 2, 2, generator=generator, dtype=dtype)
    log_pointer = torch.log_softmax(score, -1)
    position = torch.cat([directions, (log_pointer.exp() / ranges).sum(-1, keepdim=True)], -1)
    factor = torch.randn(n_scenes, 9, n_slots, generator=generator, dtype=torch.complex128)
    return Prediction(
        factor=factor,
        existence=2.0 * torch.randn(*size, generator=generator, dtype=dtype),
        log_pointer=log_pointer,
        position=position,
        cells=cells,
        angle_covariance=root @ root.mT,
    )
