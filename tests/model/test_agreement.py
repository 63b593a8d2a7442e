"""What was measured agrees with the sources that are named, or the likely mistake is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model import write_shards
from model.agreement import check_agreement
from model.shards import DataError, ShardSplit
from physics import PlanarArray, SceneConfig, Scenes, simulate
from physics.scene import SourceMode

ARRAY = PlanarArray(8, 8)
SCENE = SceneConfig(n_antennas=8, n_snapshots=8, max_sources=3, snr_db=(0.0, 20.0))


def split_of(
    folder: Path,
    mistake: Callable[[Scenes], Scenes] = lambda scenes: scenes,
    scene: SceneConfig = SCENE,
    wavefront: Any = "spherical",
) -> ShardSplit:
    generator = torch.Generator().manual_seed(5)
    scenes = mistake(simulate(48, scene, ARRAY, generator=generator))
    write_shards(folder, "val", scenes, ARRAY, wavefront, shard_size=20)
    sizes = scene.n_antennas, scene.n_snapshots, scene.max_sources
    return ShardSplit(folder, "val", ARRAY, wavefront, *sizes)


def placed(scenes: Scenes, change: Callable[[torch.Tensor], None]) -> Scenes:
    position = scenes.position.clone()
    change(position)
    return replace(scenes, position=position)


def in_degrees(position: torch.Tensor) -> None:
    position[..., :2] = torch.rad2deg(position[..., :2])


def in_millimetres(position: torch.Tensor) -> None:
    position[..., 2] *= 1000.0


def exchanged(position: torch.Tensor) -> None:
    position[..., :2] = position[..., :2].flip(-1)


@pytest.mark.parametrize("mode", ["fluctuating", "constant"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"element_jitter": 0.015},
        {"phase_error_deg": 20.0},
        {"dropout": 0.1},
        {"snr_db": (-12.0, -3.0)},
        {"min_sources": 3},
        {"range_m": (0.5, 2.0)},
    ],
)
def test_scenes_agree_with_their_sources_whatever_the_hardware(
    tmp_path: Path, mode: SourceMode, changes: dict[str, Any]
) -> None:
    scene = SCENE.model_copy(update={"source_mode": mode, **changes})
    assert check_agreement(split_of(tmp_path, scene=scene), scene) == []


@pytest.mark.parametrize("mode", ["fluctuating", "constant"])
@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        (lambda s: placed(s, in_degrees), "angles read as degrees"),
        (lambda s: placed(s, exchanged), "azimuth and elevation exchanged"),
        (lambda s: replace(s, y=s.y.mT.contiguous()), "the axes of y exchanged"),
        (lambda s: replace(s, y=s.y.conj().resolve_conj()), "conjugated"),
        (lambda s: replace(s, H=s.H.conj().resolve_conj()), "conjugated"),
        (lambda s: replace(s, codes=s.codes.conj().resolve_conj()), "conjugated"),
        (lambda s: replace(s, y=s.y.roll(1, 0)), "check the units"),
    ],
)
def test_a_usual_mistake_is_refused_and_named(
    tmp_path: Path, mistake: Callable[[Scenes], Scenes], named: str, mode: SourceMode
) -> None:
    scene = SCENE.model_copy(update={"source_mode": mode})
    split = split_of(tmp_path, mistake, scene)
    with pytest.raises(DataError, match=f"val: the sources that ptr names .*; .*{named}"):
        check_agreement(split, scene)


@pytest.mark.parametrize(("unit", "per_radian"), [("degrees", 180.0 / math.pi), ("radians", 1.0)])
def test_phases_in_the_place_of_codes_are_told(
    tmp_path: Path, unit: str, per_radian: float
) -> None:
    def mistake(scenes: Scenes) -> Scenes:
        return replace(scenes, codes=(torch.angle(scenes.codes) * per_radian).to(torch.complex64))

    (note,) = check_agreement(split_of(tmp_path, mistake), SCENE)
    assert f"they would with codes that are no phases in {unit}" in note


def test_ranges_in_millimetres_are_told_as_outside(tmp_path: Path) -> None:
    notes = check_agreement(split_of(tmp_path, lambda s: placed(s, in_millimetres)), SCENE)
    assert any("stand outside scene.range_m=[0.5, 10], from 5" in note for note in notes)


def test_symbols_of_the_other_kind_are_named(tmp_path: Path) -> None:
    constant = SCENE.model_copy(update={"source_mode": "constant"})
    split = split_of(tmp_path / "fluctuating")
    with pytest.raises(DataError, match=r"they would with scene\.source_mode=fluctuating"):
        check_agreement(split, constant)
    split = split_of(tmp_path / "constant", scene=constant)
    (note,) = check_agreement(split, SCENE)
    assert "with scene.source_mode=constant more is found" in note


def test_sources_outside_the_field_of_view_are_told(tmp_path: Path) -> None:
    narrow = SCENE.model_copy(update={"range_m": (0.5, 3.0), "azimuth_deg": (-20.0, 20.0)})
    one, two = check_agreement(split_of(tmp_path), narrow)
    assert "stand outside scene.azimuth_deg=[-20, 20], from -" in one
    assert "stand outside scene.range_m=[0.5, 3], from" in two


def test_a_missing_shard_is_told(tmp_path: Path) -> None:
    split_of(tmp_path)
    (tmp_path / "val" / "shard_001.npz").unlink()
    split = ShardSplit(tmp_path, "val", ARRAY, "spherical", 8, 8, 3)
    assert check_agreement(split, SCENE) == ["val: there is no shard_001, and later ones are"]


def test_dead_recordings_are_refused(tmp_path: Path) -> None:
    split = split_of(tmp_path, lambda s: replace(s, y=s.y * (torch.arange(48) > 3)[:, None, None]))
    with pytest.raises(DataError, match=r"y is zero in [1-4] of \d+ scenes with sources"):
        check_agreement(split, SCENE)


@pytest.mark.parametrize(
    "changes", [{"snr_db": (-25.0, -20.0)}, {"min_sources": 0, "max_sources": 0}]
)
def test_where_noise_hides_all_and_where_nothing_is_named_nothing_is_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    if "max_sources" in changes:
        split = split_of(
            tmp_path,
            lambda s: replace(
                s, n_sources=torch.zeros_like(s.n_sources), power=torch.zeros_like(s.power)
            ),
        )
        assert check_agreement(split, SCENE) == []
        return
    scene = SCENE.model_copy(update=changes)
    split = split_of(tmp_path, lambda s: replace(s, y=s.y.roll(1, 0)), scene)
    assert check_agreement(split, scene) == []


def test_where_no_snr_is_known_a_mistake_is_found_too(tmp_path: Path) -> None:
    hidden = torch.full((48,), math.nan)
    good = split_of(tmp_path / "good", lambda s: replace(s, snr_db=hidden))
    assert check_agreement(good, SCENE) == []
    bad = split_of(tmp_path / "bad", lambda s: replace(placed(s, in_degrees), snr_db=hidden))
    with pytest.raises(DataError, match="angles read as degrees"):
        check_agreement(bad, SCENE)
