"""Every searched parameter changes the trained result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model.training import Trainer
from tests.tuner.support import ROOT, tiny_study
from tuner.config import load_study
from tuner.space import Value, default_space

_PATHS = sorted(
    set(default_space()).union(
        *(load_study(path).search.space for path in sorted((ROOT / "configs").glob("*.yaml")))
    )
)
# Another value than the tiny study's own, allowed beside its other fields.
_OTHER: dict[str, Value] = {
    "training.learning_rate": 4e-3,
    "training.weight_decay": 0.1,
    "training.batch_size": 4,
    "network.width": 16,
    "network.depth": 2,
    "network.heads": 4,
    "network.dropout": 0.3,
    "loss.cov_pred": 0.4,
    "loss.subspace_align": 0.4,
    "loss.peak_contrast": 0.4,
    "loss.existence": 0.4,
    "loss.position": 0.4,
    "blend.beta": 0.55,
    "blend.shrinkage": 0.25,
    "tikhonov.regularization": 0.05,
}


def trained(folder: Path, params: dict[str, Value]) -> dict[str, Any]:
    config = tiny_study(folder).trial_config(params, seed=1)
    trainer = Trainer(config)
    while not trainer.finished:
        metrics = trainer.run_epoch()
    return metrics


@pytest.mark.parametrize("path", _PATHS)
def test_trap_every_searched_parameter_changes_the_result(tmp_path: Path, path: str) -> None:
    assert path in _OTHER, "a searched parameter without a liveness check"
    base, changed = trained(tmp_path, {}), trained(tmp_path, {path: _OTHER[path]})
    assert changed["nmse_pred"] != base["nmse_pred"], "the scored network is the same"


def test_the_same_parameters_give_the_same_result(tmp_path: Path) -> None:
    first, second = trained(tmp_path, {}), trained(tmp_path, {})
    assert first["nmse_pred"] == second["nmse_pred"]


def test_trap_the_objective_is_free_of_every_searched_parameter(tmp_path: Path) -> None:
    """With the same weights, no searched loss weight, β or shrinkage enters the score."""
    study = tiny_study(tmp_path)
    score = Trainer(study.trial_config({}, seed=1)).validate()["nmse_pred"]
    for path in _PATHS:
        if path.startswith(("loss.", "blend.", "training.", "network.dropout")):
            config = study.trial_config({path: _OTHER[path]}, seed=1)
            assert Trainer(config).validate()["nmse_pred"] == score, path
