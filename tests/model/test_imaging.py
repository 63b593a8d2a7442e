"""Spectra that are computed once: right, kept, shared, mapped, never those of something else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import model.data as data_module
import model.front_end as front_end_module
from model import TrialConfig
from model.data import Batch, open_source
from model.features import compute_features, compute_spectra
from model.front_end import Chunks, Images
from model.network import build_network
from model.recording import write_shards
from model.training import Trainer
from physics import simulate
from tests.model.support import files, run
from tests.tiny import tiny_candidate_config, tiny_config

CPU = torch.device("cpu")
IMAGE: dict[str, Any] = {
    "family": "image",
    "width": 8,
    "depth": 1,
    "azimuth_cells": 6,
    "elevation_cells": 4,
    "range_cells": 2,
    "range_bins": 4,
    "rank": 3,
}


def image_config(cache: Path, **sections: dict[str, Any]) -> TrialConfig:
    values = {name: dict(value) for name, value in sections.items()}
    values["data"] = {"cache": cache, "fresh": False} | values.get("data", {})
    network = IMAGE | values.pop("network", {})
    base = tiny_config(**values).model_dump()
    return TrialConfig.model_validate(base | {"network": network})


def dictionary_of(config: TrialConfig) -> Tensor:
    return build_network(config.network, config.scene, config.array.build()).dictionary


def epoch(config: TrialConfig, number: int = 0, batch_size: int = 10) -> list[Batch]:
    source = open_source(config, CPU, dictionary_of(config))
    return list(source.train_batches(number, batch_size, config.seed))


def check(config: TrialConfig, batch: Batch) -> None:
    """A batch holds what the features of its own scenes would."""
    S = batch.scenes
    assert batch.images is not None
    expected = compute_features(
        S.y, S.H, S.codes, batch.snr_db, dictionary=dictionary_of(config),
        tikhonov=config.tikhonov, spectra=config.network.spectra,
    )  # fmt: skip
    # Logarithms; chunks and batches are sums in another order.
    torch.testing.assert_close(batch.images.spectrum, expected.spectrum, rtol=1e-4, atol=1e-4)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Scenes of every computation of spectra that are kept."""
    n_scenes: list[int] = []

    def counting(y: Tensor, *rest: Any) -> Tensor:
        n_scenes.append(len(y))
        return compute_spectra(y, *rest)

    monkeypatch.setattr(front_end_module, "compute_spectra", counting)
    return n_scenes


@pytest.mark.parametrize("family", ["image", "snapshot"])
def test_every_batch_holds_the_spectra_of_its_own_scenes(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "CHUNK", 8)
    config = image_config(tmp_path, data={"train_scenes": 21, "val_scenes": 11})
    if family == "snapshot":
        config = tiny_config(
            data={"cache": tmp_path, "fresh": False, "train_scenes": 21, "val_scenes": 11}
        )
    source = open_source(config, CPU, dictionary_of(config))
    batches = list(source.train_batches(1, 10, 3))
    assert [len(batch) for batch in batches] == [10, 10, 1]
    for batch in [*batches, source.validation()]:
        check(config, batch)
    assert len(files(tmp_path / "images")) == 3 + 2, "a file a chunk"


def test_trials_that_differ_in_anything_else_share_what_is_kept(
    tmp_path: Path, counted: list[int]
) -> None:
    first = run(Trainer(image_config(tmp_path)), 2)
    assert sorted(counted) == [24, 48]
    kept = files(tmp_path / "images")
    other = image_config(
        tmp_path,
        network={"width": 16, "depth": 2, "range_bins": 6},
        loss={"existence": 0.5},
        blend={"beta": 0.1},
        training={"batch_size": 5, "learning_rate": 1e-4, "snr_dropout": 0.5},
        decision={"goal": "gospa"},
    )
    run(Trainer(other), 1)
    assert files(tmp_path / "images") == kept
    assert sorted(counted) == [24, 48], "nothing is computed again"
    assert run(Trainer(image_config(tmp_path)), 2) == first, "what is read is what was computed"


@pytest.mark.parametrize(
    "change",
    [
        {"tikhonov": {"regularization": 2e-3}},
        {"network": {"azimuth_cells": 7}},
        {"network": {"range_cells": 3}},
        {"scene": {"wavefront": "fresnel"}},
        {"data": {"seed": 4}},
    ],
    ids=str,
)
def test_another_setting_never_meets_the_file_of_this_one(
    change: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    epoch(image_config(tmp_path))
    config = image_config(tmp_path, **change)
    for batch in epoch(config):
        check(config, batch)
    assert len(files(tmp_path / "images")) == 2


def test_fresh_scenes_are_not_kept_but_the_validation_is(tmp_path: Path) -> None:
    config = image_config(tmp_path, data={"fresh": True})
    source = open_source(config, CPU, dictionary_of(config))
    assert all(batch.images is None for batch in source.train_batches(0, 10, 0))
    assert not (tmp_path / "images").exists()
    check(config, source.validation())
    assert len(files(tmp_path / "images")) == 1


def test_nothing_is_kept_where_it_is_not_wanted(tmp_path: Path) -> None:
    kept = run(Trainer(image_config(tmp_path / "some")), 2)
    config = image_config(tmp_path / "none", data={"keep_images": False})
    assert all(batch.images is None for batch in epoch(config))
    for one, two in zip(run(Trainer(config), 2), kept, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
        assert one["nmse_pred"] == pytest.approx(two["nmse_pred"], rel=1e-3)
    assert not (tmp_path / "none").exists()
    candidate = tiny_candidate_config(data={"cache": tmp_path / "judged", "fresh": False})
    assert all(batch.images is None for batch in epoch(candidate))
    assert [path.name for path in files(tmp_path / "judged")] == ["candidates"]


def test_a_full_cache_costs_the_time_and_not_the_trial(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = run(Trainer(image_config(tmp_path / "kept")), 2)
    (tmp_path / "file").touch()
    trainer = Trainer(image_config(tmp_path / "file"))
    assert trainer.source.validation().images is None, "nor is it held in memory"
    for one, two in zip(run(trainer, 2), kept, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
    assert caplog.text.count("images are not kept in") == 1, "said once"


def test_a_cache_that_fills_up_midway_leaves_no_half_of_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "CHUNK", 8)
    saved: list[Path] = []

    def save(tensors: dict[str, Tensor], path: Path) -> None:
        saved.append(path)
        if len(saved) > 2:
            raise OSError("no space left")
        front_end_module_save(tensors, path)

    front_end_module_save = front_end_module.save_file
    monkeypatch.setattr(front_end_module, "save_file", save)
    config = image_config(tmp_path, data={"train_scenes": 21, "val_scenes": 24})
    source = open_source(config, CPU, dictionary_of(config))
    assert [len(batch) for batch in source.train_batches(0, 10, 0)] == [10, 10, 1]
    assert all(batch.images is None for batch in source.train_batches(0, 10, 0))
    assert source.validation().images is None
    assert len(source.validation()) == 24
    assert len(saved) == 3


def test_a_training_goes_on_as_it_would_have_where_the_cache_is_gone(tmp_path: Path) -> None:
    whole = run(Trainer(image_config(tmp_path / "cache")), 2)
    half = Trainer(image_config(tmp_path / "cache"))
    run(half, 1)
    half.save(tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "cache")
    again = Trainer(image_config(tmp_path / "cache"))
    again.load(tmp_path / "checkpoint")
    assert run(again, 1) == whole[1:]


def test_shards_compute_spectra_once_and_hand_them_to_shuffled_scenes(
    tmp_path: Path, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "CHUNK", 4)
    data = {"shards": tmp_path / "shards", "val_scenes": 3}
    config = image_config(tmp_path / "cache", scene={"wavefront": "paraxial"}, data=data)
    array = config.array.build()
    for split, n, seed in (("train", 9, 1), ("val", 4, 2)):
        S = simulate(n, config.scene, array, generator=torch.Generator().manual_seed(seed))
        write_shards(tmp_path / "shards", split, S, array, "paraxial")
    source = open_source(config, CPU, dictionary_of(config))
    assert counted == [3, 4, 4, 1]
    for number in range(2):
        batches = list(source.train_batches(number, 4, 0))
        assert [len(batch) for batch in batches] == [4, 4, 1]
        for batch in [*batches, source.validation()]:
            check(config, batch)
    assert len(counted) == 4


def test_chunks_give_rows_in_the_order_asked_for() -> None:
    rows = torch.arange(11.0)
    chunks = Chunks([Images(part) for part in rows.split(4)], 4)
    for index in ([0], [10], [9, 0, 5, 10, 4, 3], [7, 7, 2, 7], [10, 10], list(range(11))):
        assert torch.equal(chunks[torch.tensor(index)].spectrum, rows[index])


def test_who_reads_what_is_kept_maps_its_files(tmp_path: Path) -> None:
    """Trials of a machine share the pages of one file."""
    config = image_config(tmp_path)
    source = open_source(config, CPU, dictionary_of(config))
    next(source.train_batches(0, 10, 0))
    (path,) = files(tmp_path / "images")
    assert str(path) not in Path("/proc/self/maps").read_text()
    source = open_source(config, CPU, dictionary_of(config))
    next(source.train_batches(0, 10, 0))
    assert str(path) in Path("/proc/self/maps").read_text()
    path.unlink()
    for batch in source.train_batches(0, 10, 0):
        check(config, batch)
