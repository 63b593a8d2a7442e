"""Networks that come with the package: whole, small, described, and better than NOMP."""

from __future__ import annotations

import pytest
import torch

from model import Localizer
from model.checkpoint import CheckpointError
from model.config import TrialConfig
from model.shipped import shipped, shipped_for
from physics import nomp, simulate
from physics.bootstrap import f1_interval
from physics.metrics import match
from tuner.suites import SUITES

NAMES = sorted(shipped())


def test_the_default_network_is_there() -> None:
    assert "fluctuating" in NAMES
    assert Localizer.shipped().config == Localizer.shipped("fluctuating").config
    with pytest.raises(
        CheckpointError, match=r"no shipped network 'other'; there are constant, fluctuating"
    ):
        Localizer.shipped("other")


@pytest.mark.parametrize("name", NAMES)
def test_each_loads_and_its_card_counts_its_weights_and_scenes(name: str) -> None:
    localizer = Localizer.shipped(name)
    card = (shipped()[name] / "CARD.md").read_text(encoding="utf-8")
    n_weights = sum(weight.numel() for weight in localizer.network.parameters())
    assert f"{n_weights:,} weights" in card
    assert f"{localizer.config.data.train_scenes:,} simulated scenes" in card
    scenes = simulate(2, localizer.config.scene, generator=torch.Generator().manual_seed(3))
    assert len(localizer.locate(scenes.y, scenes.H, scenes.codes)) == 2


@pytest.mark.parametrize("name", NAMES)
def test_each_is_small_and_says_what_it_was_made_of_and_is_worth(name: str) -> None:
    folder = shipped()[name]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5e6
    card = (folder / "CARD.md").read_text(encoding="utf-8")
    for heading in ("## Data", "## Training", "## Scores", "## Limits"):
        assert heading in card, heading
    assert (folder / "decision.json").exists()


def test_scenes_of_other_conventions_have_none() -> None:
    folder = shipped()["fluctuating"]
    config = TrialConfig()
    assert shipped_for(config) == folder
    for changes in (
        {"array": {"n_horizontal": 10}},
        {"scene": {"n_antennas": 8}},
        {"scene": {"wavefront": "paraxial"}},
        {"scene": {"n_snapshots": 8}},
    ):
        assert shipped_for(TrialConfig.model_validate(changes)) is None
    noisy = TrialConfig.model_validate({"scene": {"dropout": 0.1, "snr_db": (0.0, 5.0)}})
    assert shipped_for(noisy) == folder
    constant = TrialConfig.model_validate({"scene": {"source_mode": "constant"}})
    assert shipped_for(constant) == shipped()["constant"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_each_finds_more_than_nomp_where_the_model_is_right_and_where_it_is_wrong(
    name: str,
) -> None:
    localizer = Localizer.shipped(name)
    believed = localizer.config.scene
    for suite in ("ideal", "dropout", "wavefront"):
        scene = SUITES[suite].scene(believed)
        scenes = simulate(192, scene, generator=torch.Generator().manual_seed(5))
        known = scenes.known_snr_db
        sources = scenes.position, scenes.present
        found, _, _ = localizer.detect(scenes.y, scenes.H, scenes.codes, known)
        classical = nomp(scenes.y, scenes.H, scenes.codes, scene=believed, snr_db=known)
        ours, theirs = match(found, *sources), match(classical.detections, *sources)
        # A few hundred scenes tell little of a gain on ideal hardware; 4,000 do (the card).
        gain = ours.f1 - theirs.f1 if suite == "ideal" else f1_interval(ours, theirs)[0]
        assert gain > 0, (suite, ours.f1, theirs.f1)
