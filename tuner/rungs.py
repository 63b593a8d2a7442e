"""At which epochs a scheduler looks at its trials, and what it asks of them there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tuner.config import SearchConfig
from tuner.space import n_points


def rungs_of(search: SearchConfig, epochs: int) -> list[int]:
    """The epochs after which ASHA, Hyperband or PBT may stop a trial; none for other schedulers."""
    if search.scheduler == "pbt":
        return search.milestones(epochs)
    if search.scheduler not in ("asha", "asha-pausing", "hyperband"):
        return []
    grace, factor = min(search.grace_epochs, epochs), search.reduction_factor
    count = math.ceil(math.log(epochs / grace, factor) - 1e-9)
    return [grace * factor**index for index in range(count)]


def epochs_in_all(search: SearchConfig, epochs: int) -> int | None:
    """Epochs that all trials will train, where that is about known: with PBT, and with pauses.

    With pauses as many go on at a rung as are among its best at the end; those who were among
    them for a time alone come on top.
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
    """How many trials wait at rungs at a time where they pause there, about and at most."""
    there = int(min(search.trials, n_points(search.space)))
    return max(there // search.reduction_factor, min(there, max(1, search.promote)))


def cut_off(objectives: Sequence[float], factor: int) -> float | None:
    """The objective that ASHA asks for at a rung where these were reached; None where none was."""
    return float(np.percentile(objectives, 100 / factor)) if objectives else None
