"""Search space: dotted paths of the configuration, and the values that each may take."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from physics.config import FrozenModel

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

Value = bool | int | float | str | None
Params = Mapping[str, Value]

# The objective must mean the same, and the budget must be the same, in every trial.
UNSEARCHABLE = (
    "name",
    "objective",
    "decision",
    "seed",
    "search",
    "resources",
    "array",
    "scene",
    "data",
    "network.candidates.waves",
    "network.reads",
    "training.epochs",
    "training.patience",
    "training.threads",
    "training.accumulation",
    "training.compile",
)
_CELLS = tuple(f"network.{axis}_cells" for axis in ("azimuth", "elevation", "range"))
_MOST_IMAGES = 8  # maximum kinds of spectra per scene that a study caches
_MAX_LISTED = 64  # values of an integer range that are checked one by one


class FloatSpace(FrozenModel):
    """A real number between two bounds, both included."""

    type: Literal["float"] = Field("float", description="a real number")
    low: float = Field(description="smallest value")
    high: float = Field(description="largest value")
    log: bool = Field(False, description="sample on a logarithmic scale")
    step: float | None = Field(None, gt=0, description="null: every value between the bounds")

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"low {self.low:g} must be above 0 on a logarithmic scale")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other")
        if self.step is not None:
            steps = (self.high - self.low) / self.step
            if not math.isclose(steps, round(steps), rel_tol=1e-6, abs_tol=1e-6):
                raise ValueError(f"high {self.high:g} is not low plus whole steps of {self.step:g}")
        return self

    def suggest(self, trial: BaseTrial, path: str) -> float:
        """Let Optuna choose."""
        return trial.suggest_float(path, self.low, self.high, log=self.log, step=self.step)

    @property
    def size(self) -> float:
        """How many values there are; infinite without a step."""
        if self.low == self.high:
            return 1
        return math.inf if self.step is None else round((self.high - self.low) / self.step) + 1

    def values(self) -> tuple[float, ...]:
        """Return all values as decimal steps from ``low``; the number must be finite."""
        low, step = Decimal(str(self.low)), Decimal(str(self.step or 0))
        return tuple(float(low + index * step) for index in range(int(self.size)))

    def index(self, value: Any) -> int:
        """Return the index of a value, tolerating rounding."""
        return 0 if self.size == 1 else round((value - self.low) / (self.step or 1))

    def probes(self) -> tuple[Value, ...]:
        """Return the values that a check against the configuration must try."""
        return (self.low, self.high)

    def contains(self, value: Any) -> bool:
        """Whether the value may be proposed."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if not self.low <= value <= self.high:
            return False
        if self.step is None:
            return True
        steps = (value - self.low) / self.step
        return math.isclose(steps, round(steps), rel_tol=1e-6, abs_tol=1e-6)


class IntSpace(FrozenModel):
    """A whole number between two bounds, both included."""

    type: Literal["int"] = Field("int", description="a whole number")
    low: int = Field(description="smallest value")
    high: int = Field(description="largest value")
    log: bool = Field(False, description="sample on a logarithmic scale")
    step: int = Field(1, ge=1, description="distance between values")

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low {self.low} must be above 0 on a logarithmic scale")
        if self.log and self.step != 1:
            raise ValueError("log and step exclude each other")
        if (self.high - self.low) % self.step:
            raise ValueError(f"high {self.high} is not low plus whole steps of {self.step}")
        return self

    def suggest(self, trial: BaseTrial, path: str) -> int:
        """Let Optuna choose."""
        return trial.suggest_int(path, self.low, self.high, log=self.log, step=self.step)

    @property
    def size(self) -> float:
        """How many values there are."""
        return (self.high - self.low) // self.step + 1

    def values(self) -> tuple[int, ...]:
        """All values."""
        return tuple(range(self.low, self.high + 1, self.step))

    def index(self, value: Any) -> int:
        """Which of the values this is."""
        return int(value - self.low) // self.step

    def probes(self) -> tuple[Value, ...]:
        """Every value of a short range; the bounds of a long one."""
        values = range(self.low, self.high + 1, self.step)
        return tuple(values) if len(values) <= _MAX_LISTED else (self.low, self.high)

    def contains(self, value: Any) -> bool:
        """Whether the value may be proposed."""
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and self.low <= value <= self.high and (value - self.low) % self.step == 0


class CategoricalSpace(FrozenModel):
    """One of the listed values."""

    type: Literal["categorical"] = Field("categorical", description="one of a list")
    choices: tuple[Value, ...] = Field(min_length=1, description="the values")

    @field_validator("choices")
    @classmethod
    def _distinct(cls, choices: tuple[Value, ...]) -> tuple[Value, ...]:
        kinds = [(type(choice), choice) for choice in choices]
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"a choice stands twice in {list(choices)}")
        return choices

    def suggest(self, trial: BaseTrial, path: str) -> Value:
        """Let Optuna choose."""
        return trial.suggest_categorical(path, self.choices)

    @property
    def size(self) -> float:
        """How many values there are."""
        return len(self.choices)

    def values(self) -> tuple[Value, ...]:
        """All values."""
        return self.choices

    def index(self, value: Any) -> int:
        """Return the index of a value; 1, 1.0 and True are distinct."""
        same = [type(choice) is type(value) and choice == value for choice in self.choices]
        return same.index(True)

    def probes(self) -> tuple[Value, ...]:
        """Every choice."""
        return self.choices

    def contains(self, value: Any) -> bool:
        """Whether the value may be proposed."""
        return any(type(choice) is type(value) and choice == value for choice in self.choices)


ParameterSpace = Annotated[FloatSpace | IntSpace | CategoricalSpace, Field(discriminator="type")]
SearchSpace = dict[str, ParameterSpace]


def same_point(space: SearchSpace, params: Params) -> Callable[[Params], bool]:
    """Return a test for equality with this point; stepped floats are compared by step."""
    stepped = {path for path, p in space.items() if p.type == "float" and p.step}
    if not stepped:
        return lambda other: other == params
    plain = params.keys() - stepped

    def same(other: Params) -> bool:
        return (
            other.keys() == params.keys()
            and all(other[path] == params[path] for path in plain)
            and all(
                space[path].index(other[path]) == space[path].index(params[path])
                for path in params.keys() & stepped
            )
        )

    return same


def default_space() -> SearchSpace:
    """The default search space: optimiser, network, each loss weight, β, ridge and shrinkage."""
    weight = FloatSpace(low=0.005, high=0.5, log=True)
    return {
        "training.learning_rate": FloatSpace(low=1e-4, high=5e-3, log=True),
        "training.weight_decay": FloatSpace(low=1e-6, high=1e-1, log=True),
        "training.batch_size": CategoricalSpace(choices=(16, 32, 64)),
        "network.width": CategoricalSpace(choices=(32, 48, 64)),
        "network.depth": IntSpace(low=1, high=4),
        "network.heads": CategoricalSpace(choices=(2, 4)),
        "network.dropout": FloatSpace(low=0.0, high=0.3),
        "loss.cov_pred": weight,
        "loss.subspace_align": weight,
        "loss.peak_contrast": weight,
        "loss.existence": weight,
        "loss.position": weight,
        "blend.beta": FloatSpace(low=0.0, high=0.6),
        "blend.shrinkage": FloatSpace(low=0.0, high=0.3),
        "tikhonov.regularization": FloatSpace(low=1e-4, high=1e-1, log=True),
    }


def suggest(space: SearchSpace, trial: BaseTrial) -> dict[str, Value]:
    """Return one point of the space, chosen by the study's sampler."""
    return {path: parameter.suggest(trial, path) for path, parameter in space.items()}


def n_points(space: SearchSpace) -> float:
    """Return the number of points in the space; infinite if a float parameter has no step."""
    return math.prod(parameter.size for parameter in space.values())


def is_unsearchable(path: str) -> bool:
    """Return whether the field at a path must be the same in all trials of a study."""
    return any(path == held or path.startswith(held + ".") for held in UNSEARCHABLE)


def varies_images(space: SearchSpace) -> bool:
    """Return whether trials use too many different spectra of a scene for them to be cached.

    Spectra depend on the ridge solutions and on the network's cells.
    """
    return (
        math.prod(
            parameter.size
            for path, parameter in space.items()
            if path.startswith("tikhonov.") or path in _CELLS
        )
        > _MOST_IMAGES
    )
