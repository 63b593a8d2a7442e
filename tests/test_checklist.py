"""The verification checklist of the system before this one, trained for real.

One training at the sizes of the physics (12 x 12 elements, 16 antennas, 16 snapshots) with a
small network, looked at from all sides.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks._timing import peak_bytes
from model import Trainer, TrialConfig
from model.loss import LossValue, ScenesLoss
from physics import LowRankCovariance
from physics.precision import full_precision

CONFIG = TrialConfig.model_validate(
    {
        "network": {"width": 16, "depth": 1, "heads": 2, "conv_channels": 4, "image_channels": 8},
        "data": {"train_scenes": 384, "val_scenes": 64},
        "training": {
            "epochs": 3, "batch_size": 32, "learning_rate": 3e-3, "threads": 2, "ema_decay": 0.9,
        },
    }
)  # fmt: skip


@dataclass
class Watched:
    """What one training showed."""

    first_batch_seconds: float = 0.0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    terms: list[dict[str, Tensor]] = field(default_factory=list)
    seen_by_loss: list[LowRankCovariance] = field(default_factory=list)
    trainer: Trainer | None = None


@pytest.fixture(scope="module")
def training() -> Watched:
    watched = Watched()
    trainer = Trainer(CONFIG)
    started = time.perf_counter()
    batch = next(iter(trainer.source.train_batches(0, 32, 0)))
    trainer.network.train()
    trainer._train_step(trainer._prepared(batch))
    watched.first_batch_seconds = time.perf_counter() - started
    watched.gradients = {
        k: p.grad.clone() for k, p in trainer.network.named_parameters() if p.grad is not None
    }
    original = ScenesLoss.__call__

    def spy(self: ScenesLoss, prediction: Any, blended: Any, *rest: Any) -> LossValue:
        value = original(self, prediction, blended, *rest)
        watched.terms.append(value.terms)
        watched.seen_by_loss.append(blended.detach())
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScenesLoss, "__call__", spy)
        trainer = Trainer(CONFIG)
        while not trainer.finished:
            watched.metrics.append(trainer.run_epoch())
    watched.trainer = trainer
    return watched


def test_training_starts_without_hanging_and_the_first_batch_comes_soon(
    training: Watched,
) -> None:
    # Seconds where the origin hung for minutes; loaded two-core machines included.
    assert training.first_batch_seconds < 30


def test_no_gradient_is_nan_and_every_trained_part_has_one(training: Watched) -> None:
    assert training.trainer is not None
    names = {k for k, p in training.trainer.network.named_parameters() if p.requires_grad}
    assert set(training.gradients) == names
    for name, gradient in training.gradients.items():
        assert bool(torch.isfinite(gradient).all()), name
        assert float(gradient.abs().max()) > 0, f"{name} does not learn"


def test_frozen_parts_need_no_gradient() -> None:
    trainer = Trainer(CONFIG)
    for parameter in trainer.network.snapshot_conv.parameters():
        parameter.requires_grad_(False)
    batch = next(iter(trainer.source.train_batches(0, 8, 0)))
    terms, norm = trainer._train_step(trainer._prepared(batch)).outcome()
    assert terms is not None
    assert math.isfinite(norm)


def test_loss_is_finite_and_falls(training: Watched) -> None:
    losses = [m["loss"] for m in training.metrics]
    assert all(math.isfinite(v) for v in losses)
    assert losses[-1] < losses[0]
    assert training.metrics[-1]["objective"] < training.metrics[-1]["untrained_objective"]


def test_amp_is_at_work() -> None:
    config = CONFIG.model_copy(
        update={"precision": CONFIG.precision.model_copy(update={"amp": "bf16"})}
    )
    trainer = Trainer(config)
    dtypes: set[torch.dtype] = set()
    for module in trainer.network.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.register_forward_hook(lambda _m, _i, out: dtypes.add(out.dtype))
    batch = next(iter(trainer.source.train_batches(0, 8, 0)))
    terms, norm = trainer._train_step(trainer._prepared(batch)).outcome()
    assert dtypes == {torch.bfloat16}
    assert terms is not None
    assert math.isfinite(norm)


def test_every_loss_term_is_on_and_positive(training: Watched) -> None:
    names = {"nmse", "cov_pred", "subspace_align", "peak_contrast", "existence", "position"}
    assert all(set(t) == names for t in training.terms)
    mean = {n: sum(float(t[n]) for t in training.terms) / len(training.terms) for n in names}
    assert all(v > 0 for v in mean.values()), mean
    assert all(w > 0 for w in CONFIG.loss.weights("warmup").values())


def test_training_and_inference_see_the_same_covariance(training: Watched) -> None:
    from model.blending import blended_covariance
    from model.localizer import Localizer

    trainer = training.trainer
    assert trainer is not None
    batch = trainer.source.validation()
    scenes = batch.scenes
    localizer = Localizer(CONFIG, trainer.network)
    _, inferred, features = localizer.predict(scenes.y, scenes.H, scenes.codes, scenes.snr_db)
    with torch.no_grad():
        prediction = trainer.network(trainer._features(batch))
    trained = blended_covariance(prediction, features, CONFIG.blend)
    torch.testing.assert_close(inferred.dense(), trained.dense(), rtol=1e-4, atol=1e-4)
    assert all(c.rank == CONFIG.network.rank + 16 for c in training.seen_by_loss)
    for c in training.seen_by_loss:
        torch.testing.assert_close(c.trace(), torch.full_like(c.trace(), 144.0))


def test_memory_stays_reasonable() -> None:
    # One [B, L, N, N] complex64 tensor alone is 81 MiB, with its gradient and the copies of a
    # factorisation several times that. Tensors are tallied: a process's peak is that of whatever
    # ran before, too.
    limit = 60 * 2**20
    assert peak_bytes(lambda: torch.empty(32, 16, 144, 144, dtype=torch.complex64)) > limit
    trainer = Trainer(CONFIG)
    trainer.network.train()
    batch = next(iter(trainer.source.train_batches(0, 32, 0)))
    assert peak_bytes(lambda: trainer._train_step(trainer._prepared(batch))) < limit


@pytest.mark.parametrize(
    "what", ["zero channel", "zero snapshots", "no source", "coincident", "-20 dB", "huge"]
)
def test_training_is_stable_on_ugly_scenes(what: str) -> None:
    from dataclasses import replace

    trainer = Trainer(CONFIG)
    trainer.network.train()
    batch = next(iter(trainer.source.train_batches(0, 8, 0)))
    scenes = batch.scenes
    if what == "zero channel":
        scenes = replace(scenes, H=torch.zeros_like(scenes.H))
    elif what == "zero snapshots":
        scenes = replace(scenes, y=torch.zeros_like(scenes.y))
    elif what == "no source":
        scenes = replace(
            scenes,
            n_sources=torch.zeros_like(scenes.n_sources),
            power=torch.zeros_like(scenes.power),
        )
    elif what == "coincident":
        scenes = replace(scenes, position=scenes.position[:, :1].expand(-1, 5, -1).clone())
    elif what == "-20 dB":
        scenes = replace(scenes, y=torch.randn_like(scenes.y))
    else:
        scenes = replace(scenes, y=scenes.y * 1e15, H=scenes.H * 1e-15)
    for _ in range(3):
        terms, norm = trainer._train_step(
            trainer._prepared(replace(batch, scenes=scenes))
        ).outcome()
        assert terms is not None
        assert all(math.isfinite(v) for v in terms.values())
        assert math.isfinite(norm)
    with full_precision():
        assert all(bool(torch.isfinite(p).all()) for p in trainer.network.parameters())
