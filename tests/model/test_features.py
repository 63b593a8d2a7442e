"""What networks see of a measurement that holds NaN or Inf, and of its SNR."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from model import Trainer, TrialConfig
from model.data import FrontEnds
from physics import simulate
from tests.tiny import TINY_CANDIDATE, tiny_config

NETWORKS: dict[str, dict[str, Any]] = {
    "snapshot": {},
    "image": {"family": "image", "width": 16, "depth": 1, "rank": 3},
    "candidate": TINY_CANDIDATE,
}


def trial(family: str) -> TrialConfig:
    config = tiny_config(scene={"n_antennas": 6, "n_snapshots": 6})
    sections = config.model_dump()
    if family != "snapshot":
        sections["network"] = NETWORKS[family]
    sections["data"] |= {"keep_images": False, "train_scenes": 16}
    return TrialConfig.model_validate(sections)


@pytest.mark.parametrize("family", NETWORKS)
@pytest.mark.parametrize("key", ["y", "H", "codes"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_of_one_scene_count_as_zeros_and_leave_the_others_alone(
    family: str, key: str, bad: float
) -> None:
    config = trial(family)
    trainer = Trainer(config)
    scenes = simulate(6, config.scene, trainer.array, generator=torch.Generator().manual_seed(0))
    value = getattr(scenes, key).clone()
    value[2, 1, 3] = bad
    broken = replace(scenes, **{key: value})
    front = FrontEnds(config)
    front.hidden = 0.0
    whole, hurt = (trainer._features(front.examine(s, "val", 0, 0)) for s in (scenes, broken))
    assert hurt.fell_back.tolist() == [scene == 2 for scene in range(6)]
    trainer.network.eval()
    with torch.no_grad():
        sound, said = trainer.network(whole), trainer.network(hurt)
    others = torch.arange(6) != 2
    for name in ("factor", "existence", "log_pointer", "position"):
        assert torch.isfinite(torch.view_as_real(said.factor)).all()
        torch.testing.assert_close(getattr(said, name)[others], getattr(sound, name)[others])


@pytest.mark.parametrize("family", NETWORKS)
def test_a_batch_with_a_bad_scene_is_trained_on(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        scenes = simulate(*arguments, **options)
        y = scenes.y.clone()
        y[3, 0, 0] = math.nan
        return replace(scenes, y=y)

    monkeypatch.setattr("model.plugin.simulate", broken)
    metrics = Trainer(trial(family)).run_epoch()
    assert metrics["skipped_steps"] == 0
    assert metrics["solver_fallbacks"] == 1


@pytest.mark.parametrize("family", NETWORKS)
def test_an_snr_beyond_all_use_says_no_more_than_a_high_or_low_one(family: str) -> None:
    config = trial(family)
    trainer = Trainer(config)
    trainer.network.eval()
    scenes = simulate(4, config.scene, trainer.array, generator=torch.Generator().manual_seed(0))
    front = FrontEnds(config)
    front.hidden = 0.0
    features = trainer._features(front.examine(scenes, "val", 0, 0))

    def said(level: float) -> torch.Tensor:
        with torch.no_grad():
            level_of = torch.full_like(features.snr_db, level)
            return trainer.network(replace(features, snr_db=level_of)).existence

    assert torch.equal(said(50.0), said(300.0))
    assert torch.equal(said(-30.0), said(-300.0))
    assert not torch.equal(said(50.0), said(20.0))
