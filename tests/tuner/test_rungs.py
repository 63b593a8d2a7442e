from __future__ import annotations

import numpy as np
import pytest
from ray.tune.schedulers.async_hyperband import _Bracket

from tuner.config import SearchConfig
from tuner.rungs import cut_off, rungs_of


@pytest.mark.parametrize(
    ("grace", "factor", "epochs"),
    [
        (1, 3, 2),
        (2, 2, 8),
        (1, 3, 27),
        (1, 3, 81),
        (1, 10, 1000),
        (5, 4, 100),
        (4, 2, 4),
        (9, 2, 4),
    ],
)
def test_rungs_are_those_at_which_asha_stops(grace: int, factor: int, epochs: int) -> None:
    search = SearchConfig(grace_epochs=grace, reduction_factor=factor)
    bracket = _Bracket(min(grace, epochs), epochs, factor, 0)  # Ray's own
    milestones = sorted(milestone for milestone, _ in bracket._rungs)
    assert rungs_of(search, epochs) == [m for m in milestones if m < epochs]


def test_other_schedulers_have_no_rungs() -> None:
    assert rungs_of(SearchConfig(scheduler="none"), 81) == []
    assert rungs_of(SearchConfig(scheduler="median"), 81) == []


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_the_cut_off_is_that_of_ray(factor: int) -> None:
    values = np.random.default_rng(0).lognormal(size=17).tolist()
    bracket = _Bracket(1, 9, factor, 0)
    recorded = {str(index): -value for index, value in enumerate(values)}  # Ray's better is larger
    found = cut_off(values, factor)
    assert found == pytest.approx(-float(bracket.cutoff(recorded)), rel=1e-12)
    assert cut_off([], factor) is None
