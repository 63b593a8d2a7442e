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
from model.agreement import check_agreement, gaps
from model.shards import DataError, ShardSplit
from physics import PlanarArray, SceneConfig, Scenes, simulate, steering_vector
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


@pytest.mark.parametrize("mode", ["fluctuating", "constant"])
@pytest.mark.parametrize(
    "case",
    ["one place", "five places", "a trajectory", "a strong path", "a narrow field", "one snapshot"],
)
def test_scenes_that_are_like_each_other_are_not_refused(
    tmp_path: Path, mode: SourceMode, case: str
) -> None:
    changes: dict[str, Any] = {"source_mode": mode, "snr_db": (0.0, 0.0)}
    changes |= {
        "a strong path": {"k_factor_db": 20.0, "snr_db": (-5.0, 20.0)},
        "a narrow field": {"azimuth_deg": (-2.0, 2.0), "elevation_deg": (-2.0, 2.0)},
        "one snapshot": {"n_snapshots": 1},
    }.get(case, {})
    scene = SCENE.model_copy(update=changes)
    full = scene.model_copy(update={"min_sources": 3})
    drawn = simulate(48, full, ARRAY, generator=torch.Generator().manual_seed(1))
    place = drawn.position
    if case == "one place":
        place = place[:1].expand_as(place)
    elif case == "five places":
        place = place[torch.arange(48) % 5]
    elif case == "a trajectory":
        along = torch.linspace(0, 1, 48)[:, None, None]
        place = place[:1] + along * (place[1:2] - place[:1])
    counts = torch.full_like(drawn.n_sources, 2)
    scenes = resimulated(scene, place, counts, seed=2)
    write_shards(tmp_path, "val", scenes, ARRAY, "spherical")
    sizes = scene.n_antennas, scene.n_snapshots, scene.max_sources
    assert check_agreement(ShardSplit(tmp_path, "val", ARRAY, "spherical", *sizes), scene) == []


def resimulated(scene: SceneConfig, place: torch.Tensor, counts: torch.Tensor, seed: int) -> Scenes:
    """Scenes of given sources."""
    other = simulate(len(place), scene, ARRAY, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    present = torch.arange(place.shape[1]) < counts.unsqueeze(-1)
    n_symbols = scene.n_snapshots if scene.source_mode == "fluctuating" else 1
    symbols = torch.randn(
        len(place), n_symbols, place.shape[1], dtype=torch.complex64, generator=generator
    ) * present.unsqueeze(1)
    x = symbols @ steering_vector(place, ARRAY, "spherical")
    y = (other.codes * x) @ other.H.mT
    noise = torch.randn(y.shape, dtype=torch.complex64, generator=generator)
    level = y.abs().square().mean((1, 2)) * 10 ** (-other.snr_db / 10)
    return replace(
        other,
        y=y + noise * level.sqrt()[:, None, None],
        position=place.contiguous(),
        n_sources=counts,
        power=symbols.abs().square().mean(1) + 1e-3 * present,
    )


@pytest.mark.parametrize("level", [-5.0, -8.0, -10.0, -12.0])
def test_noise_that_nobody_names_refuses_nothing(tmp_path: Path, level: float) -> None:
    scene = SCENE.model_copy(update={"snr_db": (level, level)})
    hidden = torch.full((48,), math.nan)
    split = split_of(tmp_path, lambda s: replace(s, snr_db=hidden), scene)
    assert check_agreement(split, scene) == []


def test_a_missing_shard_is_told(tmp_path: Path) -> None:
    split_of(tmp_path)
    (tmp_path / "val" / "shard_000.npz").unlink()
    split = ShardSplit(tmp_path, "val", ARRAY, "spherical", 8, 8, 3)
    assert list(gaps(split)) == [], "numbers may begin anywhere"
    (tmp_path / "val" / "shard_001.npz").rename(tmp_path / "val" / "shard_007.npz")
    (tmp_path / "val" / "shard_002.npz").rename(tmp_path / "val" / "shard_009.npz")
    split = ShardSplit(tmp_path, "val", ARRAY, "spherical", 8, 8, 3)
    assert list(gaps(split)) == ["there is no shard_008 between the others"]


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
