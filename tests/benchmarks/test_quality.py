"""Benchmarks of what networks and searches are worth: they measure, and disturb nothing."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import quality
from benchmarks.quality import paired, subspace_error_of
from model.blending import blended_covariance
from model.checkpoint import export_best
from model.config import TrialConfig
from model.training import Trainer
from tests.tiny import tiny_candidate_config, tiny_config
from tuner.config import StudyConfig


@pytest.mark.parametrize("make", [tiny_config, tiny_candidate_config])
def test_a_look_at_a_training_changes_nothing_in_it(make: Any) -> None:
    config: TrialConfig = make()
    plain, watched = Trainer(config), Trainer(config)
    for _ in range(2):
        alone = plain.run_epoch()
        metrics = watched.run_epoch()
        assert 0 < subspace_error_of(watched) < 1
        for name in ("objective", "loss", "grad_norm", "nmse_pred"):
            assert metrics[name] == alone[name]
    assert all(torch.equal(a, b) for a, b in zip(
        plain.network.parameters(), watched.network.parameters(), strict=True
    ))  # fmt: skip


def test_the_subspace_error_is_that_of_projections() -> None:
    trainer = Trainer(tiny_candidate_config())
    trainer.run_epoch()
    found = subspace_error_of(trainer)
    trainer._set_weights(trainer.average.weights)
    trainer.network.eval()
    batch = trainer.source.validation()
    with torch.no_grad():
        features = trainer._features(batch)
        prediction = trainer.network(features)
        R = blended_covariance(prediction, features, trainer.config.blend).dense()
    truth = batch.scenes.covariance(trainer.array, trainer.config.scene.wavefront).dense()
    errors = []
    for item, count in enumerate(batch.scenes.n_sources.tolist()):
        U = np.linalg.eigh(R[item].numpy())[1][:, -count:]
        Q = np.linalg.eigh(truth[item].numpy())[1][:, -count:]
        errors.append(1 - np.linalg.norm(U.conj().T @ Q) ** 2 / count)
    assert found == pytest.approx(np.mean(errors), abs=1e-3)


def test_differences_are_paired_by_scene_and_as_wide_as_new_seeds_would_make_them() -> None:
    generator = torch.Generator().manual_seed(0)
    scenes = torch.randn(2000, generator=generator, dtype=torch.float64)  # cancels in a pair

    def runs(means: list[float]) -> list[Any]:
        values = [scenes + mean for mean in means]
        return [(2000, lambda indices, v=v: v[indices].mean(-1)) for v in values]

    difference, low, high = paired(runs([1.0]), runs([0.7]))
    assert difference == pytest.approx(0.3)
    assert high - low < 1e-9
    seeds = [0.5, 1.5, 0.9, 1.6, 0.2, 1.3]
    difference, low, high = paired(runs(seeds), runs([0.7]))
    assert difference == pytest.approx(0.3)
    standard_error = np.std(seeds, ddof=1) / math.sqrt(len(seeds))
    assert (high - low) / 2 == pytest.approx(1.96 * standard_error, rel=0.1)


def test_objectives_are_ranked_and_goals_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_candidate_config(data={"cache": tmp_path / "cache"})
    values = config.model_dump(mode="json") | {
        "search": {
            "grace_epochs": 1,
            "space": {
                "training.learning_rate": {"type": "float", "low": 1e-3, "high": 1e-2},
            },
        }
    }
    study = StudyConfig.model_validate(values)
    (tmp_path / "study.yaml").write_text(study.to_yaml())
    trainer = Trainer(config)
    trainer.run_epoch()
    trainer.save(tmp_path / "checkpoint")
    export_best(tmp_path / "checkpoint", tmp_path / "best")
    for words in (
        f"objectives --config {tmp_path}/study.yaml --trials 3",
        f"goals --checkpoint {tmp_path}/best --suite ideal",
        f"covariances --checkpoint {tmp_path}/best --beta 0.1 0.3",
    ):
        out = tmp_path / "found.json"
        words += f" --scenes 32 --threads {torch.get_num_threads()} --json {out}"
        monkeypatch.setattr(sys, "argv", ["quality", *words.split()])
        quality.main()
        found = json.loads(out.read_text())
        if words.startswith("objectives"):
            assert set(found["rank_correlation"]) == set(quality.METRICS)
            assert len(found["trials"]) == 3
        elif words.startswith("covariances"):
            for method in ("music", "mvdr"):
                value, low, high = found[f"{method} on R_blend, beta 0.3"]["less R_pred"]
                assert low <= value <= high
                assert found[f"{method} on R_pred"]["less R_pred"] == [0.0, 0.0, 0.0]
        else:
            for goal in ("f1", "gospa", "count"):
                value, low, high = found[f"{goal} less nomp"]["count_accuracy"]
                assert low <= value <= high
                right = found[goal]["count_accuracy"] - found["nomp"]["count_accuracy"]
                assert value == pytest.approx(right)
    assert "rank correlation" in capsys.readouterr().out
