"""At which epochs a scheduler looks at its trials, and what it asks of them there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tuner.config import SearchConfig


def rungs_of(search: SearchConfig, epochs: int) -> list[int]:
    """The epochs after which ASHA, Hyperband or PBT may stop a trial; none for other schedulers."""
    if search.scheduler == "pbt":
        return search.milestones(epochs)
    if search.scheduler not in ("asha", "asha-pausing", "hyperband"):
        return []
    grace, factor = min(search.grace_epochs, epochs), search.reduction_factor
    count = math.ceil(math.log(epochs / grace, factor) - 1e-9)
    return [grace * factor**index for index in range(count)]


def cut_off(objectives: Sequence[float], factor: int) -> float | None:
    """The objective that ASHA asks for at a rung where these were reached; None where none was."""
    return float(np.percentile(objectives, 100 / factor)) if objectives else None
