from __future__ import annotations

from typing import Any

import pytest

from model.plausible import array_notes
from physics import ArrayConfig, SceneConfig
from tests.tuner.support import ROOT
from tuner.config import load_study


@pytest.mark.parametrize("name", ["quickstart", "full", "shipped", "origin-shards"])
def test_nothing_is_said_of_the_studies_that_are_shipped(name: str) -> None:
    study = load_study(ROOT / "configs" / f"{name}.yaml")
    assert array_notes(study.array.build(), study.scene) == []


@pytest.mark.parametrize(
    ("array", "scene", "said"),
    [
        ({"spacing": 0.3}, {}, ["elements 1 wavelengths apart repeat themselves within scene.az"]),
        ({"wavelength": 0.0857}, {}, ["elements 1.75 wavelengths apart", "elements 1.75"]),
        ({"wavelength": 3.5e9}, {}, ["it tells no directions apart", "waves are plane"]),
        ({}, {"range_m": (500.0, 6000.0)}, ["hardly any range can be told"]),
        ({"spacing": 0.3}, {"azimuth_deg": (-20.0, 20.0), "elevation_deg": (-20.0, 20.0)}, []),
        ({"n_vertical": 1, "spacing": 0.17}, {}, []),
        ({}, {"range_m": (500.0, 6000.0), "wavefront": "planar"}, []),
    ],
)
def test_units_that_cannot_be_are_said(
    array: dict[str, Any], scene: dict[str, Any], said: list[str]
) -> None:
    notes = array_notes(ArrayConfig(**array).build(), SceneConfig(**scene))
    assert len(notes) == len(said), notes
    assert all(part in note for part, note in zip(said, notes, strict=True)), notes
