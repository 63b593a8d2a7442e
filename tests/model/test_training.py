"""The training loop, trained for real."""

from __future__ import annotations

import json
import logging
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import model.training as training_module
from model import Trainer, TrialDiverged, train
from model.checkpoint import Checkpoint, CheckpointError, export_best, read_decision, save_tensors
from model.decision import Decision
from model.loss import MISSED
from model.pointing import match_slots
from physics import nmse, steering_vector
from tests.model.support import run, weights_of
from tests.tiny import tiny_candidate_config, tiny_config


def test_same_seed_trains_bit_for_bit_the_same_and_another_seed_does_not() -> None:
    first, second = Trainer(tiny_config()), Trainer(tiny_config())
    assert run(first, 2) == run(second, 2)
    a, b = weights_of(first), weights_of(second)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert run(Trainer(tiny_config(seed=1)), 1) != run(Trainer(tiny_config()), 1)


@pytest.mark.parametrize("fresh", [True, False])
def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path: Path, fresh: bool) -> None:
    config = tiny_config(training={"epochs": 4}, network={"dropout": 0.3}, data={"fresh": fresh})
    whole = Trainer(config)
    record = run(whole, 4)
    first = Trainer(config)
    start = run(first, 2)
    first.save(tmp_path / "checkpoint")
    torch.rand(17)  # whatever else draws from the global generator
    second = Trainer(config)
    second.load(tmp_path / "checkpoint")
    assert start + run(second, 2) == record
    a, b = weights_of(whole), weights_of(second)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(whole.best_weights[k], second.best_weights[k]) for k in a)


def test_an_interrupted_training_of_candidates_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config = tiny_candidate_config(
        objective="f1",
        training={"epochs": 4, "snr_dropout": 0.5},
        network={"dropout": 0.3},
        data={"cache": tmp_path / "cache"},
    )
    whole = Trainer(config)
    record = run(whole, 4)
    first = Trainer(config)
    start = run(first, 2)
    first.save(tmp_path / "checkpoint")
    torch.rand(17)
    second = Trainer(config)
    second.load(tmp_path / "checkpoint")
    assert second.best_decision == first.best_decision
    assert start + run(second, 2) == record
    a, b = weights_of(whole), weights_of(second)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(whole.best_weights[k], second.best_weights[k]) for k in a)
    assert whole.best_decision == second.best_decision
    assert whole.decision == second.decision


@pytest.mark.parametrize("family", ["snapshot", "candidate"])
@pytest.mark.parametrize("objective", ["nmse", "f1", "gospa", "nll"])
def test_the_objective_is_the_least_of_what_the_configuration_names(
    family: str, objective: str
) -> None:
    if family == "candidate":
        config = tiny_candidate_config(objective=objective, training={"learning_rate": 0.1})
    else:
        config = tiny_config(training={"learning_rate": 0.1})
        config = config.model_copy(update={"objective": objective})
    trainer = Trainer(config)
    before = trainer.validate()
    record = run(trainer, 2)

    def of(metrics: dict[str, Any]) -> float:
        if objective == "f1":
            return 1.0 - metrics["f1"]
        return float(metrics["nmse_pred" if objective == "nmse" else objective])

    assert record[0]["untrained_objective"] == record[1]["untrained_objective"] == of(before)
    assert record[0]["objective"] == of(record[0])
    assert record[1]["objective"] == min(of(record[0]), of(record[1]))
    best = 1 + int(of(record[1]) < of(record[0]))
    assert trainer.best_epoch == best


@pytest.mark.parametrize("goal", ["f1", "gospa", "count"])
def test_validation_names_the_sources_that_its_decision_names(goal: str) -> None:
    from model.decision import Judged, choose, judge
    from physics.metrics import gospa, match

    trainer = Trainer(tiny_candidate_config(data={"val_scenes": 130}, decision={"goal": goal}))
    assert trainer.decision.goal == goal
    metrics = trainer.validate()
    batch = trainer.source.validation()
    assert len(batch) == 130, "more than one batch of validation"
    trainer.network.eval()
    with torch.no_grad():
        judged = [
            judge(trainer.network(trainer._features(batch[index])), goal)  # type: ignore[arg-type]
            for index in (slice(0, 128), slice(128, 130))
        ]
    together = Judged.concatenate(judged)
    decision = choose(together, batch.scenes, goal)  # type: ignore[arg-type]
    assert trainer.decision == decision
    found = together.named(decision)
    matching = match(found, batch.scenes.position, batch.scenes.present)
    assert metrics["f1"] == matching.f1
    assert metrics["count_accuracy"] == matching.count_accuracy
    cost = gospa(found, batch.scenes.position, batch.scenes.present).total.double().mean()
    assert metrics["gospa"] == float(cost)


def test_the_decision_of_the_best_epoch_is_kept_and_exported(tmp_path: Path) -> None:
    config = tiny_candidate_config(training={"epochs": 3})
    trainer = Trainer(config)
    trainer.run_epoch()
    kept, objective = trainer.decision, trainer.best_objective
    assert trainer.best_decision == kept
    # The next epoch is worse, whatever it decides.
    trainer.best_objective = -1.0
    with torch.no_grad():
        for weight in trainer.average.weights.values():
            weight.add_(torch.randn_like(weight))
    trainer.run_epoch()
    assert trainer.decision != kept
    assert trainer.best_decision == kept
    trainer.best_objective = objective
    trainer.save(tmp_path / "c")
    restored = Trainer(config)
    restored.load(tmp_path / "c")
    assert restored.best_decision == kept
    export_best(tmp_path / "c", tmp_path / "best")
    assert read_decision(tmp_path / "best") == kept
    # As numbers in a file that anyone can read.
    assert json.loads((tmp_path / "best" / "decision.json").read_text()) == {
        "goal": "f1", "threshold": kept.threshold, "spread": kept.spread,
    }  # fmt: skip


def test_a_training_goes_on_with_another_number_of_threads(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config(training={"threads": 1}))
    trainer.run_epoch()
    trainer.save(tmp_path / "c")
    other = Trainer(tiny_config(training={"threads": 2}))
    other.load(tmp_path / "c")
    assert other.epoch == 1
    with pytest.raises(CheckpointError, match=r"training\.batch_size"):
        Trainer(tiny_config(training={"batch_size": 3})).load(tmp_path / "c")


def test_a_decision_that_is_none_is_refused_and_a_missing_one_is_the_default(
    tmp_path: Path,
) -> None:
    assert read_decision(tmp_path) == Decision()
    for text in ("{", '{"goal": "best"}', '{"threshold": "high"}', "[]"):
        (tmp_path / "decision.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"decision\.json: not a decision of a training"):
            read_decision(tmp_path)
    for text in ('{"threshold": NaN}', '{"threshold": -1}', '{"threshold": 1.5}', '{"spread": 0}'):
        (tmp_path / "decision.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"decision\.json: "):
            read_decision(tmp_path)


def test_a_training_of_candidates_lowers_its_objective() -> None:
    config = tiny_candidate_config(
        objective="f1",
        training={"epochs": 6, "learning_rate": 1e-2, "ema_decay": 0.9, "snr_dropout": 0.0},
        scene={"source_mode": "constant", "n_antennas": 8, "n_snapshots": 8, "min_sources": 0},
        data={"train_scenes": 128, "val_scenes": 64, "fresh": False},
    )
    trainer = Trainer(config)
    record = run(trainer, 6)
    assert record[-1]["loss_existence"] < 0.7 * record[0]["loss_existence"]
    assert record[-1]["loss_position"] < record[0]["loss_position"]
    assert record[-1]["objective"] < record[-1]["untrained_objective"] - 0.05
    assert record[-1]["count_accuracy"] > 0.6


def test_training_lowers_loss_and_objective() -> None:
    config = tiny_config(
        training={"epochs": 8, "learning_rate": 1e-2},
        scene={"n_antennas": 8, "n_snapshots": 8, "max_sources": 1, "source_mode": "constant"},
        data={"train_scenes": 256, "val_scenes": 64},
    )
    trainer = Trainer(config)
    record = run(trainer, 8)
    assert record[-1]["loss"] < 0.9 * record[0]["loss"]
    assert record[-1]["objective"] < 0.8 * record[-1]["untrained_objective"]
    objectives = [r["objective"] for r in record]
    assert objectives == sorted(objectives, reverse=True), "best so far never rises"


@pytest.mark.parametrize(
    "sections",
    [
        {"network": {"range_cells": 1}},
        {"scene": {"range_m": (3.0, 3.0)}},
        {"scene": {"elevation_deg": (7.0, 7.0)}},
    ],
)
def test_an_axis_of_one_cell_or_without_extent_trains(sections: dict[str, Any]) -> None:
    metrics = Trainer(tiny_config(**sections)).run_epoch()
    assert metrics["skipped_steps"] == 0
    assert metrics["loss_position"] < 10


def test_every_metric_is_finite_and_plain() -> None:
    metrics = Trainer(tiny_config()).run_epoch()
    assert metrics["epoch"] == 1
    assert {
        "objective", "nmse_pred", "nmse_blend", "loss", "grad_norm", "skipped_steps",
        "solver_fallbacks", "scenes_per_second", "learning_rate", "epoch_seconds",
        "early_stopped", "loss_subspace_align", "loss_peak_contrast", "loss_cov_pred",
    } <= metrics.keys()  # fmt: skip
    assert all(type(v) in (int, float, bool) and math.isfinite(v) for v in metrics.values())
    json.dumps(metrics, allow_nan=False)


def test_validation_leaves_the_training_weights_untouched() -> None:
    trainer = Trainer(tiny_config())
    run(trainer, 1)
    before = weights_of(trainer)
    trainer.validate()
    after = weights_of(trainer)
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_non_finite_step_is_skipped_counted_and_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = Trainer(tiny_config())
    poison(trainer, {(0, 1)})
    with caplog.at_level(logging.WARNING):
        metrics = trainer.run_epoch()
    assert metrics["skipped_steps"] == 1
    assert "step 2 of 6 skipped: gradient norm nan (1 in a row)" in caplog.text
    assert all(bool(torch.isfinite(p).all()) for p in trainer.network.parameters())
    assert math.isfinite(metrics["objective"])


def test_a_run_of_non_finite_steps_ends_the_trial_with_its_reason() -> None:
    config = tiny_config(
        training={"learning_rate": 1e30, "warmup_fraction": 0.0, "max_skipped_steps": 3},
        data={"train_scenes": 320},
    )
    with pytest.raises(TrialDiverged, match="3 non-finite steps in a row in epoch 1; lower"):
        Trainer(config).run_epoch()


def poison(trainer: Trainer, bad_steps: set[tuple[int, int]]) -> None:
    """Make (epoch, batch) of a training non-finite."""
    original = trainer.source.train_batches

    def poisoned(epoch: int, batch_size: int, seed: int) -> Any:
        for i, batch in enumerate(original(epoch, batch_size, seed)):
            bad = replace(batch.scenes, power=torch.full_like(batch.scenes.power, math.nan))
            yield replace(batch, scenes=bad) if (epoch, i) in bad_steps else batch

    trainer.source.train_batches = poisoned  # type: ignore[method-assign]


def test_only_a_run_of_non_finite_steps_ends_a_trial_and_it_runs_on_through_a_checkpoint(
    tmp_path: Path,
) -> None:
    config = tiny_config(training={"epochs": 4, "max_skipped_steps": 3})
    trainer = Trainer(config)
    poison(trainer, {(0, 0), (0, 2), (1, 0), (2, 1), (2, 2)})
    assert [r["skipped_steps"] for r in run(trainer, 3)] == [2, 3, 5]
    trainer.save(tmp_path)
    restored = Trainer(config)
    restored.load(tmp_path)
    poison(restored, {(3, 0)})
    with pytest.raises(TrialDiverged, match="3 non-finite steps in a row in epoch 4"):
        restored.run_epoch()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_snr_of_a_share_of_the_training_scenes_is_hidden(
    monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    seen: list[Tensor] = []
    original = training_module.compute_features

    def spy(y: Tensor, H: Tensor, codes: Tensor, snr_db: Tensor, **rest: Any) -> Any:
        seen.append(snr_db)
        return original(y, H, codes, snr_db, **rest)

    monkeypatch.setattr(training_module, "compute_features", spy)
    trainer = Trainer(tiny_config(training={"snr_dropout": share, "epochs": 1}))
    trainer.validate()
    assert not torch.cat(seen).isnan().any(), "never in validation"
    seen.clear()
    trainer._train_epoch()
    hidden = float(torch.cat(seen).isnan().double().mean())
    # 48 draws: their share is within four standard deviations, 4 * 0.5 / sqrt(48).
    assert hidden == share if share in (0.0, 1.0) else abs(hidden - share) < 0.29


def test_the_loss_goes_through_its_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    phases: list[str] = []
    config = tiny_config(
        training={"epochs": 3, "warmup_fraction": 0.34}, loss={"final_fraction": 0.4}
    )
    trainer = Trainer(config)
    original = trainer.loss.__class__.__call__

    def spy(self: Any, prediction: Any, blended: Any, scenes: Any, phase: str, *rest: Any) -> Any:
        phases.append(phase)
        return original(self, prediction, blended, scenes, phase, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer.loss.__class__, "__call__", spy)
    run(trainer, 3)
    assert phases == ["warmup"] * 3 + ["main"] * 3 + ["final"] * 3


def test_gradient_norm_is_reported_before_clipping_and_clipped() -> None:
    config = tiny_config(training={"gradient_clip": 1e-3, "epochs": 1})
    trainer = Trainer(config)
    metrics = trainer.run_epoch()
    assert metrics["grad_norm"] > 1e-2
    total = torch.stack([p.grad.norm() for p in trainer.network.parameters() if p.grad is not None])
    assert float(total.norm()) == pytest.approx(1e-3, rel=1e-3)


def test_training_stops_early_when_nothing_improves() -> None:
    config = tiny_config(training={"epochs": 50, "patience": 2, "learning_rate": 1e-12})
    trainer = Trainer(config)
    record = []
    while not trainer.finished:
        record.append(trainer.run_epoch())
    assert record[-1]["early_stopped"]
    assert trainer.best_epoch is not None
    assert trainer.epoch == trainer.best_epoch + 2 < 50
    with pytest.raises(RuntimeError, match="finished"):
        trainer.run_epoch()


def test_train_reports_every_epoch_and_resumes_where_it_was(tmp_path: Path) -> None:
    config = tiny_config(training={"epochs": 3})
    reported: list[tuple[int, float]] = []

    class Interrupt(Exception):
        pass

    def report(step: int, metrics: dict[str, Any]) -> None:
        reported.append((step, metrics["objective"]))
        if len(reported) == 2:
            raise Interrupt

    with pytest.raises(Interrupt):
        train(config, report=report, checkpoint=tmp_path / "c")
    last = train(config, report=report, checkpoint=tmp_path / "c")
    assert [s for s, _ in reported] == [1, 2, 3]
    assert last["objective"] == train(config)["objective"]


@pytest.mark.parametrize("how", ["missing", "cut", "foreign"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, how: str) -> None:
    trainer = Trainer(tiny_config())
    run(trainer, 1)
    trainer.save(tmp_path / "c")
    path = tmp_path / "c" / "checkpoint.safetensors"
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        save_tensors(path, {"weight": torch.ones(3)})
    with pytest.raises(
        CheckpointError, match=r"checkpoint\.safetensors: (no such|not read|format None)"
    ):
        Trainer(tiny_config()).load(tmp_path / "c")


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config())
    run(trainer, 1)
    trainer.save(tmp_path / "c")
    with pytest.raises(CheckpointError, match="another configuration: seed is 0 there and 5 here"):
        Trainer(tiny_config(seed=5)).load(tmp_path / "c")


@pytest.mark.parametrize("make", [tiny_config, tiny_candidate_config])
def test_the_likelihood_is_that_of_the_averaged_weights_over_all_validation_scenes(
    make: Any,
) -> None:
    config = make(scene={"min_sources": 0})
    trainer = Trainer(config)
    run(trainer, 1)
    found = trainer.validate()["nll"]
    trainer._set_weights(trainer.average.weights)
    trainer.network.eval()
    batch = trainer.source.validation()
    with torch.no_grad():
        p = trainer.network(trainer._features(batch))
    scenes = batch.scenes
    steering = steering_vector(scenes.position, trainer.array)
    pointing = trainer.loss._pointing(p, scenes, steering)
    slot, source = match_slots(p, pointing.score(), scenes.present)
    density = pointing.log_density(source, config.scene.extent)
    total, n_claimed = 0.0, 0
    for b in range(len(batch)):
        left = int(scenes.n_sources[b])
        for i in range(p.existence.shape[1]):
            q = 1 / (1 + math.exp(-float(p.existence[b, i])))
            claimed = math.log(q) + float(density[b, i])
            is_worth_it = bool(slot[b, i]) and claimed > math.log(1 - q) + math.log(MISSED)
            total -= claimed if is_worth_it else math.log(1 - q)
            left -= is_worth_it
            n_claimed += is_worth_it
        total += MISSED - left * math.log(MISSED)
    assert n_claimed > 5
    assert found == pytest.approx(total / len(batch), rel=1e-4)


def test_empty_scenes_say_nothing_of_covariances() -> None:
    trainer = Trainer(tiny_config(scene={"min_sources": 0}))
    found = trainer.validate()
    batch = trainer.source.validation()
    trainer.network.eval()
    with torch.no_grad():
        prediction = trainer.network(trainer._features(batch))
    error = nmse(prediction.covariance, batch.scenes.covariance(trainer.array, "spherical"))
    held = batch.scenes.n_sources > 0
    assert 0 < int(held.sum()) < len(batch)
    assert found["nmse_pred"] == pytest.approx(float(error[held].mean()), rel=1e-5)
    assert float(error[~held].min()) > 2 * found["nmse_pred"], "they would drown the others"


def test_weights_of_an_earlier_version_are_refused_with_what_they_are(tmp_path: Path) -> None:
    trainer = Trainer(tiny_config())
    run(trainer, 1)
    trainer.save(tmp_path / "c")
    kept = Checkpoint.load(tmp_path / "c")
    name, weight = next((n, w) for n, w in kept.tensors["network"].items() if len(w) > 3)
    fresh = Trainer(tiny_config())
    before = weights_of(fresh)
    for changed, said in (
        ({name: weight[:-2]}, f"{name} is {tuple(weight[:-2].shape)}, expected"),
        ({"gone": weight}, f"gone is {tuple(weight.shape)}, expected none of that name"),
    ):
        network = kept.tensors["network"] | changed
        replace(kept, tensors=kept.tensors | {"network": network}).save(tmp_path / "old")
        with pytest.raises(CheckpointError, match=re.escape(said)):
            fresh.load(tmp_path / "old")
    after = weights_of(fresh)
    assert all(torch.equal(after[k], before[k]) for k in before), "nothing is taken over by halves"


def test_r_true_of_the_validation_scenes_has_no_error_against_itself() -> None:
    trainer = Trainer(tiny_config())
    truth = trainer.source.validation().scenes.covariance(trainer.array, "spherical")
    assert float(nmse(truth, truth).max()) < 1e-6
