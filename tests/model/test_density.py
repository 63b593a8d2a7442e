"""What slots say of where a source stands is a density: against loops and integrals."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from model.loss import overlap_of
from model.pointing import SharedCells
from model.prediction import Prediction
from physics import PlanarArray, PolarGrid, SceneConfig, simulate, steering_vector
from tests.model.support import judged_slots
from tests.model.test_pointing import around, own

EXTENT = (2.0, 1.0, 9.5)


def test_the_density_is_normal_in_direction_and_the_pointers_in_range() -> None:
    prediction = judged_slots(6, 4, 5)
    position = around(prediction, 3)
    source = torch.randint(3, (6, 4), generator=torch.Generator().manual_seed(2))
    found = own(prediction, position).log_density(source, EXTENT)
    assert prediction.cells is not None
    assert prediction.angle_covariance is not None
    outside = 0
    for b, i in np.ndindex(6, 4):
        truth = position[b, source[b, i]].numpy()
        ranges = prediction.cells[b, i, :, 2].numpy()
        covariance = prediction.angle_covariance[b, i].numpy()
        at = prediction.position[b, i, :2].numpy()
        normal = multivariate_normal(at, covariance).logpdf(truth[:2])
        if not ranges[0] <= truth[2] <= ranges[-1]:
            outside += 1
            assert float(found[b, i]) == -math.inf
            continue
        log_weights = prediction.log_pointer[b, i].numpy()
        fine = np.linspace(ranges[0], ranges[-1], 4001)
        mass = np.trapezoid(np.exp(np.interp(fine, ranges, log_weights)), fine)
        in_range = np.interp(truth[2], ranges, log_weights) - math.log(mass)
        anywhere = -math.log(EXTENT[0] * EXTENT[1] * EXTENT[2])
        assert float(found[b, i]) == pytest.approx(normal + in_range - anywhere, rel=1e-6)
    assert 0 < outside < 24, "the case must hold sources within and beyond the cells"


def test_of_a_slots_range_the_density_is_one_in_all() -> None:
    """Whatever the pointer: nobody gains by naming a range that is not, or by narrow cells."""
    one = judged_slots(8, 1, 5)
    assert one.cells is not None
    n = 4000
    ranges = torch.linspace(0.0, 60.0, n + 1, dtype=torch.float64)[1:]
    wide = replace(
        one,
        **{
            name: getattr(one, name).expand(-1, n, *getattr(one, name).shape[2:])
            for name in ("log_pointer", "cells", "position", "angle_covariance")
        },
    )
    directions = one.position[..., :2].expand(-1, n, -1)
    position = torch.cat([directions, ranges.expand(8, -1).unsqueeze(-1)], -1)
    source = torch.arange(n).expand(8, n)
    density = own(wide, position).log_density(source, (2.0, 1.0, 60.0)).exp()
    assert one.angle_covariance is not None
    peak = 2.0 / (2.0 * math.pi * torch.linalg.det(one.angle_covariance[:, 0]).sqrt())
    assert torch.allclose(density.mean(-1), peak, rtol=1e-2)


def test_of_shared_cells_the_density_of_a_source_anywhere_is_about_one() -> None:
    scene = SceneConfig(n_antennas=4, n_snapshots=4, min_sources=1, max_sources=1)
    array = PlanarArray(8, 8)
    grid = PolarGrid.covering(scene, 12, 8, 4)
    share = grid.shares().flatten().float()
    scenes = simulate(3000, scene, array, generator=torch.Generator().manual_seed(4))
    overlap = overlap_of(grid.steering(array), steering_vector(scenes.position, array, "spherical"))
    pointers = [
        torch.zeros(grid.shape).flatten(),  # knows nothing of the cells
        share.log(),  # knows nothing of the field
        torch.where(torch.arange(4).eq(0), 0.0, -30.0).expand(grid.shape).flatten(),  # far away
        torch.where(torch.arange(4).eq(3), 0.0, -30.0).expand(grid.shape).flatten(),  # near
    ]
    for pointer in pointers:
        prediction = Prediction(
            factor=torch.zeros(3000, array.size, 1, dtype=torch.complex64),
            existence=torch.zeros(3000, 1),
            log_pointer=pointer.log_softmax(0).expand(3000, 1, -1),
            position=scenes.position,
        )
        cells = SharedCells(prediction, overlap, scenes.position, torch.ones(3), share)
        density = cells.log_density(torch.zeros(3000, 1, dtype=torch.int64), scene.extent).exp()
        assert float(density.mean()) < 1.2, "a cell's overlaps are not its volume alone"


def test_the_density_means_the_same_whatever_the_cells() -> None:
    """A pointer that knows nothing of the range is worth nothing, with 3 cells or with 96."""
    coarse, fine = judged_slots(4, 3, 3), judged_slots(4, 3, 96)
    found = []
    for prediction in (coarse, fine):
        assert prediction.cells is not None
        cells = prediction.cells.clone()
        cells[..., :2] = coarse.position[:, :, None, :2]
        cells[..., 2] = torch.linspace(0.5, 10.0, cells.shape[2], dtype=cells.dtype)
        uniform = torch.full_like(prediction.log_pointer, -math.log(cells.shape[2]))
        knows_nothing = replace(
            prediction,
            cells=cells,
            log_pointer=uniform,
            position=coarse.position,
            angle_covariance=coarse.angle_covariance,
        )
        position = torch.cat([coarse.position[..., :2], cells[:, :, 1, 2:]], -1)
        source = torch.arange(3).expand(4, 3)
        found.append(own(knows_nothing, position).log_density(source, EXTENT))
    assert torch.allclose(found[0], found[1])


def test_a_fixed_elevation_and_a_fixed_range_leave_the_density_finite() -> None:
    prediction = judged_slots(2, 2, 4)
    assert prediction.cells is not None
    cells = prediction.cells.clone()
    cells[..., 2] = 5.0
    source = torch.zeros(2, 2, dtype=torch.int64)
    found = own(replace(prediction, cells=cells), cells[:, :, 0]).log_density(
        source, (2.0, 0.0, 0.0)
    )
    assert bool(torch.isfinite(found).all())
