"""Perturbation of parameters for a successor that takes over another trial's weights.

Each parameter is perturbed independently, as in Jaderberg et al., "Population based training of
neural networks", 2017: with a probability of one in four it is drawn anew; otherwise a real number
is multiplied by 0.8 or 1.2, and a discrete parameter moves to the next lower or higher value.
Values that would leave the space are clipped to its bounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from tuner.space import FloatSpace, ParameterSpace, SearchSpace, Value

_DRAWN_ANEW = 0.25  # chance
_FACTORS = (0.8, 1.2)


def perturbed(
    params: Mapping[str, Value],
    space: SearchSpace,
    paths: Iterable[str],
    random: np.random.Generator,
) -> dict[str, Value]:
    """Return the parameters, with those named by `paths` perturbed in this order.

    Args:
        params: the donor's parameters; not modified.
        space: the search space of the parameters and the result.
        paths: parameters that may change.
        random: random number generator.
    """
    changed = dict(params)
    for path in paths:
        parameter = space[path]
        if random.random() < _DRAWN_ANEW:
            changed[path] = _drawn(parameter, random)
        else:
            changed[path] = _moved(parameter, params[path], int(random.integers(2)))
    return changed


def _drawn(parameter: ParameterSpace, random: np.random.Generator) -> Value:
    """Draw any value of a parameter; on a logarithmic scale uniformly in the logarithm."""
    if not isinstance(parameter, FloatSpace) or parameter.step is not None:
        if parameter.type == "int" and parameter.log:
            return _log_int(parameter.low, parameter.high, random)
        values = parameter.values()
        return values[int(random.integers(len(values)))]
    low, high = parameter.low, parameter.high
    if not parameter.log:
        return float(random.uniform(low, high))
    drawn = float(np.exp(random.uniform(np.log(low), np.log(high))))
    return min(max(drawn, low), high)


def _log_int(low: int, high: int, random: np.random.Generator) -> int:
    """Draw an integer as Optuna does: each covers the interval of ±0.5 around it."""
    drawn = np.exp(random.uniform(np.log(low - 0.5), np.log(high + 0.5)))
    return min(max(round(float(drawn)), low), high)


def _moved(parameter: ParameterSpace, value: Value, up: int) -> Value:
    """Return the value one step down or up."""
    if isinstance(parameter, FloatSpace) and parameter.step is None:
        assert isinstance(value, int | float)
        return min(max(float(value) * _FACTORS[up], parameter.low), parameter.high)
    values = parameter.values()
    index = parameter.index(value) + (1 if up else -1)
    return values[min(max(index, 0), len(values) - 1)]
