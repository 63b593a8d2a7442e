from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import Localizer
from model.data import simulate_split
from model.shipped import shipped
from physics.scene import Scenes
from physics.steering import steering_vector
from tests.tuner.pages.support import material, record
from tests.tuner.pages.test_chart import content
from tuner.config import load_study
from tuner.folder import RunFolder
from tuner.pages.scenes import scenes as section
from tuner.scenes import DEPTH_DB, drawn_scenes, ensure_scenes


@pytest.fixture(scope="module")
def localizer() -> Localizer:
    return Localizer.shipped()


@pytest.fixture(scope="module")
def drawn(localizer: Localizer) -> dict[str, Any]:
    return drawn_scenes(localizer)


@pytest.fixture(scope="module")
def held_out(localizer: Localizer) -> Scenes:
    config = localizer.config
    return next(simulate_split(config.data, config.scene, localizer.array, "test", 64))


def test_the_first_held_out_scene_of_each_number_of_sources_is_drawn(
    drawn: dict[str, Any], held_out: Scenes
) -> None:
    counts = held_out.n_sources.tolist()
    wanted = [counts.index(k) for k in sorted(set(counts))]
    assert [view["scene"] for view in drawn["views"]] == wanted[:6]
    for view in drawn["views"]:
        item = view["scene"]
        true = [s["true"] for s in view["sources"] if s["true"] is not None]
        truth = held_out.position[item, : counts[item]].double()
        truth[:, :2].rad2deg_()
        assert np.allclose(true, truth.numpy(), atol=1e-3)
        assert view["snr_db"] == pytest.approx(float(held_out.snr_db[item]), abs=0.051)


def test_what_was_found_is_what_the_localizer_finds_each_once(
    drawn: dict[str, Any], held_out: Scenes, localizer: Localizer
) -> None:
    for view in drawn["views"]:
        scene = held_out[torch.tensor([view["scene"]])]
        found = localizer.locate(scene.y, scene.H, scene.codes, scene.known_snr_db)[0]
        wanted = sorted((s.azimuth_deg, s.elevation_deg, s.range_m) for s in found)  # type: ignore[union-attr]
        shown = sorted(tuple(s["found"]) for s in view["sources"] if s["found"] is not None)
        assert np.allclose(shown, wanted, atol=2e-2)
        for source in view["sources"]:
            if source["true"] and source["found"]:
                off = np.abs(np.subtract(source["true"], source["found"]))
                assert (off <= (5.0, 5.0, 1.0)).all()


def test_the_spectra_are_mvdr_of_the_blended_covariance(
    drawn: dict[str, Any], held_out: Scenes, localizer: Localizer
) -> None:
    view = drawn["views"][3]
    scene = held_out[torch.tensor([view["scene"]])]
    _, _, blended = localizer.detect(scene.y, scene.H, scene.codes, scene.known_snr_db)
    R = blended.dense()[0].numpy().astype(np.complex128)
    R *= len(R) / np.trace(R).real
    inverse = np.linalg.inv(R + 1e-2 * np.eye(len(R)))

    def power(azimuth: float, elevation: float, distance: float) -> float:
        at = torch.tensor([math.radians(azimuth), math.radians(elevation), distance])
        a = steering_vector(at.double(), localizer.array).numpy()
        return float(1.0 / (a.conj() @ inverse @ a).real)

    ranges = [s["found"][2] for s in view["sources"] if s["found"]]
    assert max(ranges) > 1.5 * min(ranges), "needs a scene with sources near and far"
    chosen = [(e, a) for e in range(0, 37, 4) for a in range(0, 73, 6)]
    for azimuth, elevation, _ in (s["found"] for s in view["sources"] if s["found"]):
        at_azimuth = int(np.abs(np.subtract(drawn["azimuth_deg"], azimuth)).argmin())
        at_elevation = int(np.abs(np.subtract(drawn["elevation_deg"], elevation)).argmin())
        chosen.append((at_elevation, at_azimuth))
    wanted = [
        max(power(drawn["azimuth_deg"][a], drawn["elevation_deg"][e], r) for r in ranges)
        for e, a in chosen
    ]
    shown = [-drawn["db_per_step"] * view["spectrum"][e][a] for e, a in chosen]
    level = 10 * np.log10(wanted)
    # One common peak, half a step of rounding, and angles that are written with two decimals.
    offset = np.median(level - shown)
    near = level - offset > -DEPTH_DB + 1
    assert np.abs(level - shown - offset)[near].max() < 0.5
    first = view["sources"][0]
    azimuth, elevation, _ = first["true"]
    along = [10 * math.log10(power(azimuth, elevation, r)) for r in drawn["range_m"]]
    seen = [-drawn["db_per_step"] * value for value in view["along_range"][0]]
    assert np.abs(np.subtract(along, seen) - offset).max() < 0.5


@pytest.mark.slow
def test_a_drawing_is_kept_until_the_network_changes(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert not ensure_scenes(folder, load_study(None)), "no network, nothing to draw"
    shutil.copytree(shipped()["fluctuating"], folder.best)
    assert ensure_scenes(folder, load_study(None))
    first = folder.scenes.read_text()
    folder.scenes.write_text(first + " ")
    assert ensure_scenes(folder, load_study(None))
    assert folder.scenes.read_text() == first + " ", "drawn again without need"
    decision = folder.best / "decision.json"
    decision.write_text(json.dumps(json.loads(decision.read_text()) | {"threshold": 0.99}))
    assert ensure_scenes(folder, load_study(None))
    assert json.loads(folder.scenes.read_text())["network"] != json.loads(first)["network"]
    folder.scenes.write_text("{")
    assert ensure_scenes(folder, load_study(None))
    json.loads(folder.scenes.read_text())


def test_the_section_tells_hits_misses_and_false_alarms(
    tmp_path: Path, drawn: dict[str, Any]
) -> None:
    sources = [
        {"true": [0.0, 0.0, 1.0], "found": [0.1, 0.0, 1.1], "range_std_m": 0.1},
        {"true": [9.0, 0.0, 2.0], "found": None, "range_std_m": None},
        {"true": None, "found": [-9.0, 0.0, 3.0], "range_std_m": None},
    ]
    view = drawn["views"][0]
    changed = view | {"sources": sources, "along_range": [view["along_range"][0]] * 3}
    text = section(material(tmp_path, record(0), scenes=drawn | {"views": [changed]}))
    assert "2 sources, 2 found, 1 hit" in text
    strip = content(text[text.rindex("<figure>") :])
    assert strip["data"][0]["y"] == ["1 hit", "2 missed", "3 false"]
    assert strip["data"][1]["x"] == [1.0, 2.0]
    assert strip["data"][2]["error_x"]["array"] == pytest.approx([0.1645, 0.0])
