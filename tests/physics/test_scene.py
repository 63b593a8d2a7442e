"""Scenes that come from elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from physics import PlanarArray, SceneConfig, simulate

ARRAY = PlanarArray(4, 3)
CONFIG = SceneConfig(n_antennas=3, n_snapshots=4, min_sources=0, max_sources=3)


@pytest.mark.parametrize("padding", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("wavefront", ["spherical", "fresnel", "paraxial", "planar"])
def test_padding_of_slots_without_a_source_does_not_reach_the_covariance(
    wavefront: str, padding: float
) -> None:
    drawn = simulate(32, CONFIG, ARRAY, generator=torch.Generator().manual_seed(0))
    present = drawn.present.unsqueeze(-1)
    padded = replace(drawn, position=torch.where(present, drawn.position, padding))
    assert torch.isfinite(padded.position).all()
    assert torch.equal(padded.position * present, drawn.position * present)
    one, two = (s.covariance(ARRAY, wavefront).dense() for s in (padded, drawn))
    assert torch.equal(one, two)
    index = torch.tensor([3, 1])
    assert torch.equal(padded[index].position, padded.position[index])


def test_a_source_keeps_its_position_whatever_it_is() -> None:
    """What is wrong with a source itself is not mended in silence."""
    drawn = simulate(4, CONFIG, ARRAY, generator=torch.Generator().manual_seed(0))
    lost = replace(drawn, position=torch.full_like(drawn.position, torch.nan))
    assert torch.equal(torch.isnan(lost.position).all(-1), lost.present)
