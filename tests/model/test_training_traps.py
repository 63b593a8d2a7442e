"""What a training loop may get wrong and still train: each test holds one trap shut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import model.training as training_module
import model.validation as validation_module
from model import Trainer
from model.checkpoint import export_best, load_tensors
from tests.model.support import run, weights_of
from tests.tiny import tiny_config


def test_trap_the_schedule_steps_with_the_optimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    original = training_module.set_learning_rate

    def spy(optimizer: torch.optim.Optimizer, rate: float) -> None:
        rates.append(rate)
        original(optimizer, rate)

    monkeypatch.setattr(training_module, "set_learning_rate", spy)
    config = tiny_config(training={"epochs": 3, "warmup_fraction": 0.34})
    trainer = Trainer(config)
    run(trainer, 3)
    assert trainer.total_steps == 9 == len(rates)
    assert len(set(rates)) == 9, "the rate changes in every optimiser step, not every epoch"
    peak = config.training.learning_rate
    assert rates[:3] == pytest.approx([peak / 3, 2 * peak / 3, peak])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert trainer.optimizer.param_groups[0]["lr"] == rates[-1]


def test_trap_saved_weights_are_the_scored_ones(tmp_path: Path) -> None:
    config = tiny_config(training={"epochs": 3, "ema_decay": 0.9})
    trainer = Trainer(config)
    run(trainer, 3)
    trainer.save(tmp_path / "checkpoint")
    export_best(tmp_path / "checkpoint", tmp_path / "best")
    saved, _ = load_tensors(tmp_path / "best" / "model.safetensors")
    raw = weights_of(trainer)
    assert any(not torch.equal(saved[k], raw[k]) for k in raw), "not the raw weights"
    fresh = Trainer(config)
    fresh.average.load(saved, steps=1)
    assert fresh.validate()["nmse_pred"] == trainer.best_objective


def test_trap_objective_is_the_dense_nmse_of_r_pred_over_all_validation_scenes() -> None:
    trainer = Trainer(tiny_config(data={"val_scenes": 200}))
    metrics = trainer.run_epoch()
    trainer._set_weights(trainer.average.weights)
    trainer.network.eval()
    batch = trainer.source.validation()
    with torch.no_grad():
        prediction = trainer.network(trainer._features(batch))
    dense = prediction.covariance.dense()
    truth = batch.scenes.covariance(trainer.array, "spherical").dense()
    error = torch.linalg.matrix_norm(dense - truth) ** 2 / torch.linalg.matrix_norm(truth) ** 2
    assert metrics["objective"] == pytest.approx(float(error.mean()), rel=1e-4)


def test_trap_objective_is_free_of_loss_weights_beta_and_shrinkage() -> None:
    base = Trainer(tiny_config())
    other = Trainer(
        tiny_config(
            loss={"cov_pred": 0.5, "subspace_align": 0.0, "peak_contrast": 0.7, "position": 0.9},
            blend={"beta": 0.9, "shrinkage": 0.8},
        )
    )
    one, two = base.validate(), other.validate()
    assert one["nmse_pred"] == two["nmse_pred"], "the same weights score the same"
    assert one["nmse_blend"] != two["nmse_blend"]


def test_lesson_2_training_and_inference_build_the_same_r_blend(tmp_path: Path) -> None:
    from model.localizer import Localizer

    trainer = Trainer(tiny_config(blend={"shrinkage": 0.2}, tikhonov={"regularization": 0.1}))
    run(trainer, 1)
    trainer.save(tmp_path / "c")
    export_best(tmp_path / "c", tmp_path / "best")
    localizer = Localizer.load(tmp_path / "best")
    batch = trainer.source.validation()
    scenes = batch.scenes
    seen: list[Tensor] = []
    original = trainer.loss.__class__.__call__

    def spy(self: Any, prediction: Any, blended: Any, *rest: Any) -> Any:
        seen.append(blended.dense().detach())
        return original(self, prediction, blended, *rest)

    trainer._set_weights(trainer.best_weights)
    trainer.network.eval()
    config = trainer.config
    blend = config.blend.model_copy(update={"jitter": 0.0})
    trainer.config = config.model_copy(update={"blend": blend})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.loss.__class__, "__call__", spy)
        trainer._train_step(trainer._prepared(batch))
    _, blended, _ = localizer.predict(scenes.y, scenes.H, scenes.codes, scenes.snr_db)
    torch.testing.assert_close(seen[0], blended.dense(), rtol=1e-5, atol=1e-5)


def test_lesson_8_beta_is_jittered_in_training_only() -> None:
    from model.blending import blended_covariance, jittered_beta

    trainer = Trainer(tiny_config())
    features = trainer._features(trainer.source.validation())
    with torch.no_grad():
        prediction = trainer.network(features)
    predicted = prediction.covariance
    measured = features.measured_covariance()

    def betas(generator: torch.Generator | None, **blend: float) -> Tensor:
        config = trainer.config.blend.model_copy(update=blend)
        n_scenes = len(features.y)
        beta = jittered_beta(n_scenes, config, generator) if generator is not None else None
        blended = blended_covariance(prediction, features, config, beta)
        # R_blend - R_pred = beta (R_samp - R_pred), solved for beta by least squares
        change = measured.dense() - predicted.dense()
        moved = blended.dense() - predicted.dense()
        return (change.conj() * moved).sum((-2, -1)).real / change.abs().square().sum((-2, -1))

    exact = betas(None)
    torch.testing.assert_close(exact, torch.full_like(exact, 0.30), rtol=1e-4, atol=1e-4)
    drawn = betas(torch.Generator().manual_seed(0))
    assert float(drawn.min()) < 0.27
    assert float(drawn.max()) > 0.33
    assert float((drawn - 0.30).abs().max()) <= 0.0501
    clamped = betas(torch.Generator().manual_seed(0), beta=0.0)
    assert float(clamped.min()) == pytest.approx(0.0, abs=1e-4)


def test_trap_beta_zero_is_admissible() -> None:
    metrics = Trainer(tiny_config(blend={"beta": 0.0, "jitter": 0.0})).run_epoch()
    assert metrics["nmse_blend"] == pytest.approx(metrics["nmse_pred"], rel=1e-5)


def test_trap_training_and_validation_build_the_same_r_pred(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = Trainer(tiny_config(training={"snr_dropout": 0.0}, network={"dropout": 0.0}))
    seen: list[Tensor] = []
    original_loss, original_nmse = trainer.loss.__class__.__call__, validation_module.nmse

    def loss_spy(self: Any, prediction: Any, *rest: Any) -> Any:
        seen.append(prediction.covariance.dense().detach())
        return original_loss(self, prediction, *rest)

    def nmse_spy(estimate: Any, truth: Any) -> Tensor:
        seen.append(estimate.dense())
        return original_nmse(estimate, truth)

    monkeypatch.setattr(trainer.loss.__class__, "__call__", loss_spy)
    monkeypatch.setattr(validation_module, "nmse", nmse_spy)
    trainer.validate()  # the average is the network before its first step
    validated = seen[0]
    trainer.network.train()
    trainer._train_step(trainer._prepared(trainer.source.validation()))
    torch.testing.assert_close(seen[-1], validated, rtol=1e-5, atol=1e-5)
