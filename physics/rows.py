"""Records of tensors whose first dimension is the same scenes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Self

import torch
from torch import Tensor

from physics.transfer import sent


class Rows:
    """Base of frozen dataclasses all of whose fields are tensors (B, …) of the same B scenes."""

    def __len__(self) -> int:
        return len(next(iter(self.tensors().values())))

    def __getitem__(self, index: slice | Tensor) -> Self:
        """Some of the scenes."""
        return self._map(lambda tensor: tensor[index])

    def tensors(self) -> dict[str, Tensor]:
        """Every field by its name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]  # who inherits is one

    def to(self, device: torch.device | str) -> Self:
        """The same scenes on another device."""
        place = torch.device(device)
        return self._map(lambda tensor: sent(tensor, place))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{name: function(value) for name, value in self.tensors().items()})

    @classmethod
    def concatenate(cls, parts: list[Self]) -> Self:
        """One batch of several, in order.

        Raises:
            ValueError: nothing given.
        """
        if not parts:
            raise ValueError(f"no {cls.__name__} to concatenate; at least one batch needed")
        kept = [part.tensors() for part in parts]
        return cls(**{name: torch.cat([part[name] for part in kept]) for name in kept[0]})
