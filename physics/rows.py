"""Dataclasses of tensors that share the scenes as their first dimension."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Self

import torch
from torch import Tensor

from physics.transfer import sent


class Rows:
    """Base of frozen dataclasses in which every field is a tensor (B, …) of the same B scenes."""

    def __len__(self) -> int:
        return len(next(iter(self.tensors().values())))

    def __getitem__(self, index: slice | Tensor) -> Self:
        """A subset of the scenes."""
        return self._map(lambda tensor: tensor[index])

    def tensors(self) -> dict[str, Tensor]:
        """All fields by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]  # subclasses are dataclasses

    def to(self, device: torch.device | str) -> Self:
        """The same scenes on another device."""
        place = torch.device(device)
        return self._map(lambda tensor: sent(tensor, place))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{name: function(value) for name, value in self.tensors().items()})

    @classmethod
    def concatenate(cls, parts: list[Self]) -> Self:
        """Concatenate batches in order.

        Raises:
            ValueError: nothing given.
        """
        if not parts:
            raise ValueError(f"no {cls.__name__} to concatenate; at least one batch needed")
        kept = [part.tensors() for part in parts]
        return cls(**{name: torch.cat([part[name] for part in kept]) for name in kept[0]})
