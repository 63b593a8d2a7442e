"""Checks whether a search's sampler, cost and space are compatible.

Each function returns one line that starts with the field, or None if there is no conflict.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tuner.space import n_points

if TYPE_CHECKING:
    from tuner.config import SearchConfig

MAX_GRID = 100_000  # maximum points of a grid, which are enumerated for every proposal


def sampler_refusal(search: SearchConfig) -> str | None:
    """Return why the sampler cannot search this space or learn from an earlier study."""
    sampler = search.sampler
    if search.warm_start is not None and sampler in ("random", "grid"):
        return (
            f"search.warm_start: the sampler {sampler} learns nothing from earlier trials; "
            "take tpe, gp or cmaes"
        )
    n_moved = len(search.moved_by_cmaes())
    if sampler == "cmaes" and n_moved < 2:
        return (
            "search.sampler: cmaes needs two or more float or int parameters in search.space, "
            f"which has {n_moved}; take tpe"
        )
    if sampler != "grid":
        return None
    endless = [path for path, parameter in search.space.items() if parameter.size == math.inf]
    if endless:
        return (
            f"search.sampler: grid needs a finite space, and {endless[0]} is a float without "
            "step; give it a step, make it categorical, or take another sampler"
        )
    if n_points(search.space) > MAX_GRID:
        return (
            f"search.sampler: grid has {n_points(search.space):.0f} points in this space, more "
            f"than {MAX_GRID}; take wider steps or another sampler"
        )
    return None


def cost_refusal(search: SearchConfig) -> str | None:
    """Return why the search cannot have a second objective."""
    if search.cost is None:
        return None
    if search.scheduler != "none":
        return (
            f"search.cost: the scheduler {search.scheduler} judges by the objective alone, and "
            "would stop cheap networks that belong to the front; take search.scheduler=none"
        )
    if search.least_chance:
        return (
            "search.cost: search.least_chance judges by the objective alone, and would stop "
            "cheap networks that belong to the front; take search.least_chance=0"
        )
    if search.sampler == "cmaes":
        return "search.cost: the sampler cmaes has one objective; take tpe, gp, random or grid"
    if search.warm_start is not None:
        return (
            "search.cost: search.warm_start tells the sampler one objective a trial; "
            "one of the two must go"
        )
    front_end = [path for path in search.space if path.startswith("network.candidates.")]
    if front_end:
        return (
            f"search.cost: counts the network alone, and {front_end[0]} changes what precedes "
            "it; take it out of search.space"
        )
    return None
