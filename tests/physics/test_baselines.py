from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from physics import (
    LowRankCovariance,
    PlanarArray,
    PolarGrid,
    SceneConfig,
    find_peaks,
    music_spectrum,
    mvdr_spectrum,
    sample_covariance,
    simulate,
    steering_vector,
)
from physics.baselines import coarse_grid, estimate_n_sources, highest_peaks, music, mvdr
from physics.detections import Detections
from physics.fit import position_of
from physics.search import climb, music_form, mvdr_form
from tests.physics.helpers import complex_normal, eps
from tests.reference import covariance as dense_reference
from tests.reference import spectrum as reference

ARRAY = PlanarArray()
GRID = PolarGrid.covering(SceneConfig(), 61, 31, 8)
SOURCES = torch.tensor([[-0.6, 0.1, 1.5], [0.1, -0.2, 0.8], [0.55, 0.3, 4.0]], dtype=torch.float64)
Estimate = Callable[..., Detections]
ESTIMATES = pytest.mark.parametrize("estimate", [music, mvdr])
SEARCHES = pytest.mark.parametrize("search", ["coarse-to-fine", "grid"])
DTYPES = pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])


def of_sources(*positions: Tensor, dtype: torch.dtype = torch.complex128) -> LowRankCovariance:
    """True covariances of one list of sources (K, 3) a scene, equally strong."""
    factors = [steering_vector(p, ARRAY).mT for p in positions]
    return LowRankCovariance(torch.stack(factors).to(dtype)).normalized()


def measured(n_scenes: int, seed: int = 0, **scene: object) -> tuple[LowRankCovariance, Tensor]:
    scenes = simulate(
        n_scenes,
        SceneConfig(**scene),  # type: ignore[arg-type]
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.complex128,
    )
    return sample_covariance(scenes.y, scenes.H, scenes.codes), scenes.n_sources


def by_azimuth(position: Tensor) -> Tensor:
    return position[position[:, 0].argsort()].double()


@ESTIMATES
@SEARCHES
@DTYPES
def test_sources_of_the_true_covariance_are_found(
    estimate: Estimate, search: str, dtype: torch.dtype, device: torch.device
) -> None:
    loading = {"loading": 1e-3} if estimate is mvdr else {}
    R = of_sources(SOURCES, SOURCES.flip(0), dtype=dtype).to(device)
    found = estimate(R, ARRAY, "spherical", GRID, 3, search=search, **loading)
    assert found.position.dtype == dtype.to_real()
    assert found.position.shape == (2, 5, 3)
    assert found.present.tolist() == 2 * [[True, True, True, False, False]]
    assert torch.isfinite(found.position).all()
    for item in found.position.cpu():
        p = by_azimuth(item[:3])
        if search == "grid":  # a parabola through cells of 2 degrees and 0.27 / m
            assert float((p - SOURCES)[:, :2].abs().max()) < 0.02
            assert float((1 / p - 1 / SOURCES)[:, 2].abs().max()) < 0.15
        elif estimate is music:
            # ||U_K^H a|| is known to eps, so that a flat top is found to its root.
            tolerance = 3e-2 * eps(dtype) ** 0.5
            assert float((p - SOURCES)[:, :2].abs().max()) < 10 * tolerance
            assert float((1 / p - 1 / SOURCES)[:, 2].abs().max()) < 100 * tolerance
        else:  # the loading biases the peaks: the other sources leak in
            assert float((p - SOURCES)[:, :2].abs().max()) < 2e-3
            assert float((1 / p - 1 / SOURCES)[:, 2].abs().max()) < 2e-2


@ESTIMATES
def test_search_on_the_grid_returns_the_dense_spectrums_peaks(estimate: Estimate) -> None:
    array, grid = PlanarArray(6, 5), PolarGrid.covering(SceneConfig(), 9, 7, 3)
    factor = complex_normal(2, array.size, 4)
    a = grid.steering(array, dtype=torch.complex128).numpy()
    found = estimate(LowRankCovariance(factor), array, "spherical", grid, 2, search="grid")
    for b in range(2):
        matrix = dense_reference.dense(factor[b].numpy())
        if estimate is music:
            values = reference.music(matrix, a, 2)
        else:
            values = reference.mvdr(matrix, a, 1e-2)
        spectrum = torch.from_numpy(values).unflatten(0, grid.shape)
        cells = reference.peaks(spectrum.numpy(), 2)
        position, height = find_peaks(spectrum, grid, 2)
        assert height.tolist() == pytest.approx([float(spectrum[c]) for c in cells])
        # Whether two cells' maxima are one peak is another test's matter: these are not.
        assert torch.allclose(found.position[b, :2], position, rtol=1e-6)


@ESTIMATES
@pytest.mark.parametrize("source_mode", ["constant", "fluctuating"])
def test_coarse_to_fine_finds_the_peaks_of_a_fine_grid(
    estimate: Estimate, source_mode: str
) -> None:
    R, counts = measured(16, source_mode=source_mode)
    form = music_form(R, counts) if estimate is music else mvdr_form(R)
    fine = PolarGrid.covering(SceneConfig(), 81, 41, 12)
    spectrum = form.height(form.energy(fine.steering(ARRAY, dtype=torch.complex128)))
    cell, height = find_peaks(spectrum.unflatten(-1, fine.shape), fine, 1, refine=False)
    found = estimate(R, ARRAY, "spherical", GRID, counts)
    assert found.count.tolist() == counts.tolist()
    a = steering_vector(found.position, ARRAY)
    top = form.height((a @ form.rows.mT).abs().square().sum(-1))[:, 0]
    assert (top >= height[:, 0] * (1 - 1e-9)).all()
    # Of two tops of nearly one height the cells may tell the wrong one.
    b = steering_vector(cell[:, 0], ARRAY)
    overlap = (a[:, 0] * b.conj()).sum(-1).abs().square()
    assert float((overlap > 0.8).double().mean()) >= 0.8


@ESTIMATES
@SEARCHES
def test_detections_are_peaks_inside_of_the_grid_highest_first_and_apart(
    estimate: Estimate, search: str
) -> None:
    R, counts = measured(8, seed=1)
    form = music_form(R, counts) if estimate is music else mvdr_form(R)
    found = estimate(R, ARRAY, "spherical", GRID, counts, search=search)
    a = steering_vector(found.position, ARRAY)
    height = form.height((a @ form.rows.mT).abs().square().sum(-1))
    overlap = (a @ a.mH).abs().square()
    for b, count in enumerate(counts.tolist()):
        assert found.present[b].tolist() == [i < count for i in range(5)]
        off = overlap[b, :count, :count] - torch.eye(count, dtype=torch.float64)
        assert float(off.max()) <= 0.98
        if search == "coarse-to-fine":
            assert (height[b, :count].diff() <= 1e-12).all()
    p = found.position[found.present]
    for axis, values in ((p[:, 0], GRID.azimuth), (p[:, 1], GRID.elevation)):
        assert float(axis.min()) >= min(values) - 1e-9
        assert float(axis.max()) <= max(values) + 1e-9
    assert float(p[:, 2].min()) >= 0.5 - 1e-9
    assert float(p[:, 2].max()) <= 10 + 1e-9


@ESTIMATES
@SEARCHES
def test_no_source_and_silence_give_no_detection(estimate: Estimate, search: str) -> None:
    R = of_sources(SOURCES, SOURCES, SOURCES)
    found = estimate(
        R, ARRAY, "spherical", GRID, torch.tensor([0, 2, 0]), search=search, max_sources=2
    )
    assert found.present.tolist() == [[False, False], [True, True], [False, False]]
    assert torch.isfinite(found.position).all()
    silent = LowRankCovariance(torch.zeros(2, ARRAY.size, 3, dtype=torch.complex64))
    white = LowRankCovariance(silent.factor, torch.ones(2))
    for nothing in (silent, white):
        for count in (2, None):
            found = estimate(nothing, ARRAY, "spherical", GRID, count, search=search)
            assert not found.present.any()
            assert found.position.shape == (2, 5, 3)
            assert torch.isfinite(found.position).all()


@SEARCHES
def test_more_sources_than_the_rank_search_the_whole_range(search: str) -> None:
    R = of_sources(SOURCES)
    three, five = (
        music(R, ARRAY, "spherical", GRID, k, search=search)  # type: ignore[arg-type]
        for k in (3, 5)
    )
    assert three.count.tolist() == [3]
    assert five.count.tolist() == [5]
    # The same spectrum, whose lower peaks follow.
    assert torch.equal(five.position[:, :3], three.position[:, :3])


def test_coincident_sources_make_one_peak_and_side_lobes() -> None:
    R = of_sources(SOURCES[[0, 0]])
    found = music(R, ARRAY, "spherical", GRID, 2)
    assert torch.allclose(found.position[0, 0], SOURCES[0], atol=1e-6)
    assert float((found.position[0, 1] - SOURCES[0])[:2].abs().max()) > 0.05
    form = music_form(R, 2)
    height = form.height((steering_vector(found.position, ARRAY) @ form.rows.mT).abs()[..., 0] ** 2)
    assert float(height[0, 0]) > 1e12
    assert float(height[0, 1]) < 10


@ESTIMATES
@SEARCHES
def test_a_source_outside_of_the_grid_shows_on_its_border(estimate: Estimate, search: str) -> None:
    grid = PolarGrid(tuple(np.linspace(-0.5, 0.5, 31)), GRID.elevation, GRID.inverse_range)
    R = of_sources(torch.tensor([[0.56, 0.1, 2.0]], dtype=torch.float64))
    found = estimate(R, ARRAY, "spherical", grid, 1, search=search)
    assert float(found.position[0, 0, 0]) == pytest.approx(0.5, abs=1e-9)
    assert float(found.position[0, 0, 1]) == pytest.approx(0.1, abs=0.03)


@ESTIMATES
@SEARCHES
def test_a_scene_is_found_alike_alone_in_a_batch_and_from_a_view(
    estimate: Estimate, search: str
) -> None:
    R, counts = measured(3, seed=2)
    together = estimate(R, ARRAY, "spherical", GRID, counts, search=search)
    view = R.factor.mT.contiguous().mT
    assert not view.is_contiguous()
    turned = estimate(LowRankCovariance(view), ARRAY, "spherical", GRID, counts, search=search)
    assert torch.allclose(turned.position, together.position, rtol=1e-5)
    for b in range(3):
        alone = estimate(
            LowRankCovariance(R.factor[b : b + 1]),
            ARRAY,
            "spherical",
            GRID,
            int(counts[b]),
            search=search,
        )
        assert torch.allclose(alone.position[0], together.position[b], rtol=1e-5)
    many = LowRankCovariance(R.factor.repeat(30, 1, 1))  # more than a block
    found = estimate(many, ARRAY, "spherical", GRID, counts.repeat(30), search=search)
    assert len(found) == 90
    assert torch.allclose(found.position[87:], together.position, rtol=1e-5)
    empty = LowRankCovariance(R.factor[:0])
    for count in (2, torch.zeros(0, dtype=torch.int64), None):
        assert estimate(empty, ARRAY, "spherical", GRID, count, search=search).present.shape == (
            0,
            5,
        )


@SEARCHES
@pytest.mark.parametrize("wavefront", ["spherical", "fresnel", "paraxial", "planar"])
def test_every_wavefront_is_searched_with_its_own_steering_vectors(
    search: str, wavefront: str
) -> None:
    a = steering_vector(SOURCES, ARRAY, wavefront)  # type: ignore[arg-type]
    R = LowRankCovariance(a.mT.unsqueeze(0))
    found = music(R, ARRAY, wavefront, GRID, 3, search=search)  # type: ignore[arg-type]
    p = by_azimuth(found.position[0, :3])
    assert float((p - SOURCES)[:, :2].abs().max()) < 0.02
    if wavefront != "planar":
        assert float((1 / p - 1 / SOURCES)[:, 2].abs().max()) < 0.15
    assert found.count.tolist() == [3]
    many = PolarGrid.covering(SceneConfig(), 61, 31, 25)
    again = music(R, ARRAY, wavefront, many, 3, search=search)  # type: ignore[arg-type]
    p = by_azimuth(again.position[0, :3])
    assert float((p - SOURCES)[:, :2].abs().max()) < 0.02


@SEARCHES
def test_a_grid_may_have_one_point_on_any_axis_and_reach_infinity(search: str) -> None:
    at = torch.tensor([[0.0, 0.0, math.inf]], dtype=torch.float64)
    R = of_sources(at)
    for grid in (
        PolarGrid((0.0,), (0.0,), (0.0,)),
        PolarGrid((-0.1, 0.0, 0.1), (0.0,), (0.0,)),
        PolarGrid((0.0,), (-0.1, 0.0, 0.1), (0.0, 0.1, 0.2)),
    ):
        found = music(R, ARRAY, "spherical", grid, 1, search=search)  # type: ignore[arg-type]
        assert found.present[0].tolist() == [True] + 4 * [False]
        assert found.position[0, 0, :2].abs().max() < 1e-6
        assert float(1 / found.position[0, 0, 2]) < 1e-6
    tiny = PlanarArray(1, 1)
    R = LowRankCovariance(torch.ones(1, 1, 1, dtype=torch.complex128))
    assert mvdr(R, tiny, "spherical", GRID, 1, search=search).count.tolist() == [0]  # type: ignore[arg-type]


def test_climbing_reaches_the_tops_of_the_spectrum_and_stays_in_the_box() -> None:
    R, counts = measured(4, seed=3)
    bounds = torch.tensor([[-1.0, -0.5, 0.1], [1.0, 0.5, 2.0]], dtype=torch.float64)
    g = torch.Generator().manual_seed(0)
    start = bounds[0] + (bounds[1] - bounds[0]) * torch.rand(4, 50, 3, generator=g).double()
    for form in (music_form(R, counts), mvdr_form(R)):

        def energy(coordinates: Tensor, form=form) -> Tensor:  # type: ignore[no-untyped-def]
            a = steering_vector(position_of(coordinates), ARRAY)
            return (a @ form.rows.mT).abs().square().sum(-1)

        before = energy(start)
        for n_steps in range(1, 7):
            _, after = climb(form, start, bounds, ARRAY, n_steps=n_steps)
            assert (after >= before - 1e-12).all()
            before = after
        top, height = climb(form, start, bounds, ARRAY, n_steps=60)
        assert torch.allclose(energy(top), height)
        assert ((top >= bounds[0]) & (top <= bounds[1])).all()
        point = top.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(energy(point).sum(), point)
        outward = ((top == bounds[0]) & (gradient < 0)) | ((top == bounds[1]) & (gradient > 0))
        # A steering vector moves by up to 10 a radian or 1/m: uphill nowhere, to rounding's root.
        assert float(gradient.where(~outward, 0.0).abs().max()) < 1e-6
        for axis in range(3):
            for side in (-1e-3, 1e-3):
                moved = top.clone()
                moved[..., axis] += side
                moved = moved.clamp(bounds[0], bounds[1])
                assert (energy(moved) <= height + 1e-9).all()


def test_candidates_on_one_peak_count_once() -> None:
    p = SOURCES[[0, 0, 1, 0, 2]].unsqueeze(0)
    p[0, 1, 0] += 1e-4
    height = torch.tensor([[3.0, 4.0, 5.0, 2.0, 0.0]], dtype=torch.float64)
    found = highest_peaks(p, height, torch.tensor([5]), ARRAY, "spherical", 6)
    assert found.present[0].tolist() == [True, True] + 4 * [False]
    assert torch.equal(found.position[0, :2], p[0, [2, 1]])
    assert found.position.shape == (1, 6, 3)


def test_a_dropped_candidate_drops_no_other() -> None:
    chain = SOURCES[[0, 0, 0]].unsqueeze(0)
    chain[0, :, 0] += torch.tensor([0.0, 0.011, 0.022])
    a = steering_vector(chain, ARRAY)
    overlap = (a @ a.mH).abs().square()[0]
    assert float(overlap[0, 1]) > 0.98 > float(overlap[0, 2])
    height = torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64)
    found = highest_peaks(chain, height, torch.tensor([3]), ARRAY, "spherical", 3)
    assert found.present.tolist() == [[True, True, False]]
    assert torch.equal(found.position[0, :2], chain[0, [0, 2]])


def test_the_coarse_grid_keeps_the_bounds_and_follows_the_beam() -> None:
    fine = PolarGrid.covering(SceneConfig(), 121, 61, 16)
    coarse = coarse_grid(fine, ARRAY)
    for one, two in (
        (coarse.azimuth, fine.azimuth),
        (coarse.elevation, fine.elevation),
        (coarse.inverse_range, fine.inverse_range),
    ):
        assert one[0] == pytest.approx(two[0])
        assert one[-1] == pytest.approx(two[-1])
        assert len(one) <= len(two)
    assert math.prod(coarse.shape) * 8 < math.prod(fine.shape)
    wide = coarse_grid(fine, PlanarArray(24, 12))
    assert len(wide.azimuth) > 1.8 * len(coarse.azimuth)
    assert len(wide.elevation) == len(coarse.elevation)
    rough = PolarGrid.covering(SceneConfig(), 3, 2, 1)
    assert coarse_grid(rough, ARRAY) == rough


def wax_kailath(values: np.ndarray, n: int, criterion: str, most: int) -> int:
    p = len(values)
    scores = []
    for k in range(most + 1):
        tail = values[k:]
        ratio = np.prod(tail ** (1 / (p - k))) / np.mean(tail)
        likelihood = n * (p - k) * np.log(ratio)
        free = k * (2 * p - k)
        scores.append(-likelihood + (free if criterion == "aic" else 0.5 * free * np.log(n)))
    return int(np.argmin(scores))


@pytest.mark.parametrize("criterion", ["mdl", "aic"])
def test_the_count_is_that_of_wax_and_kailath(criterion: str) -> None:
    g = torch.Generator().manual_seed(0)
    scale = torch.tensor([8.0, 5.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    for trial in range(20):
        factor = complex_normal(1, 40, 8, seed=trial) * scale[torch.randperm(8, generator=g)]
        matrix = dense_reference.dense(factor[0].numpy())
        values = np.linalg.eigvalsh(matrix)[::-1][:8]
        count = estimate_n_sources(LowRankCovariance(factor), 6, criterion)  # type: ignore[arg-type]
        assert count.tolist() == [wax_kailath(values, 8, criterion, 6)]


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_the_count_is_bounded_and_forgets_the_scale(scale: float) -> None:
    factor = torch.zeros(3, 40, 8, dtype=torch.complex64)
    q, _ = torch.linalg.qr(complex_normal(40, 8, dtype=torch.complex64))
    factor[1] = q * torch.tensor([30.0, 20.0, 10.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    factor[2] = q
    R = LowRankCovariance(factor * scale)
    assert estimate_n_sources(R).tolist() == [0, 3, 0]
    assert estimate_n_sources(R, 2).tolist() == [0, 2, 0]
    factor[1, :, 3:] = 0.0  # what was never observed weighs like rounding, not like log 0
    assert estimate_n_sources(LowRankCovariance(factor[1] * scale)).tolist() == 3
    assert estimate_n_sources(LowRankCovariance(factor[1] * scale), 2).tolist() == 2
    single = LowRankCovariance(factor[1, :, :1] * scale)
    assert estimate_n_sources(single).tolist() == 0


@ESTIMATES
def test_a_count_that_is_not_given_is_estimated(estimate: Estimate) -> None:
    R, _ = measured(6, seed=4)
    counts = estimate_n_sources(R, 3)
    found = estimate(R, ARRAY, "spherical", GRID, max_sources=3)
    given = estimate(R, ARRAY, "spherical", GRID, counts, max_sources=3)
    assert found.count.tolist() == counts.tolist()
    assert torch.equal(found.position, given.position)


@ESTIMATES
def test_bad_requests_are_refused(estimate: Estimate) -> None:
    R = of_sources(SOURCES, SOURCES)
    call = (ARRAY, "spherical", GRID)
    with pytest.raises(ValueError, match="search 'fast' unknown"):
        estimate(R, *call, 1, search="fast")
    with pytest.raises(ValueError, match="wavefront 'flat' unknown"):
        estimate(R, ARRAY, "flat", GRID, 1)
    with pytest.raises(ValueError, match="144 x 144 but the array has 30"):
        estimate(R, PlanarArray(6, 5), "spherical", GRID, 1)
    with pytest.raises(ValueError, match=r"batch shape \(\).*unsqueeze"):
        estimate(LowRankCovariance(R.factor[0]), *call, 1)
    with pytest.raises(ValueError, match=r"batch shape \(1, 2\)"):
        estimate(LowRankCovariance(R.factor.unsqueeze(0)), *call, 1)
    with pytest.raises(ValueError, match=r"n_sources is -1; expected 0\.\.5"):
        estimate(R, *call, torch.tensor([-1, 2]))
    with pytest.raises(ValueError, match=r"n_sources is 6; expected 0\.\.5: raise max_sources"):
        estimate(R, *call, 6)
    with pytest.raises(ValueError, match=r"shape \(3,\); expected one number or \(2,\)"):
        estimate(R, *call, torch.tensor([1, 2, 3]))
    for count in (1.5, torch.tensor([1.0, 2.0]), torch.tensor([True, False])):
        with pytest.raises(ValueError, match="expected an integer"):
            estimate(R, *call, count)
    with pytest.raises(ValueError, match="max_sources is 0"):
        estimate(R, *call, 0, max_sources=0)
    factor = R.factor.clone()
    factor[1, 2, 0] = math.nan
    for count in (1, None):
        with pytest.raises(ValueError, match="non-finite"):
            estimate(LowRankCovariance(factor), *call, count)
    with pytest.raises(ValueError, match="non-finite"):
        estimate_n_sources(LowRankCovariance(factor))
    with pytest.raises(ValueError, match="criterion 'bic' unknown"):
        estimate_n_sources(R, criterion="bic")  # type: ignore[arg-type]


def test_limits_of_one_method_are_refused_by_it_alone() -> None:
    small = PlanarArray(2, 2)
    R = LowRankCovariance(complex_normal(1, 4, 4))
    with pytest.raises(ValueError, match="at most 3 sources"):
        music(R, small, "spherical", GRID, 2, max_sources=4)
    assert mvdr(R, small, "spherical", GRID, 4, max_sources=4).present.shape == (1, 4)
    for loading in (0.0, math.nan):
        with pytest.raises(ValueError, match="loading"):
            mvdr(R, small, "spherical", GRID, 1, max_sources=1, loading=loading)


def test_the_spectra_are_those_of_the_forms_that_are_searched() -> None:
    R, counts = measured(2, seed=5)
    a = GRID.steering(ARRAY, dtype=torch.complex128)
    for form, spectrum in (
        (music_form(R, counts), music_spectrum(R, GRID, counts, ARRAY)),
        (mvdr_form(R), mvdr_spectrum(R, GRID, ARRAY)),
    ):
        direct = (a @ form.rows.mT).abs().square().sum(-1)
        assert torch.allclose(form.height(direct), spectrum.flatten(1))


@ESTIMATES
def test_trap_autocast_and_gradients_stay_out_of_the_search(
    estimate: Estimate, device: torch.device
) -> None:
    R = of_sources(SOURCES, dtype=torch.complex64).to(device)
    plain = estimate(R, ARRAY, "spherical", GRID, 3)
    with torch.autocast(device.type, torch.bfloat16):
        cast = estimate(R, ARRAY, "spherical", GRID, 3)
    assert torch.equal(plain.position, cast.position)
    wanted = LowRankCovariance(R.factor.clone().requires_grad_())
    found = estimate(wanted, ARRAY, "spherical", GRID, 3)
    assert not found.position.requires_grad
    assert torch.allclose(found.position, plain.position, rtol=1e-3)
