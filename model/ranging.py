"""The range reported for a slot, and its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Goal = Literal["f1", "gospa", "count"]

# The utility of a range error d is 1 - (d / reach)^2 within the reach, and 0 beyond. With the GOSPA
# cutoff of 2 m as reach it is the cost that GOSPA saves; for F1 it is a smooth tolerance of 1 m.
REACH: dict[Goal, float] = {"f1": 1.25, "gospa": 2.0, "count": 2.0}
_ASCENTS = 4  # steps that move a range to the posterior mean within reach


@dataclass(frozen=True)
class NamedRange:
    """The range of each slot, from its distribution over cells."""

    at: Tensor  # (B, r) [m]
    worth: Tensor  # (B, r) in [0, 1], expected utility
    variance: Tensor  # (B, r) [m^2] of the distribution within reach


@torch.no_grad()
def named_range(log_pointer: Tensor, ranges: Tensor, reach: float) -> NamedRange:
    """The range that maximises the expectation of a utility quadratic in the error.

    Args:
        log_pointer: (B, r, S) log probabilities of the cells.
        ranges: (B, r, S) of the cells, at least two, evenly spaced from near to far [m].
        reach: error beyond which the utility is 0 [m].
    """
    weight = log_pointer.exp()

    def worth(at: Tensor) -> Tensor:
        """Expected utility of every range in ``at`` (B, r, T)."""
        off = (ranges.unsqueeze(-2) - at.unsqueeze(-1)) / reach
        return ((1.0 - off.square()).clamp_min(0.0) * weight.unsqueeze(-2)).sum(-1)

    best = worth(ranges).argmax(-1, keepdim=True)
    chosen = ranges.gather(-1, best)
    for _ in range(_ASCENTS):
        near = weight * ((ranges - chosen).abs() < reach)
        near = near / near.sum(-1, keepdim=True)
        chosen = (near * ranges).sum(-1, keepdim=True)
    cell = (ranges[..., -1] - ranges[..., 0]) / (ranges.shape[-1] - 1)
    variance = (near * (ranges - chosen).square()).sum(-1) + cell.square() / 12.0
    return NamedRange(chosen.squeeze(-1), worth(chosen).squeeze(-1), variance)
