from __future__ import annotations

import math

import numpy as np
import pytest

from tuner.perturbation import perturbed
from tuner.space import CategoricalSpace, FloatSpace, IntSpace, ParameterSpace, Value

MANY = 4000


def outcomes(parameter: ParameterSpace, value: Value) -> list[Value]:
    random = np.random.default_rng(7)
    return [perturbed({"x": value}, {"x": parameter}, ["x"], random)["x"] for _ in range(MANY)]


def share(found: list[Value], wanted: Value) -> float:
    return sum(one == wanted for one in found) / len(found)


TOLERANCE = 4 * math.sqrt(0.25 / MANY)  # four standard deviations of a share


def test_a_real_number_is_scaled_or_in_one_of_four_cases_drawn_anew() -> None:
    found = outcomes(FloatSpace(low=1e-4, high=1e-1, log=True), 1e-2)
    for factor in (0.8, 1.2):
        assert share(found, 1e-2 * factor) == pytest.approx(0.375, abs=TOLERANCE)
    drawn = [float(x) for x in found if x not in (1e-2 * 0.8, 1e-2 * 1.2)]  # type: ignore[arg-type]
    assert len(drawn) / MANY == pytest.approx(0.25, abs=TOLERANCE)
    assert all(1e-4 <= x <= 1e-1 for x in drawn)
    # Equal chances for equal ratios: a third in each decade.
    thirds = np.histogram(np.log10(drawn), bins=3, range=(-4, -1))[0] / len(drawn)
    assert thirds == pytest.approx([1 / 3] * 3, abs=4 * math.sqrt(0.25 / len(drawn)))


def test_a_linear_number_is_drawn_evenly_and_stops_at_its_bounds() -> None:
    found = outcomes(FloatSpace(low=0.0, high=0.5), 0.45)
    assert share(found, 0.5) == pytest.approx(0.375, abs=TOLERANCE)
    drawn = [float(x) for x in found if x not in (0.5, 0.45 * 0.8)]  # type: ignore[arg-type]
    assert np.mean(drawn) == pytest.approx(0.25, abs=0.02)
    assert all(0.0 <= x <= 0.5 for x in drawn)


@pytest.mark.parametrize(
    ("parameter", "value", "near"),
    [
        (IntSpace(low=2, high=40, step=2), 10, (8, 12)),
        (IntSpace(low=2, high=40, step=2), 2, (2, 4)),
        (IntSpace(low=1, high=64, log=True), 8, (7, 9)),
        (CategoricalSpace(choices=("a", "b", "c", "d", None)), "c", ("b", "d")),
        (CategoricalSpace(choices=(True, False)), False, (True, False)),
        (FloatSpace(low=0.0, high=0.6, step=0.1), 0.3, (0.2, 0.4)),
        (FloatSpace(low=0.0, high=0.6, step=0.1), 0.1 + 0.2, (0.2, 0.4)),  # as floats add
    ],
)
def test_what_is_counted_or_listed_moves_to_the_next_value(
    parameter: ParameterSpace, value: Value, near: tuple[Value, Value]
) -> None:
    found = outcomes(parameter, value)
    assert all(parameter.contains(one) for one in found)
    anew = 0.25 / parameter.size if parameter.size < 10 else 0.0
    for one in near:
        assert share(found, one) == pytest.approx(0.375 + anew, abs=0.06)
    assert len(set(found)) == parameter.size or parameter.size > 30


def test_each_parameter_changes_by_itself_and_others_stay() -> None:
    space: dict[str, ParameterSpace] = {
        "a": FloatSpace(low=0.0, high=1.0),
        "b": FloatSpace(low=0.0, high=1.0),
        "kept": IntSpace(low=1, high=9),
    }
    before: dict[str, Value] = {"a": 0.5, "b": 0.5, "kept": 3}
    random = np.random.default_rng(0)
    found = [perturbed(before, space, ["a", "b"], random) for _ in range(100)]
    assert {one["kept"] for one in found} == {3}
    assert {(one["a"], one["b"]) for one in found} >= {
        (a, b) for a in (0.4, 0.6) for b in (0.4, 0.6)
    }
    assert before == {"a": 0.5, "b": 0.5, "kept": 3}


def test_zero_leaves_zero_only_when_drawn_anew() -> None:
    found = outcomes(FloatSpace(low=0.0, high=0.6), 0.0)
    assert share(found, 0.0) == pytest.approx(0.75, abs=TOLERANCE)
