"""Simulated streams: independent splits, a fixed validation set, chunks that do not matter."""

from __future__ import annotations

import pytest
import torch

from model.config import TrialConfig
from model.data import Batch, open_source
from physics import Scenes
from tests.tiny import tiny_config

CPU = torch.device("cpu")


def epoch(config: TrialConfig, number: int, batch_size: int) -> Scenes:
    source = open_source(config, CPU)
    return Batch.concatenate(list(source.train_batches(number, batch_size, 0))).scenes


def keys(scenes: Scenes) -> set[bytes]:
    return {row.numpy().tobytes() for row in scenes.y}


def test_trap_splits_of_neighbouring_seeds_share_no_scene() -> None:
    seen: dict[bytes, str] = {}
    for seed in range(4):
        config = tiny_config(data={"seed": seed, "train_scenes": 300, "val_scenes": 300})
        parts = {f"{seed} train {e}": epoch(config, e, 64) for e in range(2)}
        parts[f"{seed} val"] = open_source(config, CPU).validation().scenes
        for name, scenes in parts.items():
            for key in keys(scenes):
                assert seen.setdefault(key, name) == name
    assert len(seen) == 4 * 900


@pytest.mark.parametrize("batch_size", [7, 64, 300, 1000])
def test_the_scenes_of_an_epoch_do_not_depend_on_the_batch_size(batch_size: int) -> None:
    config = tiny_config(data={"train_scenes": 300, "val_scenes": 8})
    one, two = epoch(config, 1, 32), epoch(config, 1, batch_size)
    assert torch.equal(one.y, two.y)
    assert len(two) == 300
    source = open_source(config, CPU)
    assert source.n_batches(batch_size) == len(list(source.train_batches(1, batch_size, 0)))


def test_fresh_epochs_differ_and_fixed_ones_are_a_shuffle_of_the_same() -> None:
    fresh = tiny_config()
    assert not keys(epoch(fresh, 0, 16)) & keys(epoch(fresh, 1, 16))
    fixed = tiny_config(data={"fresh": False})
    first, second = epoch(fixed, 0, 16), epoch(fixed, 1, 16)
    assert keys(first) == keys(second)
    assert not torch.equal(first.y, second.y)


def test_validation_is_the_same_for_every_trial() -> None:
    one = open_source(tiny_config(seed=1), CPU).validation()
    two = open_source(
        tiny_config(seed=2, training={"batch_size": 3}, network={"width": 32}), CPU
    ).validation()
    assert torch.equal(one.scenes.y, two.scenes.y)
    assert len(one) == 24
