"""The Pareto front of finished trials in accuracy and cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tuner.records import TrialRecord
from tuner.study import Ledger


def pareto_front(ledger: Ledger) -> list[TrialRecord]:
    """Return the Pareto front of a study, cheapest first.

    Raises:
        ValueError: the study has one objective.
    """
    cost = ledger.config.search.cost
    if cost is None:
        raise ValueError("search.cost: the study has one objective, and so no front")
    return front_of(ledger.ranking(), cost)


def front_of(ranking: Sequence[TrialRecord], cost: str) -> list[TrialRecord]:
    """Return the ranked trials that are not dominated, cheapest first.

    A trial dominates another one that is no better in both objectives and worse in at least one;
    equal trials are all on the front.
    """
    front: list[TrialRecord] = []
    lowest = (math.inf, math.inf)
    for trial in sorted(ranking, key=lambda t: (t.metrics[cost], t.objective, t.number)):
        assert trial.objective is not None  # ranked trials have one
        reached = trial.objective, trial.metrics[cost]
        if reached[0] < lowest[0] or reached == lowest:
            front.append(trial)
            lowest = reached
    return front
