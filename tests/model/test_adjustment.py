from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from model import TrialConfig
from model.adjustment import adjustable_paths, first_difference, lasting
from model.checkpoint import CheckpointError
from model.network import build_network
from model.training import Trainer
from tests.tiny import tiny_candidate_config, tiny_config

IMAGE = {
    "family": "image", "width": 8, "depth": 1, "azimuth_cells": 6, "elevation_cells": 4,
    "range_cells": 2, "range_bins": 4, "rank": 3,
}  # fmt: skip


def image_config() -> TrialConfig:
    data = tiny_config().model_dump()
    return TrialConfig.model_validate(data | {"network": IMAGE})


def changed(config: TrialConfig, path: str, value: Any) -> TrialConfig:
    data = config.model_dump()
    *parents, last = path.split(".")
    here = data
    for part in parents:
        here = here[part]
    here[last] = value
    return TrialConfig.model_validate(data)


def other(value: Any) -> Any:
    """Another value that every adjustable field may hold."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return 0.5 * value if value else 0.25


@pytest.mark.parametrize(
    "config",
    [tiny_config(), tiny_candidate_config(), image_config()],
    ids=lambda config: config.network.family,
)
def test_what_is_adjustable_shapes_no_network(config: TrialConfig) -> None:
    def shapes(of: TrialConfig) -> dict[str, torch.Size]:
        network = build_network(of.network, of.scene, of.array.build())
        return {name: value.shape for name, value in network.state_dict().items()}

    paths = list(adjustable_paths(config))
    assert {"training.learning_rate", "network.dropout", "blend.beta", "loss.position"} <= {*paths}
    for path in paths:
        value: Any = config
        for part in path.split("."):
            value = getattr(value, part)
        adjusted = changed(config, path, other(value))
        assert adjusted != config, path
        assert lasting(adjusted) == lasting(config), path
        assert shapes(adjusted) == shapes(config), path


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("network.width", 32),
        ("network.heads", 4),  # the same shapes, and other heads
        ("network.depth", 2),
        ("network.rank", 4),
        ("training.batch_size", 8),
        ("training.epochs", 3),
        ("data.train_scenes", 32),
        ("data.seed", 1),
        ("scene.n_snapshots", 3),
        ("tikhonov.solver", "svd"),
        ("precision.amp", "off"),
        ("objective", "f1"),
    ],
)
def test_weights_of_another_kind_are_refused_with_the_field(
    tmp_path: Path, path: str, value: Any
) -> None:
    donor = Trainer(tiny_config())
    donor.save(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        Trainer(changed(tiny_config(), path, value)).inherit(tmp_path)
    assert f"weights of another kind: {path} is " in str(caught.value)


def test_terms_of_the_users_own_are_adjustable_by_their_weight_alone() -> None:
    extra = {"near": {"term": "examples.extension:near", "options": {"reach": 2.0}}}
    config = tiny_config(loss={"extra": extra})
    assert [p for p in adjustable_paths(config) if "extra" in p] == ["loss.extra.near.weight"]


def test_the_first_difference_is_named_however_deep_it_lies() -> None:
    theirs, ours = {"a": 1, "b": {"c": {"d": 2}}}, {"a": 1, "b": {"c": {"d": 3}, "e": 4}}
    assert first_difference(theirs, ours) == "b.c.d is 2 there and 3 here"
    assert first_difference(theirs, theirs) == "no field differs"


def test_an_heir_begins_where_its_donor_was_with_its_own_parameters_and_scores(
    tmp_path: Path,
) -> None:
    donor = Trainer(tiny_config(seed=1, training={"epochs": 4}))
    donor.run_epoch()
    first = donor.run_epoch()
    donor.save(tmp_path)
    parameters = {"learning_rate": 1e-4, "weight_decay": 0.3, "ema_decay": 0.1}
    config = tiny_config(seed=2, training={"epochs": 4} | parameters, blend={"beta": 0.5})
    heir = Trainer(config)
    fresh = {name: value.clone() for name, value in heir.network.state_dict().items()}
    heir.inherit(tmp_path)
    for name, value in heir.network.state_dict().items():
        assert torch.equal(value, donor.network.state_dict()[name])
    assert any(not torch.equal(fresh[n], v) for n, v in heir.network.state_dict().items())
    for name, value in heir.average.weights.items():
        assert torch.equal(value, donor.average.weights[name])
    assert heir.average.decay == 0.1
    theirs, ours = donor.optimizer.state_dict(), heir.optimizer.state_dict()
    for index, moments in theirs["state"].items():
        for name, value in moments.items():
            assert torch.equal(torch.as_tensor(ours["state"][index][name]), torch.as_tensor(value))
    assert [group["weight_decay"] for group in ours["param_groups"]] == [0.3, 0.0]
    assert (heir.epoch, heir.step, heir.average.steps) == (2, donor.step, donor.average.steps)
    assert (heir.best_objective, heir.best_epoch, heir.skipped_steps) == (math.inf, None, 0)
    metrics = heir.run_epoch()
    assert metrics["epoch"] == 3
    assert metrics["objective"] == metrics["nmse_pred"], "the donor's best is not its own"
    assert metrics["untrained_objective"] == first["untrained_objective"]
    # The schedule goes on where it was, at the new peak.
    assert metrics["learning_rate"] == pytest.approx(_rate_after(3, donor) * 1e-4 / 3e-3)


def _rate_after(epoch: int, trainer: Trainer) -> float:
    while trainer.epoch < epoch:
        metrics = trainer.run_epoch()
    return float(metrics["learning_rate"])


def test_two_heirs_of_one_donor_differ_by_their_seed_alone(tmp_path: Path) -> None:
    donor = Trainer(tiny_config(training={"epochs": 3}, network={"dropout": 0.2}))
    donor.run_epoch()
    donor.save(tmp_path)
    objectives = []
    for seed in (5, 6, 5):
        heir = Trainer(tiny_config(seed=seed, training={"epochs": 3}, network={"dropout": 0.2}))
        heir.inherit(tmp_path)
        objectives.append(heir.run_epoch()["objective"])
    assert objectives[0] == objectives[2] != objectives[1]


def test_a_donor_that_is_not_there_is_no_start_from_the_beginning(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        Trainer(tiny_config()).inherit(tmp_path / "absent")
