"""Base of every configuration section."""

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict


class AmidTraining:
    """Marks a field whose value may change while a training keeps its weights.

    Fields that set the network's shape, the computations before the network, or the scenes of a
    step may not change.
    """


_T = TypeVar("_T")
Adjustable = Annotated[_T, AmidTraining()]


class FrozenModel(BaseModel):
    """Immutable pydantic model that refuses unknown keys and non-finite numbers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )
