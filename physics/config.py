"""Base of every configuration section."""

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict


class AmidTraining:
    """Marks a field whose value may change while a training keeps its weights.

    What shapes the network, what is computed before it, and which scenes make a step may not.
    """


_T = TypeVar("_T")
Adjustable = Annotated[_T, AmidTraining()]


class FrozenModel(BaseModel):
    """Immutable pydantic model that refuses unknown keys and non-finite numbers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )
