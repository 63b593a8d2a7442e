"""Optimiser steps: the input and the outcome of a step, and the totals of an epoch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from model.ahead import Look
from model.data import Batch
from model.features import Features


@dataclass(frozen=True)
class Prepared:
    """A batch split into the parts in which its gradient is computed, with their features.

    Attributes:
        parts: parts of the batch, in order.
        features: of each part.
        fallbacks: how many scenes of each part fell back to the SVD; reading it waits for the
            features.
    """

    parts: list[Batch]
    features: list[Features]
    fallbacks: Look

    @classmethod
    def of(cls, parts: list[Batch], features: list[Features]) -> Prepared:
        """Build without waiting for the features."""
        counts = torch.stack([seen.fell_back.sum() for seen in features])
        return cls(parts, features, Look(counts))

    def __len__(self) -> int:
        """Number of scenes."""
        return sum(map(len, self.parts))


class Outcome(NamedTuple):
    """Outcome of a step.

    Attributes:
        terms: of the loss; None if the loss is not finite.
        norm: of the gradient, before clipping.
    """

    terms: dict[str, float] | None
    norm: float

    @property
    def skipped(self) -> bool:
        """Whether the weights were left unchanged."""
        return self.terms is None or not math.isfinite(self.norm)


@dataclass(frozen=True)
class Taken:
    """A step that was queued on the device.

    Attributes:
        number: of the step, from 1.
        rate: its learning rate.
        n_scenes: number of scenes of its batch.
        n_fallbacks: number of these scenes that fell back to the SVD.
        names: of the loss terms, the total first.
        look: their values, followed by the gradient's norm.
    """

    number: int
    rate: float
    n_scenes: int
    n_fallbacks: int
    names: tuple[str, ...]
    look: Look

    def outcome(self) -> Outcome:
        """Wait for the step and return its outcome."""
        *values, norm = self.look.read()
        finite = math.isfinite(values[0])
        return Outcome(dict(zip(self.names, values, strict=True)) if finite else None, norm)


class Tally:
    """Totals over the steps of an epoch."""

    def __init__(self) -> None:
        self.n_scenes = 0
        self.n_finite = 0  # steps with a finite loss
        self.norms: list[float] = []  # of the steps that were not skipped
        self._totals: dict[str, float] = {}
        self._n_fallbacks = 0
        self._rate = 0.0

    def add(self, step: Taken) -> Outcome:
        """Count one more step and return its outcome."""
        outcome = step.outcome()
        self.n_scenes += step.n_scenes
        self._n_fallbacks += step.n_fallbacks
        self._rate = step.rate
        if outcome.terms is not None:
            self.n_finite += 1
            for name, value in outcome.terms.items():
                self._totals[name] = self._totals.get(name, 0.0) + value
        if not outcome.skipped:
            self.norms.append(outcome.norm)
        return outcome

    def metrics(self) -> dict[str, float]:
        """Mean terms of the finite losses, norms of the steps not skipped, and counts."""
        loss = {name: value / self.n_finite for name, value in self._totals.items()}
        return {
            "loss": loss.pop("total"),
            **{f"loss_{name}": value for name, value in loss.items()},
            "grad_norm": sum(self.norms) / max(1, len(self.norms)),
            "grad_norm_max": max(self.norms, default=0.0),
            "learning_rate": self._rate,
            "solver_fallbacks": self._n_fallbacks,
        }
