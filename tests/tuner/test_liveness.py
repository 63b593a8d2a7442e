"""Every searched parameter changes the trained result."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from model.training import Trainer
from tests.tuner.support import ROOT, TINY
from tuner.config import StudyConfig, load_study
from tuner.space import Value, default_space
from tuner.yamlfile import dump_yaml

_STUDIES = [load_study(path) for path in sorted((ROOT / "configs").glob("*.yaml"))]
_PATHS = sorted(set(default_space()).union(*(study.search.space for study in _STUDIES)))
# Another value than the tiny study's own, allowed beside its other fields.
_OTHER: dict[str, Value] = {
    "training.learning_rate": 4e-3,
    "training.weight_decay": 0.1,
    "training.batch_size": 4,
    "training.ema_decay": 0.05,  # below the ramp that short trainings are on
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


_FAMILIES: dict[str, dict[str, Any]] = {
    "snapshot": TINY["network"],
    "candidate": {
        "family": "candidate",
        "width": 8,
        "depth": 1,
        "heads": 2,
        "candidates": {"count": 2, "range_cells": 4},
    },
    "image": {
        "family": "image",
        "width": 8,
        "depth": 1,
        "azimuth_cells": 8,
        "elevation_cells": 4,
        "range_cells": 2,
        "range_bins": 4,
        "rank": 2,
    },
}
_WITHOUT = {("network.heads", "image")}  # fields that a family does not have


def study_of(folder: Path, family: str) -> StudyConfig:
    path = folder / "study.yaml"
    search = {
        "space": {"training.learning_rate": TINY["search"]["space"]["training.learning_rate"]}
    }
    tiny = {**TINY, "network": _FAMILIES[family], "search": search}
    path.write_text(dump_yaml(tiny), encoding="utf-8")
    return load_study(path)


def trained(folder: Path, params: dict[str, Value], family: str = "snapshot") -> dict[str, Any]:
    config = study_of(folder, family).trial_config(params, seed=1)
    trainer = Trainer(config)
    while not trainer.finished:
        metrics = trainer.run_epoch()
    return metrics


@pytest.mark.parametrize(
    ("path", "family"),
    [pair for pair in itertools.product(_PATHS, _FAMILIES) if pair not in _WITHOUT],
)
def test_trap_every_searched_parameter_changes_the_result(
    tmp_path: Path, path: str, family: str
) -> None:
    assert path in _OTHER, "a searched parameter without a liveness check"
    base, changed = (trained(tmp_path, p, family) for p in ({}, {path: _OTHER[path]}))
    assert changed["nmse_pred"] != base["nmse_pred"], "the scored network is the same"


def test_every_family_of_the_studies_is_trained_here() -> None:
    assert {study.network.family for study in _STUDIES} <= set(_FAMILIES)


def test_the_same_parameters_give_the_same_result(tmp_path: Path) -> None:
    for family in _FAMILIES:
        first, second = trained(tmp_path, {}, family), trained(tmp_path, {}, family)
        assert first["nmse_pred"] == second["nmse_pred"]


def test_trap_the_objective_is_free_of_every_searched_parameter(tmp_path: Path) -> None:
    """With the same weights, no searched loss weight, β or shrinkage enters the score."""
    study = study_of(tmp_path, "snapshot")
    score = Trainer(study.trial_config({}, seed=1)).validate()["nmse_pred"]
    for path in _PATHS:
        if path.startswith(("loss.", "blend.", "training.", "network.dropout")):
            config = study.trial_config({path: _OTHER[path]}, seed=1)
            assert Trainer(config).validate()["nmse_pred"] == score, path
