"""Mixed precision: where it acts and where it must not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from model import Trainer
from model.precision import AmpPolicy, PrecisionConfig
from tests.tiny import tiny_config

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def test_auto_is_off_on_a_cpu_and_on_on_a_gpu() -> None:
    assert AmpPolicy(PrecisionConfig(), torch.device("cpu")).name == "off"
    if torch.cuda.is_available():
        assert AmpPolicy(PrecisionConfig(), torch.device("cuda")).name in ("bf16", "fp16")


def test_fp16_on_a_cpu_is_refused_with_what_to_use() -> None:
    with pytest.raises(ValueError, match=r"precision\.amp is fp16 on device cpu.*use bf16"):
        AmpPolicy(PrecisionConfig(amp="fp16"), torch.device("cpu"))


@pytest.mark.parametrize("device", DEVICES)
def test_lesson_5_the_network_runs_in_bf16_and_physics_and_loss_do_not(device: str) -> None:
    trainer = Trainer(tiny_config(precision={"amp": "bf16"}), device)
    seen: dict[str, torch.dtype] = {}
    trainer.network.query.register_forward_hook(
        lambda _m, _i, out: seen.__setitem__("network", out.dtype)
    )
    original = trainer.loss.__class__.__call__

    def spy(self, prediction, blended, *rest):  # type: ignore[no-untyped-def]
        seen["factor"] = prediction.factor.dtype
        seen["blended"] = blended.factor.dtype
        value = original(self, prediction, blended, *rest)
        seen["loss"] = value.total.dtype
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.loss.__class__, "__call__", spy)
        metrics = trainer.run_epoch()
    assert seen == {
        "network": torch.bfloat16,
        "factor": torch.complex64,
        "blended": torch.complex64,
        "loss": torch.float32,
    }
    assert metrics["skipped_steps"] == 0


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_training_follows_full_precision(device: str) -> None:
    def curve(amp: str) -> list[float]:
        config = tiny_config(
            precision={"amp": amp}, training={"epochs": 6}, network={"dropout": 0.0}
        )
        trainer = Trainer(config, device)
        return [float(trainer.run_epoch()["loss"]) for _ in range(6)]

    # bf16 keeps 8 bits: single losses differ by per cents, the curve does not drift away.
    assert curve("bf16") == pytest.approx(curve("off"), rel=0.05)


def test_features_and_loss_are_the_same_under_a_foreign_autocast() -> None:
    trainer = Trainer(tiny_config())
    batch = trainer.source.validation()
    scenes = batch.scenes
    trainer.network.eval()
    with torch.no_grad():
        features = trainer._features(batch)
        prediction = trainer.network(features)
        plain = trainer.loss(prediction, prediction.covariance, scenes).total
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = trainer._features(batch)
            inside = trainer.loss(prediction, prediction.covariance, scenes).total
    assert torch.equal(features.ridge, again.ridge)
    assert torch.equal(features.spectrum, again.spectrum)
    assert torch.equal(plain, inside)


def test_auto_takes_fp16_on_a_gpu_that_only_emulates_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_on_turing(including_emulation: bool = True) -> bool:
        return including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", as_on_turing)
    assert AmpPolicy._resolve("auto", torch.device("cuda")) is torch.float16


def fp16_trainer(device: str, init_scale: float) -> Trainer:
    """Three steps an epoch in fp16 with a gradient scaler, on a CPU too."""
    trainer = Trainer(tiny_config(training={"epochs": 20}), device)
    trainer.amp.dtype = torch.float16
    trainer.amp.scaler = torch.amp.GradScaler(device, init_scale=init_scale)
    return trainer


@pytest.mark.parametrize("device", DEVICES)
def test_steps_that_the_scaler_skips_while_it_calibrates_are_counted_and_survived(
    device: str,
) -> None:
    trainer = fp16_trainer(device, 2.0**30)
    before = [p.detach().clone() for p in trainer.network.parameters()]
    metrics = trainer.run_epoch()
    assert metrics["skipped_steps"] == 3, "the scale halves from step to step"
    assert all(math.isfinite(v) for v in metrics.values())
    assert metrics["grad_norm"] == metrics["grad_norm_max"] == 0.0
    assert all(torch.equal(p, b) for p, b in zip(trainer.network.parameters(), before, strict=True))
    while trainer.step - trainer.skipped_steps < 3:
        metrics = trainer.run_epoch()
    assert metrics["grad_norm"] > 0
    assert trainer.average.steps == trainer.step


@pytest.mark.parametrize("device", DEVICES)
def test_the_scale_of_the_gradients_is_kept_in_a_checkpoint(device: str, tmp_path: Path) -> None:
    trainer = fp16_trainer(device, 2.0**30)
    trainer.run_epoch()
    trainer.save(tmp_path)
    restored = fp16_trainer(device, 2.0**16)
    restored.load(tmp_path)
    assert restored.amp.scaler.get_scale() == trainer.amp.scaler.get_scale() == 2.0**27


@pytest.mark.parametrize("enabled", [False, True])
def test_a_step_that_is_not_finite_is_not_taken(enabled: bool) -> None:
    """A loss that overflowed may have finite gradients, which the scaler alone would follow."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    policy = AmpPolicy(PrecisionConfig(amp="off"), torch.device("cpu"))
    policy.scaler = torch.amp.GradScaler("cpu", enabled=enabled)
    for finite in (False, True):
        optimizer.zero_grad()
        policy.backward(weight.sum())
        policy.unscale(optimizer)
        policy.step(optimizer, finite)
        assert torch.equal(weight, torch.zeros(2) if finite else torch.ones(2))
