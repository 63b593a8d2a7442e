"""Sources that an estimator found in a batch of scenes."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Detections:
    """Sources found in B scenes, padded to the largest number in any scene.

    ``position`` holds azimuth, elevation [rad] and range [m]; where ``present`` is False it is an
    arbitrary finite value. ``covariance``, where the estimator gives one, is that of the errors of
    azimuth [rad], elevation [rad] and range [m].
    """

    position: Tensor  # (B, P, 3) real
    present: Tensor  # (B, P) bool
    covariance: Tensor | None = None  # (B, P, 3, 3) real

    def __post_init__(self) -> None:
        shape = self.present.shape
        if self.position.shape != (*shape, 3) or self.present.dtype != torch.bool:
            raise ValueError(
                f"position has shape {tuple(self.position.shape)} and present "
                f"{tuple(shape)} of {self.present.dtype}; expected (B, P, 3) and (B, P) bool"
            )
        if self.covariance is not None and self.covariance.shape != (*shape, 3, 3):
            raise ValueError(
                f"covariance has shape {tuple(self.covariance.shape)}; expected {(*shape, 3, 3)}"
            )

    def __len__(self) -> int:
        return self.present.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Detections:
        """A subset of the scenes."""
        covariance = None if self.covariance is None else self.covariance[index]
        return Detections(self.position[index], self.present[index], covariance)

    @property
    def count(self) -> Tensor:
        """Number of sources found (B,) int64."""
        return self.present.sum(-1)

    @staticmethod
    def concatenate(parts: list[Detections]) -> Detections:
        """Concatenate batches in order, padded to the widest.

        Raises:
            ValueError: nothing given, or a covariance in some parts only.
        """
        if not parts:
            raise ValueError("no detections to concatenate; at least one batch needed")
        with_covariance = {part.covariance is not None for part in parts}
        if len(with_covariance) > 1:
            raise ValueError("some parts hold a covariance and others do not")
        width = max(part.present.shape[-1] for part in parts)

        def padded(value: Tensor, n_dims: int) -> Tensor:
            return torch.nn.functional.pad(value, (0, 0) * n_dims + (0, width - value.shape[1]))

        names = [f.name for f in fields(Detections)]
        columns = {
            name: torch.cat([padded(getattr(p, name), n) for p in parts])
            for name, n in zip(names, (1, 0, 2), strict=True)
            if getattr(parts[0], name) is not None
        }
        return Detections(**columns)
