"""A step in parts is the step of the whole batch, with less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks._timing import PeakMemory
from model import TrialConfig
from model.checkpoint import CheckpointError
from model.training import Trainer
from tests.tiny import tiny_candidate_config, tiny_config

IMAGE: dict[str, Any] = {
    "family": "image",
    "width": 16,
    "depth": 2,
    "azimuth_cells": 12,
    "elevation_cells": 8,
    "range_cells": 3,
    "range_bins": 6,
    "rank": 40,  # many directions, so that some are of a source before anything is learned
    "dropout": 0.0,
}


def config_of(family: str, accumulation: int = 1, **training: Any) -> TrialConfig:
    """Batches with scenes without any source, and with jitter and drawn decoys."""
    training = {"accumulation": accumulation, "batch_size": 13} | training
    sections: dict[str, Any] = {
        "training": training,
        "scene": {"min_sources": 0, "snr_db": (0.0, 20.0)},
        "loss": {"decoys": 16},
        "data": {"train_scenes": 26},
    }
    if family == "candidate":
        network = {"dropout": 0.0}
        return tiny_candidate_config(**sections, network=network)
    if family == "image":
        config = tiny_config(**sections)
        data = config.model_dump() | {"network": IMAGE}
        return TrialConfig.model_validate(data)
    return tiny_config(**sections, network={"dropout": 0.0})


def test_of_the_image_network_some_sources_have_no_slot() -> None:
    trainer = Trainer(config_of("image"))
    batch = next(iter(trainer.source.train_batches(0, 13, 0)))
    counts = trainer._counts(trainer._prepared(batch))
    assert 0 < int(counts.matched) < int(counts.sources), "the case must tell the two apart"


def gradient(trainer: Trainer) -> tuple[Tensor, dict[str, float]]:
    """The clipped gradient of the first step, and its terms."""
    batch = next(iter(trainer.source.train_batches(0, 13, 0)))
    assert int(batch.scenes.n_sources.min()) == 0 < int(batch.scenes.n_sources.max())
    trainer.network.train()
    trainer._seed_epoch(1)
    terms, norm = trainer._train_step(trainer._prepared(batch)).outcome()
    assert terms is not None
    found = [p.grad.flatten() for p in trainer.network.parameters() if p.grad is not None]
    return torch.cat(found), terms | {"norm": norm}


@pytest.mark.parametrize("family", ["snapshot", "image", "candidate"])
@pytest.mark.parametrize("accumulation", [2, 3, 13, 40])
def test_the_gradient_of_the_parts_is_that_of_the_whole_batch(
    family: str, accumulation: int
) -> None:
    whole, terms = gradient(Trainer(config_of(family)))
    parts, again = gradient(Trainer(config_of(family, accumulation)))
    # Single precision, summed in another order; a wrong share of one term is off by a hundredth.
    assert float((parts - whole).norm() / whole.norm()) < 1e-4
    assert again == pytest.approx(terms, rel=1e-4)


def test_the_counting_pass_of_a_gated_network_sees_the_dropout_of_the_training_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of("image", 3)
    data = config.model_dump()
    data["network"]["dropout"] = 0.5
    trainer = Trainer(TrialConfig.model_validate(data))
    seen: list[Tensor] = []
    trainer.network.register_forward_hook(lambda *call: seen.append(call[2].heat.detach()))
    gradient(trainer)
    assert len(seen) == 6
    for counted, trained in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(counted, trained)


def test_a_step_in_parts_takes_less_memory() -> None:
    def peak(accumulation: int) -> int:
        trainer = Trainer(config_of("snapshot", accumulation, batch_size=64))
        batch = next(iter(trainer.source.train_batches(0, 64, 0)))
        with PeakMemory() as memory:
            trainer._train_step(trainer._prepared(batch))
        return memory.peak

    assert peak(4) < 0.5 * peak(1)


def test_a_training_in_parts_ends_where_the_whole_one_does(tmp_path: Path) -> None:
    whole, parts = Trainer(config_of("snapshot")), Trainer(config_of("snapshot", 2))
    for _ in range(2):
        expected, found = whole.run_epoch(), parts.run_epoch()
        assert found["objective"] == pytest.approx(expected["objective"], rel=1e-3)
    assert whole.step == parts.step


def test_a_checkpoint_goes_on_in_other_parts_but_with_no_other_batch(tmp_path: Path) -> None:
    first = Trainer(config_of("snapshot"))
    first.run_epoch()
    first.save(tmp_path / "checkpoint")
    second = Trainer(config_of("snapshot", 4))
    second.load(tmp_path / "checkpoint")
    assert second.epoch == 1
    second.run_epoch()
    with pytest.raises(CheckpointError, match=r"training\.batch_size is 13 there and 12 here"):
        Trainer(config_of("snapshot", batch_size=12)).load(tmp_path / "checkpoint")


def test_a_part_that_is_not_finite_spoils_its_step_and_no_other() -> None:
    trainer = Trainer(config_of("snapshot", 3))
    batch = next(iter(trainer.source.train_batches(0, 13, 0)))
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    batch.scenes.power[12] = torch.nan  # in the last part
    terms, norm = trainer._train_step(trainer._prepared(batch)).outcome()
    assert terms is None or not norm < float("inf")
    for name, parameter in trainer.network.named_parameters():
        assert torch.equal(parameter, before[name])
