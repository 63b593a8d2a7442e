from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from physics import Detections, SceneConfig, Scenes
from physics.fit import normal_equations, position_of, refine
from physics.order import conditional_deviance, marginal_deviance
from physics.pursuit import PursuitConfig, Search
from tests.physics.test_fit import ARRAY, MODES, measured, scenes, steer
from tests.reference import estimation as reference


def searched(S: Scenes, mode: Any, **config: Any) -> Search:
    scene = SceneConfig(source_mode=mode, range_m=(0.6, 3.0), n_antennas=8, n_snapshots=6)
    return Search(ARRAY, scene, PursuitConfig(oversampling=1.0, **config), S.y, S.H, S.codes)


@pytest.mark.parametrize("mode", MODES)
def test_the_pick_is_the_point_of_the_grid_that_explains_most(mode: Any) -> None:
    S = scenes(mode, 3)
    search = searched(S, mode, candidates=10_000)  # more than there are points
    ((_, measurement, _),) = search.chunks(None, None)
    assert len(search.points) > 40
    for residual in (measurement.y, measurement.y.roll(1, -1)):
        picked = search.pick(measurement, residual)
        assert picked.shape == (3, 1, 3)
        for b in range(len(S)):
            y = residual[b].numpy().reshape(S.y[b].shape)
            H, codes = S.H[b].numpy(), S.codes[b].numpy()
            energy = [
                reference.residual_energy(
                    point[None], y, H, codes, steer(), constant=mode == "constant"
                )
                for point in search.points.numpy()
            ]
            np.testing.assert_array_equal(picked[b, 0], search.points[int(np.argmin(energy))])


@pytest.mark.parametrize("mode", MODES)
def test_what_grows_fits_one_source_more_and_starts_where_it_is_told(mode: Any) -> None:
    S = scenes(mode, 3)
    search = searched(S, mode)
    ((_, measurement, _),) = search.chunks(None, None)
    one, matrix = search.grow(measurement, search.points.new_zeros(3, 0, 3), measurement.y)
    assert one.coordinates.shape == (3, 1, 3)
    assert matrix.shape == (3, 3, 3)
    two, matrix = search.grow(measurement, one.coordinates, one.residual)
    assert two.coordinates.shape == (3, 2, 3)
    assert matrix.shape == (3, 6, 6)
    assert bool((two.cost < one.cost).all())
    assert bool((one.cost < measurement.energy).all())
    # Without joint steps the new one is what was refined against the residual alone.
    apart = searched(S, mode, new_iterations=4, joint_iterations=0)
    two, _ = apart.grow(measurement, one.coordinates, one.residual)
    rest = replace(measurement, y=one.residual)
    alone, _ = refine(rest, apart.pick(measurement, one.residual), apart.bounds, 4)
    torch.testing.assert_close(two.coordinates, torch.cat([one.coordinates, alone.coordinates], 1))
    still = searched(S, mode, new_iterations=0, joint_iterations=0)
    start = Detections(S.position[:, :1], torch.tensor([[True], [False], [True]]))
    given, _ = still.grow(measurement, search.points.new_zeros(3, 0, 3), measurement.y, start)
    picked = still.pick(measurement, measurement.y)
    torch.testing.assert_close(given.coordinates[[0, 2]], position_of(S.position[[0, 2], :1]))
    torch.testing.assert_close(given.coordinates[1], picked[1])


def test_noise_follows_the_level_and_the_energy_of_each_scene() -> None:
    S = scenes("constant", 3)
    level = torch.tensor([0.0, 10.0, -math.inf], dtype=torch.float64)
    ((index, measurement, noise),) = searched(S, "constant").chunks(level, None)
    assert index == slice(0, 64)
    y = measurement.y.flatten(1)
    # The largest part of y is 1, whatever it was.
    torch.testing.assert_close(
        torch.view_as_real(y).abs().amax((1, 2)), torch.ones(3, dtype=torch.float64)
    )
    mean = y.abs().square().mean(-1)
    assert noise is not None
    torch.testing.assert_close(noise, mean * torch.tensor([1 / 2, 1 / 11, 1.0]).double())
    ((_, _, unknown),) = searched(S, "constant").chunks(None, None)
    assert unknown is None


def test_deviance_is_that_of_the_source_mode() -> None:
    for mode, expected in (("constant", 0), ("fluctuating", 1)):
        S = scenes(mode, 2)
        search, m = searched(S, mode), measured(S, mode)
        fit, _, _ = normal_equations(m, position_of(S.position))
        for noise in (None, m.energy / m.n_rows / 30.0):
            both = conditional_deviance(m, fit.cost, noise), marginal_deviance(m, fit, noise)
            assert not torch.allclose(*both)
            assert torch.equal(search.deviance(m, fit, noise), both[expected])


def test_the_most_that_can_be_told_apart_is_counted_in_real_numbers() -> None:
    # 96 real observations: 95 // 5 amplitudes shared, 95 // 15 with one a snapshot.
    assert searched(scenes("constant", 1), "constant").resolvable == 19
    assert searched(scenes("fluctuating", 1), "fluctuating").resolvable == 6
