"""Batches and their candidates: each scene its own, found once for all trials, at its own level."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import model.data as data_module
from model.data import Batch, open_source
from model.front_end import CandidateSearch
from physics import Scenes, simulate
from tests.model.support import Counted, call, equal, files
from tests.tiny import tiny_candidate_config, tiny_config

CONFIG = tiny_candidate_config()
ARRAY = CONFIG.array.build()
CPU = torch.device("cpu")


def epoch(config: Any, number: int = 0, batch_size: int = 16) -> Batch:
    source = open_source(config, CPU)
    return Batch.concatenate(list(source.train_batches(number, batch_size, config.seed)))


@pytest.mark.parametrize("fresh", [True, False])
def test_every_batch_holds_the_candidates_of_its_own_scenes(tmp_path: Path, fresh: bool) -> None:
    config = tiny_candidate_config(
        data={"cache": tmp_path, "train_scenes": 21, "fresh": fresh},
        training={"snr_dropout": 0.4},
    )
    front_end = CandidateSearch.of(config, keep=False)
    assert front_end is not None
    source = open_source(config, CPU)
    for batch in [*source.train_batches(1, 8, 3), source.validation()]:
        assert batch.candidates is not None
        expected = call(front_end, batch.scenes, batch.snr_db)
        for name, value in batch.candidates.tensors().items():
            torch.testing.assert_close(value, expected.tensors()[name], rtol=1e-2, atol=1e-2)
    assert len(batch) == 24


@pytest.mark.parametrize("process", [0, 1, 5])
def test_a_fixed_set_is_the_same_at_whatever_chunk_a_process_begins(
    process: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "CHUNK", 8)
    monkeypatch.setattr(os, "getpid", lambda: process)
    config = tiny_candidate_config(
        data={"cache": tmp_path, "train_scenes": 20, "val_scenes": 17, "fresh": False},
        training={"snr_dropout": 0.5},
    )
    counted = Counted(monkeypatch)
    source = open_source(config, CPU)
    batches = [source.validation(), Batch.concatenate(list(source.train_batches(0, 7, 0)))]
    in_order = Scenes.concatenate(
        list(data_module.simulate_split(config.data, config.scene, ARRAY, "val", 17))
    )
    assert torch.equal(batches[0].scenes.y, in_order.y)
    assert counted.scenes[:3] == [[8, 8, 1], [8, 1, 8], [1, 8, 8]][process % 3]
    front_end = CandidateSearch.of(config, keep=False)
    assert front_end is not None
    for batch in batches:
        assert batch.candidates is not None
        expected = call(front_end, batch.scenes, batch.snr_db)
        for name, value in batch.candidates.tensors().items():
            torch.testing.assert_close(value, expected.tensors()[name], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("family", ["snapshot", "candidate"])
def test_hidden_levels_are_the_same_for_every_trial_and_others_in_every_epoch(
    family: str, tmp_path: Path
) -> None:
    make = tiny_config if family == "snapshot" else tiny_candidate_config
    data = {"cache": tmp_path, "train_scenes": 40}
    one = make(seed=1, data=data, training={"snr_dropout": 0.5})
    two = make(
        seed=2,
        data=data,
        training={"snr_dropout": 0.5, "learning_rate": 1e-4, "batch_size": 9},
        loss={"position": 0.3},
    )
    first, second = epoch(one), epoch(two, batch_size=9)
    assert torch.equal(first.scenes.y, second.scenes.y)
    hidden = first.snr_db.isnan()
    assert torch.equal(hidden, second.snr_db.isnan())
    assert 8 < int(hidden.sum()) < 32
    assert not torch.equal(hidden, epoch(one, 1).snr_db.isnan())
    assert torch.equal(first.snr_db[~hidden], first.scenes.snr_db[~hidden])
    assert not open_source(one, CPU).validation().snr_db.isnan().any()
    other = make(data=data | {"seed": 5}, training={"snr_dropout": 0.5})
    assert not torch.equal(hidden, epoch(other).snr_db.isnan())


def test_trials_that_differ_in_anything_else_share_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    data = {"cache": tmp_path}
    epoch(tiny_candidate_config(seed=1, data=data))
    open_source(tiny_candidate_config(seed=1, data=data), CPU).validation()
    kept, searched = files(tmp_path / "candidates"), len(counted.scenes)
    assert len(kept) == 2
    other = tiny_candidate_config(
        seed=7,
        data=data,
        network={"width": 32, "depth": 2, "dropout": 0.2},
        loss={"existence": 0.5},
        blend={"beta": 0.1},
        training={"batch_size": 5, "learning_rate": 1e-4},
        decision={"goal": "gospa"},
    )
    epoch(other, batch_size=5)
    open_source(other, CPU).validation()
    assert files(tmp_path / "candidates") == kept
    assert len(counted.scenes) == searched


def test_batches_pick_and_join_their_candidates(tmp_path: Path) -> None:
    batch = epoch(tiny_candidate_config(data={"cache": tmp_path, "train_scenes": 6}))
    assert batch.candidates is not None
    order = torch.tensor([4, 1])
    some = batch[order]
    assert some.candidates is not None
    assert equal(some.candidates, batch.candidates[order])
    assert torch.equal(some.snr_db[~some.snr_db.isnan()], batch.snr_db[order][~some.snr_db.isnan()])
    both = Batch.concatenate([batch[slice(0, 2)], batch[slice(2, 6)]])
    assert both.candidates is not None
    assert equal(both.candidates, batch.candidates)
    bare = Batch.concatenate([replace(batch, candidates=None)] * 2)
    assert bare.candidates is None
    assert len(bare) == 12


def test_shards_find_candidates_once_and_hand_them_to_shuffled_scenes(tmp_path: Path) -> None:
    from model.recording import write_shards

    scene = CONFIG.scene.model_copy(update={"wavefront": "paraxial"})
    for split, n, seed in (("train", 9, 1), ("val", 4, 2)):
        S = simulate(n, scene, ARRAY, generator=torch.Generator().manual_seed(seed))
        write_shards(tmp_path / "shards", split, S, ARRAY, "paraxial")
    config = tiny_candidate_config(
        scene={"wavefront": "paraxial"},
        data={"shards": tmp_path / "shards", "cache": tmp_path / "cache"},
        training={"snr_dropout": 0.5},
    )
    source = open_source(config, CPU)
    front_end = CandidateSearch.of(config, keep=False)
    assert front_end is not None
    hidden: list[dict[bytes, bool]] = []
    for number, seed in ((0, 1), (1, 2)):
        batch = Batch.concatenate(list(source.train_batches(number, 4, seed)))
        assert batch.candidates is not None
        expected = call(front_end, batch.scenes, batch.snr_db)
        for name, value in batch.candidates.tensors().items():
            torch.testing.assert_close(value, expected.tensors()[name], rtol=1e-2, atol=1e-2)
        keys = [row.numpy().tobytes() for row in batch.scenes.y]
        hidden.append(dict(zip(keys, batch.snr_db.isnan().tolist(), strict=True)))
    assert hidden[0] == hidden[1], "a scene's level is hidden or not, in every epoch alike"
    assert 0 < sum(hidden[0].values()) < 9
    assert list(hidden[0]) != list(hidden[1]), "in another order"
    assert len(files(tmp_path / "cache" / "candidates")) == 2
