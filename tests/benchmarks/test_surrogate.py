from __future__ import annotations

import numpy as np
import pytest
from pydantic import TypeAdapter
from scipy.optimize import check_grad

from benchmarks._surrogate import Process, Recorded, Surrogate, unit_cube
from tuner.space import SearchSpace

SPACE: SearchSpace = TypeAdapter(SearchSpace).validate_python(
    {
        "a": {"type": "float", "low": 1e-4, "high": 1.0, "log": True},
        "b": {"type": "int", "low": 2, "high": 6},
        "c": {"type": "categorical", "choices": [16, 32, 64]},
    }
)


def points(n: int) -> tuple[dict[str, float], ...]:
    rng = np.random.default_rng(0)
    return tuple(
        {
            "a": float(10 ** rng.uniform(-4, 0)),
            "b": int(rng.integers(2, 7)),
            "c": int(rng.choice([16, 32, 64])),
        }
        for _ in range(n)
    )


def recorded(n: int, below: float = 0.0) -> Recorded:
    """Curves that follow from the parameters, lowered so far."""
    params = points(n)
    x = unit_cube(SPACE, params)
    last = 1.0 + (x[:, 0] - 0.4) ** 2 + 0.2 * x[:, 1]
    falling = np.exp(-np.arange(9)[None] * (0.3 + x[:, 2:3]))
    objective = last[:, None] * (1.0 + 0.5 * falling)
    objective[:, -1] = last
    seconds = np.repeat(2.0 + x[:, 2:3], 9, axis=1)
    seconds[:, 0] += 0.7
    repeats = objective[0] * np.array([0.99, 1.0, 1.01])[:, None]
    return Recorded(SPACE, params, objective - below, seconds, repeats - below)


def test_parameters_fill_the_unit_cube() -> None:
    corners = [
        {"a": 1e-4, "b": 2, "c": 16},
        {"a": 1.0, "b": 6, "c": 64},
        {"a": 0.01, "b": 4, "c": 32},
    ]
    assert unit_cube(SPACE, corners) == pytest.approx(np.array([[0.0] * 3, [1.0] * 3, [0.5] * 3]))


def test_the_gradient_of_the_likelihood_is_right() -> None:
    data = recorded(12)
    process = Process(unit_cube(SPACE, data.params), data.objective[:, -1])
    theta = np.array([0.2, -0.4, 0.6, 0.1, -1.0])
    error = check_grad(lambda t: process._loss(t)[0], lambda t: process._loss(t)[1], theta)
    assert error < 1e-4  # central differences of a value of order 10


def test_leaving_out_in_closed_form_is_leaving_out() -> None:
    data = recorded(15)
    x, y = unit_cube(SPACE, data.params), data.objective[:, -1]
    process = Process(x, y)
    squares = (((x[:, None] - x[None]) / process.lengths) ** 2).sum(-1)
    kernel = process._signal * np.exp(-0.5 * squares)
    noise = (process.noise / process._scale) ** 2
    centred = (y - process._mean) / process._scale
    for index in range(15):
        others = np.delete(np.arange(15), index)
        inner = kernel[np.ix_(others, others)] + noise * np.eye(14)
        mean = kernel[index, others] @ np.linalg.solve(inner, centred[others])
        expected = process._mean + process._scale * mean
        assert process.leave_one_out()[index] == pytest.approx(expected, rel=1e-6)


def test_replayed_curves_are_near_the_truth_and_never_rise() -> None:
    seen, truth = Surrogate(recorded(40)), recorded(60)
    for index in range(40, 60):  # the generator is the same: these were not seen
        curve = seen.curve(truth.params[index], None)
        assert curve.objective == pytest.approx(truth.objective[index], rel=0.05)
        assert curve.seconds == pytest.approx(truth.seconds[index], rel=0.05)
        noisy = seen.curve(truth.params[index], np.random.default_rng(index))
        assert np.all(np.diff(noisy.objective) <= 0)
        assert noisy.objective[-1] != curve.objective[-1]


def test_an_objective_below_zero_is_replayed_as_one_above_is() -> None:
    seen, truth = Surrogate(recorded(40, below=20.0)), recorded(60, below=20.0)
    spread = truth.objective[:, -1].std()
    curves = [seen.curve(truth.params[index], None).objective for index in range(40, 60)]
    off = np.abs(np.array(curves) - truth.objective[40:])
    assert off[:, -1].max() < 0.2 * spread
    assert off.mean() < 0.3 * spread, "the curves fall by five times the spread"
    noisy = seen.curve(truth.params[40], np.random.default_rng(0))
    assert np.all(np.diff(noisy.objective) <= 0)
    params = points(1)[0]
    last = [seen.curve(params, np.random.default_rng(k)).objective[-1] for k in range(400)]
    measured = truth.repeats[:, -1].std(ddof=1)
    assert np.std(last) == pytest.approx(measured, rel=0.15)
    assert seen.leave_one_out()["noise"] == pytest.approx(measured)


def test_a_trial_varies_as_seeds_were_found_to() -> None:
    seen = Surrogate(recorded(30))
    params = points(1)[0]
    last = [seen.curve(params, np.random.default_rng(k)).objective[-1] for k in range(400)]
    assert np.log(last).std() == pytest.approx(0.01, rel=0.15)  # 1 / sqrt(2 * 400) is 0.035
    first = seen.curve(params, np.random.default_rng(5))
    assert np.array_equal(first.objective, seen.curve(params, np.random.default_rng(5)).objective)


def test_what_was_recorded_can_be_replayed() -> None:
    found = Recorded.load()
    assert found.objective.shape == found.seconds.shape == (len(found.params), 27)
    assert np.all(np.diff(found.objective, axis=1) <= 0)
    assert np.all(found.seconds > 0)
    assert len(found.repeats) >= 2
    quality = Surrogate(found).leave_one_out()
    assert quality["rank_correlation"] > 0.5
    assert quality["explained"] > 0.3
