"""Scenes are written as shards whole and in single precision, or not at all."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from model.recording import write_shards
from physics import Scenes, simulate
from tests.tiny import tiny_config

CONFIG = tiny_config()
ARRAY = CONFIG.array.build()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"codes": "real"}, "got codes of torch.float32; expected complex values"),
        ({"H": "transposed"}, r"got H of shape \(8, 36, 4\); expected \(8, 4, 36\)"),
        ({"y": "flat"}, r"got y of shape \(8, 16\) and position"),
        ({"position": "last slots"}, "a source whose range is not above 0 m in"),
        ({"power": "in dB"}, "a power below 0"),
        ({"n_sources": "too many"}, "n_sources outside 0..2"),
        ({"y": "NaN"}, "y with NaN or Inf in 1 of 8 scenes, first in scene 2"),
    ],
)
def test_scenes_that_cannot_be_are_refused_before_a_file_is_written(
    tmp_path: Path, change: dict[str, str], said: str
) -> None:
    scenes = simulate(8, CONFIG.scene, ARRAY, generator=torch.Generator().manual_seed(1))
    ((name, how),) = change.items()
    value = getattr(scenes, name)
    made = {
        "real": lambda: value.real,
        "transposed": lambda: value.mT,
        "flat": lambda: value.flatten(1),
        "last slots": lambda: torch.where(scenes.present.unsqueeze(-1), 0.0, 1.0).expand_as(value),
        "in dB": lambda: value - 30.0,
        "too many": lambda: value + 3,
        "NaN": lambda: value.index_fill(0, torch.tensor([2]), math.nan),
    }[how]()
    with pytest.raises(ValueError, match=said):
        write_shards(tmp_path, "train", replace(scenes, **{name: made}), ARRAY, "spherical")
    assert not (tmp_path / "train").exists()


def test_numpy_arrays_are_written_as_tensors_are(tmp_path: Path) -> None:
    scenes = simulate(8, CONFIG.scene, ARRAY, generator=torch.Generator().manual_seed(1))
    arrays = Scenes(*(getattr(scenes, f.name).numpy() for f in fields(scenes)))
    paths = [
        write_shards(tmp_path / name, "train", given, ARRAY, "spherical")[0]
        for name, given in (("tensors", scenes), ("arrays", arrays))
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_arrays_of_any_precision_are_written_in_single(tmp_path: Path) -> None:
    scenes = simulate(8, CONFIG.scene, ARRAY, generator=torch.Generator().manual_seed(1))
    mixed = replace(
        scenes,
        codes=scenes.codes.to(torch.complex128),
        position=scenes.position.double(),
        n_sources=scenes.n_sources.to(torch.uint8),
    )
    one, two = (
        write_shards(tmp_path / name, "val", given, ARRAY, "spherical")[0].read_bytes()
        for name, given in (("single", scenes), ("mixed", mixed))
    )
    assert one == two
    with pytest.raises(ValueError, match="y with NaN or Inf in 8 of 8"):
        write_shards(tmp_path, "val", replace(scenes, y=scenes.y * 1e37), ARRAY, "spherical")
    assert not (tmp_path / "val").exists()
