"""Minimum-cost one-to-one assignment of many small problems in one batch."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from physics.transfer import sent

FEW = 6  # largest number of columns for which all subsets are enumerated


@torch.no_grad()
def assign(cost: Tensor, allowed: Tensor, cap: float) -> Tensor:
    """Column of each row, or -1, in the cheapest one-to-one set of allowed pairs.

    Each pair short of ``min(R, C)`` pairs costs ``cap``: with a cap above what all other pairs can
    cost together, the set has as many pairs as possible. Uses the Hungarian method on the host,
    which waits for the device.

    Args:
        cost: (B, R, C) real, below the cap for allowed pairs; any value elsewhere.
        allowed: (B, R, C) bool.
        cap: finite.

    Returns:
        (B, R) int64.

    Source: Kuhn, "The Hungarian method for the assignment problem", Naval Res. Logist. Quart.
    2(1-2), 1955, as implemented in SciPy.
    """
    costs, may = torch.where(allowed, cost, cap).cpu().numpy(), allowed.cpu().numpy()
    assigned = np.full(costs.shape[:2], -1, dtype=np.int64)
    for item in np.flatnonzero(may.any((1, 2))):
        rows, columns = linear_sum_assignment(costs[item])
        assigned[item, rows] = np.where(may[item, rows, columns], columns, -1)
    return sent(torch.from_numpy(assigned), cost.device)


@torch.no_grad()
def assign_few(cost: Tensor, allowed: Tensor, cap: float) -> Tensor:
    """Like :func:`assign`, for at most FEW columns, without reading any value on the host.

    It runs on the device without making the host wait; on a CPU :func:`assign` is faster. For each
    row it stores the least cost of every set of columns that can be taken so far, 2^C numbers per
    problem, and then backtracks through them.

    Args:
        cost, allowed, cap: as for :func:`assign`; C at most FEW.

    Returns:
        (B, R) int64. Among sets of equal cost it may choose another one than :func:`assign`.

    Raises:
        ValueError: more than FEW columns.

    Source: Held and Karp, "A dynamic programming approach to sequencing problems", J. SIAM 10(1),
    1962 (the recursion over subsets).
    """
    n_problems, n_rows, n_columns = cost.shape
    if n_columns > FEW:
        raise ValueError(f"cost has {n_columns} columns; expected at most {FEW}: use assign")
    subset = torch.arange(1 << n_columns, device=cost.device)
    bit = 1 << torch.arange(n_columns, device=cost.device)
    holds = (subset.unsqueeze(-1) & bit) != 0  # (2^C, C)
    before = (subset.unsqueeze(-1) & ~bit).flatten()  # the subset without the column
    # In double precision, as on the host: the cap may be a thousand times the costs.
    step = cost.double().masked_fill(~allowed, torch.inf).unsqueeze(-2)  # (B, R, 1, C)
    barrier = step.new_zeros(holds.shape).masked_fill(~holds, torch.inf)
    least = step.new_zeros(n_problems, len(subset)).masked_fill(subset > 0, torch.inf)
    taken = []
    for row in range(n_rows):
        reached = least.index_select(1, before).view(n_problems, len(subset), n_columns)
        value, column = (reached + step[:, row] + barrier).min(-1)
        taken.append(torch.where(value < least, column, -1))
        least = torch.minimum(value, least)
    at = (least - cap * holds.sum(-1, dtype=least.dtype)).argmin(-1, keepdim=True)
    columns = []
    for choice in reversed(taken):
        column = choice.gather(1, at)
        columns.append(column)
        at = torch.where(column < 0, at, at - (1 << column.clamp_min(0)))
    return torch.cat(columns[::-1], dim=1) if columns else at.new_empty(n_problems, 0)
