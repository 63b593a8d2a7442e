"""What the tests of trainings, of front ends and of networks with cells of their own share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import model.front_end as front_end_module
from model import Trainer
from model.front_end import CandidateSearch
from model.prediction import Prediction
from physics import Scenes
from physics.candidates import Candidates, find_candidates

Record = list[dict[str, Any]]
TIMES = {"epoch_seconds", "scenes_per_second"}


def judged_slots(
    n_scenes: int,
    n_slots: int,
    n_cells: int,
    *,
    seed: int = 0,
    sharpness: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Prediction:
    """A prediction with cells of its own, drawn: directions, evenly spaced ranges, weights."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=dtype)

    size = (n_scenes, n_slots)
    near, span = uniform(0.5, 4.0, *size, 1), uniform(0.2, 6.0, *size, 1)
    ranges = near + span * torch.linspace(0, 1, n_cells, dtype=dtype)
    directions = torch.stack([uniform(-1.0, 1.0, *size), uniform(-0.5, 0.5, *size)], -1)
    cells = torch.cat(
        [directions.unsqueeze(2).expand(-1, -1, n_cells, -1), ranges.unsqueeze(-1)], -1
    )
    score = sharpness * torch.randn(*size, n_cells, generator=generator, dtype=dtype)
    root = math.radians(1.0) * torch.randn(*size, 2, 2, generator=generator, dtype=dtype)
    log_pointer = torch.log_softmax(score, -1)
    position = torch.cat([directions, (log_pointer.exp() / ranges).sum(-1, keepdim=True)], -1)
    factor = torch.randn(n_scenes, 9, n_slots, generator=generator, dtype=torch.complex128)
    return Prediction(
        factor=factor,
        existence=2.0 * torch.randn(*size, generator=generator, dtype=dtype),
        log_pointer=log_pointer,
        position=position,
        cells=cells,
        angle_covariance=root @ root.mT,
    )


def run(trainer: Trainer, epochs: int) -> Record:
    """Train some epochs: their metrics, without those that a clock gives."""
    return [{k: v for k, v in trainer.run_epoch().items() if k not in TIMES} for _ in range(epochs)]


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    """A copy of the weights as they are now."""
    return {k: p.detach().clone() for k, p in trainer.network.named_parameters()}


def call(front_end: CandidateSearch, S: Scenes, snr_db: Tensor | None = None) -> Candidates:
    """What a front end finds in scenes, at their own levels or at others."""
    return front_end(S.y, S.H, S.codes, S.snr_db if snr_db is None else snr_db)


def files(cache: Path) -> list[Path]:
    """What a cache keeps."""
    return sorted(cache.iterdir())


def equal(one: Candidates, two: Candidates) -> bool:
    """Whether candidates are the same, bit for bit."""
    ours, theirs = one.tensors(), two.tensors()
    return all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)


class Counted:
    """Counts the searches that a front end does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scenes: list[int] = []

        def counted(y: Tensor, *rest: Any, **more: Any) -> Candidates:
            self.scenes.append(len(y))
            return find_candidates(y, *rest, **more)

        monkeypatch.setattr(front_end_module, "find_candidates", counted)
