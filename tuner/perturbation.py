"""How a successor's parameters follow from those of the trial whose weights it takes over.

Each parameter by itself, as in Jaderberg et al., "Population based training of neural networks",
2017: drawn anew with one chance in four, else a real number is multiplied by 0.8 or 1.2, and what
is counted or listed moves to the next value below or above. What would leave the space stays at its
bound.
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
    """The parameters with those named by `paths` perturbed, in this order.

    Args:
        params: of the donor; not changed.
        space: that they lie in, and the result too.
        paths: those that may change.
        random: what the choices are drawn from.
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
    """Any value: of a real number on a logarithmic scale with equal chances for equal ratios."""
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
    """As Optuna draws: each whole number stands for the half below and above it."""
    drawn = np.exp(random.uniform(np.log(low - 0.5), np.log(high + 0.5)))
    return min(max(round(float(drawn)), low), high)


def _moved(parameter: ParameterSpace, value: Value, up: int) -> Value:
    """The value one step down or up."""
    if isinstance(parameter, FloatSpace) and parameter.step is None:
        assert isinstance(value, int | float)
        return min(max(float(value) * _FACTORS[up], parameter.low), parameter.high)
    values = parameter.values()
    index = parameter.index(value) + (1 if up else -1)
    return values[min(max(index, 0), len(values) - 1)]
