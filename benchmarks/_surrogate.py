"""Learning curves of any configuration, modelled from recorded ones.

A recorded curve is described by its last value and by how far above it each epoch was, relative to
that value. (Where objectives may be below zero, as a likelihood is, the value itself is used below
instead of its logarithm, and the standard deviation of the values instead of the value as the
scale.) The logarithm of the last value, and the first principal components of the logarithms of the
relative distances, are modelled as Gaussian processes over the unit cube of parameters
(squared-exponential kernel, one length per parameter, marginal likelihood maximised). A replayed
trial is the posterior mean plus noise: for the last value the measured variation of one
configuration from seed to seed, for the shape the fitted nuggets. Curves are the best epoch so far,
as trials report them. Seconds per epoch are modelled in the same way as a single number.
``leave_one_out`` measures the accuracy.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.stats import spearmanr

from tuner.space import CategoricalSpace, SearchSpace, Value

Array = NDArray[np.float64]
RECORDED = Path(__file__).resolve().parent / "data" / "curves.json.gz"
_EXPLAINED = 0.95  # share of the variance of the curves' shapes that the kept components explain
_RESOLVED = 1e-3  # share of the last value; smaller distances to it count as 0
_BOUNDS = (0.1, 20.0)  # of the lengths, relative to the cube's edge


@dataclass(frozen=True)
class Curve:
    """Simulated reports of a trial."""

    objective: Array  # (epochs,) real, the best so far
    seconds: Array  # (epochs,) [s]


@dataclass(frozen=True)
class Recorded:
    """Recorded trials, which were actually trained."""

    space: SearchSpace
    params: tuple[dict[str, Value], ...]
    objective: Array  # (n, epochs)
    seconds: Array  # (n, epochs) [s]
    repeats: Array  # (m, epochs), objectives of one configuration with several seeds

    @classmethod
    def load(cls, path: Path = RECORDED) -> Self:
        """Read a file written by `benchmarks._curves keep`."""
        content = json.loads(gzip.decompress(path.read_bytes()))
        trials: list[dict[str, Any]] = content["trials"]
        return cls(
            TypeAdapter(SearchSpace).validate_python(content["space"]),
            tuple(trial["params"] for trial in trials),
            np.array([trial["objective"] for trial in trials]),
            np.array([trial["seconds"] for trial in trials]),
            np.array([trial["objective"] for trial in content["repeats"]]),
        )


def unit_cube(space: SearchSpace, points: Sequence[Mapping[str, Value]]) -> Array:
    """Parameters scaled to [0, 1]: logarithmic if searched so, ordered choices by rank."""
    columns = []
    for path, parameter in space.items():
        values = [point[path] for point in points]
        if isinstance(parameter, CategoricalSpace):
            ranks = [parameter.index(value) for value in values]
            columns.append(np.array(ranks) / max(1, len(parameter.choices) - 1))
            continue
        scale = np.log if parameter.log else np.asarray
        low, high = scale(parameter.low), scale(parameter.high)
        columns.append((scale(np.array(values, float)) - low) / max(high - low, 1e-12))
    return np.stack(columns, axis=-1).astype(np.float64)


class Process:
    """A Gaussian process with one length per dimension, fitted by its marginal likelihood."""

    def __init__(self, x: Array, y: Array) -> None:
        self._x, self._mean = x, float(y.mean())
        self._scale = float(y.std()) or 1.0
        self._y = (y - self._mean) / self._scale
        n = x.shape[1]
        # Logarithms of the lengths and of the standard deviations of signal and noise. A weak prior
        # on the lengths (about the cube's edge times sqrt(dimensions)) keeps a fit of few points
        # from following noise.
        start = np.concatenate([np.full(n, np.log(np.sqrt(n))), [0.0, np.log(0.5)]])
        bounds = [tuple(np.log(_BOUNDS))] * n + [(-3.0, 2.0), (np.log(0.03), 0.5)]
        found = minimize(self._loss, start, jac=True, method="L-BFGS-B", bounds=bounds)
        self.lengths = np.exp(found.x[:n])
        self.noise = float(np.exp(found.x[-1])) * self._scale  # standard deviation of the nugget
        kernel, _ = self._kernel(found.x)
        self._factor = cho_factor(kernel, lower=True)
        self._weights = cho_solve(self._factor, self._y)
        self._signal = float(np.exp(2 * found.x[n]))

    def _kernel(self, theta: Array) -> tuple[Array, Array]:
        n = self._x.shape[1]
        squares = ((self._x[:, None] - self._x[None]) / np.exp(theta[:n])) ** 2  # (n, n, d)
        signal = np.exp(2 * theta[n]) * np.exp(-0.5 * squares.sum(-1))
        return signal + np.exp(2 * theta[n + 1]) * np.eye(len(self._x)), squares

    def _loss(self, theta: Array) -> tuple[float, Array]:
        """Negative logarithm of likelihood and prior, and its gradient."""
        n = self._x.shape[1]
        kernel, squares = self._kernel(theta)
        factor = cho_factor(kernel, lower=True)
        weights = cho_solve(factor, self._y)
        noise = np.exp(2 * theta[n + 1])
        signal = kernel - noise * np.eye(len(self._x))
        inner = cho_solve(factor, np.eye(len(self._x))) - np.outer(weights, weights)
        away = theta[:n] - np.log(np.sqrt(n))
        value = 0.5 * self._y @ weights + np.log(np.diag(factor[0])).sum() + 0.5 * away @ away
        gradient = np.empty_like(theta)
        gradient[:n] = 0.5 * np.einsum("ij,ij,ijd->d", inner, signal, squares) + away
        gradient[n] = (inner * signal).sum()
        gradient[n + 1] = noise * np.trace(inner)
        return float(value), gradient

    def mean(self, x: Array) -> Array:
        """Posterior mean at points (m, d)."""
        squares = (((x[:, None] - self._x[None]) / self.lengths) ** 2).sum(-1)
        return self._mean + self._scale * (self._signal * np.exp(-0.5 * squares) @ self._weights)

    def leave_one_out(self) -> Array:
        """Prediction of each point from the others, with the same lengths."""
        inverse = cho_solve(self._factor, np.eye(len(self._y)))
        return self._mean + self._scale * (self._y - self._weights / np.diag(inverse))


class Surrogate:
    """Curves for any configuration of the recorded space."""

    def __init__(self, recorded: Recorded) -> None:
        self.recorded = recorded
        x = unit_cube(recorded.space, recorded.params)
        last = recorded.objective[:, -1]
        self._is_positive = bool((recorded.objective > 0).all())
        self._spread = float(last.std())
        self._last = Process(x, self._modelled(last))
        # The variation between seeds was measured; a few points do not determine it.
        self._noise = float(self._modelled(recorded.repeats[:, -1]).std(ddof=1))
        above = (recorded.objective[:, :-1] - last[:, None]) / self._unit(last)[:, None]
        shapes = np.log(above + _RESOLVED)
        self._centre = shapes.mean(0)
        _, strengths, directions = np.linalg.svd(shapes - self._centre, full_matrices=False)
        share = np.cumsum(strengths**2) / (strengths**2).sum()
        self._directions = directions[: int(np.searchsorted(share, _EXPLAINED)) + 1]  # (k, ...)
        scores = (shapes - self._centre) @ self._directions.T  # (n, k)
        self._shape = [Process(x, column) for column in scores.T]
        # The time of the first epoch includes the building of the trial.
        steady = np.median(recorded.seconds[:, 1:], axis=1)
        self._speed = Process(x, np.log(steady))
        self._building = float(np.median(recorded.seconds[:, 0] - steady))

    def _modelled(self, value: Array) -> Array:
        return np.log(value) if self._is_positive else value

    def _value(self, modelled: Array) -> Array:
        return np.exp(modelled) if self._is_positive else modelled

    def _unit(self, last: Array) -> Array:
        return last if self._is_positive else np.full_like(last, self._spread)

    @property
    def epochs(self) -> int:
        """Epochs of every curve."""
        return self.recorded.objective.shape[1]

    def curve(self, params: Mapping[str, Value], noise: np.random.Generator | None) -> Curve:
        """A simulated trial of this configuration; without `noise` the expected one."""
        x = unit_cube(self.recorded.space, [params])

        def drawn(process: Process, deviation: float) -> float:
            expected = float(process.mean(x)[0])
            return expected if noise is None else expected + deviation * float(noise.normal())

        last = self._value(np.array(drawn(self._last, self._noise)))
        scores = np.array([drawn(process, process.noise) for process in self._shape])
        above = np.exp(self._centre + scores @ self._directions) - _RESOLVED
        above = np.maximum.accumulate(np.append(above, 0.0)[::-1])[::-1]  # never rises again
        seconds = np.full(self.epochs, np.exp(self._speed.mean(x)[0]))
        seconds[0] += self._building
        return Curve(last + self._unit(last) * above, seconds)

    def expected(self, points: Sequence[Mapping[str, Value]]) -> Array:
        """Expected last objectives (n,) of configurations."""
        return self._value(self._last.mean(unit_cube(self.recorded.space, points)))

    def leave_one_out(self) -> dict[str, float]:
        """Accuracy of predicting the last value of each recorded trial from the other trials.

        ``explained`` is one minus the error's variance over the values' own: 0 is no better than
        the mean. Variation caused by the seed alone cannot be predicted.
        """
        truth = self.recorded.objective[:, -1]
        predicted = self._value(self._last.leave_one_out())
        error = predicted - truth
        return {
            "trials": len(truth),
            "components": len(self._directions),
            "rms_error": float(np.sqrt((error**2).mean())),
            "standard_deviation": float(truth.std()),
            "explained": float(1.0 - error.var() / truth.var()),
            "rank_correlation": float(spearmanr(predicted, truth).statistic),
            "noise": float(self._noise * (truth.mean() if self._is_positive else 1.0)),
            "first_to_last_rank": float(spearmanr(self.recorded.objective[:, 0], truth).statistic),
        }
