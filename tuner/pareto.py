"""Two objectives: the finished trials that no other beats in accuracy and in cost at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tuner.records import TrialRecord
from tuner.study import Ledger


def pareto_front(ledger: Ledger) -> list[TrialRecord]:
    """The front of a study, the cheapest first.

    Raises:
        ValueError: the study has one objective.
    """
    cost = ledger.config.search.cost
    if cost is None:
        raise ValueError("search.cost: the study has one objective, and so no front")
    return front_of(ledger.ranking(), cost)


def front_of(ranking: Sequence[TrialRecord], cost: str) -> list[TrialRecord]:
    """Ranked trials that none dominates, the cheapest first.

    One trial dominates another that is at most as good in both objectives and worse in one; of
    equal ones all are on the front.
    """
    front: list[TrialRecord] = []
    lowest = (math.inf, math.inf)
    for trial in sorted(ranking, key=lambda t: (t.metrics[cost], t.objective, t.number)):
        assert trial.objective is not None  # it ranks
        reached = trial.objective, trial.metrics[cost]
        if reached[0] < lowest[0] or reached == lowest:
            front.append(trial)
            lowest = reached
    return front
