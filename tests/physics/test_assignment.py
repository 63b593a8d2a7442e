"""Assignments against all that there are."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from physics.assignment import FEW, assign, assign_few

CAP = 1e3


def problems(n_rows: int, n_columns: int, share: float = 0.6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * n_rows + n_columns)
    cost = torch.randn(30, n_rows, n_columns, generator=generator)
    return cost, torch.rand(cost.shape, generator=generator) < share


def worth(cost: Tensor, allowed: Tensor, assigned: Tensor, cap: float) -> float:
    """Of one problem's assignment, which must be one."""
    pairs = [(r, c) for r, c in enumerate(assigned.tolist()) if c >= 0]
    assert len({c for _, c in pairs}) == len(pairs)
    assert all(allowed[r, c] for r, c in pairs)
    return math.fsum(float(cost[r, c]) - cap for r, c in pairs)


def best(cost: Tensor, allowed: Tensor, cap: float) -> float:
    """The least worth of all assignments."""
    n_rows, n_columns = cost.shape
    least = 0.0
    for k in range(1, min(n_rows, n_columns) + 1):
        for rows in itertools.permutations(range(n_rows), k):
            for columns in itertools.combinations(range(n_columns), k):
                pairs = list(zip(rows, columns, strict=True))
                if all(allowed[pair] for pair in pairs):
                    least = min(least, math.fsum(float(cost[pair]) - cap for pair in pairs))
    return least


@pytest.mark.parametrize("function", [assign, assign_few])
@pytest.mark.parametrize("shape", [(4, 3), (3, 4), (1, 5), (5, 1), (4, 4)])
@pytest.mark.parametrize("cap", [CAP, 0.5])
def test_the_cheapest_of_all_assignments_is_found(
    function: object, shape: tuple[int, int], cap: float
) -> None:
    cost, allowed = problems(*shape)
    allowed &= cost < cap
    assigned = function(cost, allowed, cap)  # type: ignore[operator]
    assert assigned.dtype == torch.int64
    assert assigned.shape == cost.shape[:2]
    for item in range(len(cost)):
        found = worth(cost[item], allowed[item], assigned[item], cap)
        assert found == pytest.approx(best(cost[item], allowed[item], cap), abs=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_both_ways_take_the_same_pairs(share: float) -> None:
    cost, allowed = problems(16, FEW, share)
    assert torch.equal(assign_few(cost, allowed, CAP), assign(cost, allowed, CAP))
    none = assign_few(cost[:, :0], allowed[:, :0], CAP)
    assert none.shape == (len(cost), 0)
    assert assign_few(cost[:0], allowed[:0], CAP).shape == (0, 16)


def test_costs_that_differ_little_beside_the_cap_are_told_apart() -> None:
    cost = torch.tensor([[[1.0 + 1e-6, 1.0]]])
    allowed = torch.ones_like(cost, dtype=torch.bool)
    for function in (assign, assign_few):
        assert function(cost, allowed, 1e6).tolist() == [[1]]


def test_what_is_barred_may_hold_anything() -> None:
    cost, allowed = problems(6, 3)
    barred = cost.masked_fill(~allowed, torch.nan)
    for function in (assign, assign_few):
        assert torch.equal(function(barred, allowed, CAP), function(cost, allowed, CAP))


def test_too_many_columns_are_refused() -> None:
    cost, allowed = problems(2, FEW + 1)
    with pytest.raises(ValueError, match=f"{FEW + 1} columns; expected at most {FEW}"):
        assign_few(cost, allowed, CAP)
