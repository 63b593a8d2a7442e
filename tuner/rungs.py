"""The epochs at which a scheduler compares trials, and its cut-offs there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tuner.config import SearchConfig
from tuner.space import n_points


def rungs_of(search: SearchConfig, epochs: int) -> list[int]:
    """Return the epochs after which ASHA, Hyperband or PBT may stop trials; else an empty list."""
    if search.scheduler == "pbt":
        return search.milestones(epochs)
    if search.scheduler not in ("asha", "asha-pausing", "hyperband"):
        return []
    grace, factor = min(search.grace_epochs, epochs), search.reduction_factor
    count = math.ceil(math.log(epochs / grace, factor) - 1e-9)
    return [grace * factor**index for index in range(count)]


def epochs_in_all(search: SearchConfig, epochs: int) -> int | None:
    """Return the approximate total of epochs with PBT and `asha-pausing`; None for others.

    With `asha-pausing`, the number of trials that continue from a rung is estimated by its final
    best; trials that are among the best only temporarily are not counted.
    """
    if search.scheduler == "pbt":
        whole = search.population_trials(epochs)
        return search.trials // whole * search.population * epochs
    if search.scheduler != "asha-pausing":
        return None
    there, last, found = int(min(search.trials, n_points(search.space))), 0, 0
    for rung in [*rungs_of(search, epochs), epochs]:
        found += there * (rung - last)
        least = min(there, max(1, search.promote))
        there, last = max(there // search.reduction_factor, least), rung
    return found


def most_waiting(search: SearchConfig) -> int:
    """Return the approximate maximum number of trials that wait at rungs with `asha-pausing`."""
    there = int(min(search.trials, n_points(search.space)))
    return max(there // search.reduction_factor, min(there, max(1, search.promote)))


def cut_off(objectives: Sequence[float], factor: int) -> float | None:
    """Return ASHA's cut-off at a rung for the objectives reached there; None if there are none."""
    return float(np.percentile(objectives, 100 / factor)) if objectives else None
