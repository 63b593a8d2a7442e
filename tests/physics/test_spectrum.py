from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from physics import (
    LowRankCovariance,
    PlanarArray,
    PolarGrid,
    SceneConfig,
    find_peaks,
    music_spectrum,
    mvdr_spectrum,
    search,
    steering_vector,
)
from physics import spectrum as spectra
from tests.physics.helpers import LargestTensor, complex_normal, eps, relative_error
from tests.reference import covariance as dense_reference
from tests.reference import spectrum as reference

ARRAY = PlanarArray(6, 5)
GRID = PolarGrid.covering(SceneConfig(), 9, 5, 4)


def covariance(
    B: int = 2, r: int = 4, loading: float = 0.0, dtype: torch.dtype = torch.complex128
) -> LowRankCovariance:
    factor = complex_normal(B, ARRAY.size, r, dtype=dtype)
    return LowRankCovariance(factor, torch.full((B,), loading, dtype=dtype.to_real()))


def steering() -> np.ndarray:
    return GRID.steering(ARRAY, dtype=torch.complex128).numpy()


def test_grid_covers_the_field_of_view_evenly_in_inverse_range() -> None:
    assert GRID.shape == (9, 5, 4)
    p = GRID.positions(dtype=torch.float64)
    assert p.shape == (9, 5, 4, 3)
    assert float(p[0, 0, 0, 0]) == pytest.approx(math.radians(-60))
    assert float(p[-1, -1, 0, 1]) == pytest.approx(math.radians(30))
    inverse = 1 / p[0, 0, :, 2]
    assert torch.allclose(inverse, torch.linspace(0.1, 2.0, 4, dtype=torch.float64))
    assert PolarGrid.covering(SceneConfig(), 1, 1, 1).positions().shape == (1, 1, 1, 3)
    infinite = PolarGrid((0.0,), (0.0,), (0.0, 0.5)).steering(ARRAY)
    assert torch.isfinite(torch.view_as_real(infinite)).all()


def test_rows_of_the_grids_steering_follow_its_positions() -> None:
    a = steering_vector(GRID.positions(dtype=torch.float64), ARRAY)
    assert torch.equal(torch.from_numpy(steering()), a.reshape(-1, ARRAY.size))


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64])
@pytest.mark.parametrize("loading", [0.0, 0.5])
def test_music_matches_the_dense_noise_subspace(
    dtype: torch.dtype, loading: float, device: torch.device
) -> None:
    R = covariance(loading=loading, dtype=dtype)
    for k in (1, 2, 4):
        spectrum = music_spectrum(R.to(device), GRID, k, ARRAY)
        assert spectrum.shape == (2, *GRID.shape)
        for value, factor in zip(spectrum, R.factor, strict=True):
            # The dense subspace does not depend on the loading; rounding over the eigenvalue gap.
            expected = reference.music(dense_reference.dense(factor.numpy()), steering(), k)
            assert relative_error(value.flatten(), expected) < 2e3 * eps(dtype)


def test_music_takes_a_count_for_each_item_and_is_flat_for_none() -> None:
    R = covariance(B=3)
    spectrum = music_spectrum(R, GRID, torch.tensor([0, 2, 9]), ARRAY)
    assert torch.equal(spectrum[0], torch.ones(GRID.shape, dtype=torch.float64))
    for b, k in ((1, 2), (2, 4)):
        alone = music_spectrum(LowRankCovariance(R.factor[b]), GRID, k, ARRAY)
        assert torch.allclose(spectrum[b], alone)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64])
@pytest.mark.parametrize("loading", [1e-2, 1.0])
def test_mvdr_matches_the_dense_inverse(
    dtype: torch.dtype, loading: float, device: torch.device
) -> None:
    R = covariance(loading=0.1, dtype=dtype)
    spectrum = mvdr_spectrum(R.to(device), GRID, ARRAY, loading=loading)
    for value, factor in zip(spectrum, R.factor, strict=True):
        matrix = dense_reference.dense(factor.numpy(), 0.1)
        expected = reference.mvdr(matrix, steering(), loading)
        # Woodbury subtracts two numbers that agree to loading / lambda_max.
        assert relative_error(value.flatten(), expected) < 100 * eps(dtype) * 30 / loading


@pytest.mark.parametrize("scale", [1e-25, 1e-15, 1e15, 1e25])
def test_spectra_forget_the_scale_of_the_covariance(scale: float) -> None:
    R = covariance(dtype=torch.complex64)
    S = LowRankCovariance(R.factor * scale)
    assert torch.allclose(
        music_spectrum(S, GRID, 2, ARRAY), music_spectrum(R, GRID, 2, ARRAY), rtol=1e-3
    )
    assert torch.allclose(mvdr_spectrum(S, GRID, ARRAY), mvdr_spectrum(R, GRID, ARRAY), rtol=1e-3)


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), phase=st.floats(0, 6.28), dtype=st.booleans())
def test_spectra_are_positive_finite_and_blind_to_phase_and_order_of_columns(
    seed: int, phase: float, dtype: bool
) -> None:
    factor = complex_normal(
        ARRAY.size, 3, seed=seed, dtype=torch.complex128 if dtype else torch.complex64
    )
    turned = factor.flip(-1) * complex(math.cos(phase), math.sin(phase))
    R, S = LowRankCovariance(factor), LowRankCovariance(turned)
    for one, two in (
        (music_spectrum(R, GRID, 2, ARRAY), music_spectrum(S, GRID, 2, ARRAY)),
        (mvdr_spectrum(R, GRID, ARRAY), mvdr_spectrum(S, GRID, ARRAY)),
    ):
        assert torch.isfinite(one).all()
        assert (one > 0).all()
        assert torch.allclose(one, two, rtol=1e-8 if dtype else 1e-2)
    assert (music_spectrum(R, GRID, 2, ARRAY) >= 1).all()


def test_a_silent_scene_has_flat_spectra() -> None:
    silent = LowRankCovariance(torch.zeros(1, ARRAY.size, 3, dtype=torch.complex64))
    assert torch.equal(music_spectrum(silent, GRID, 2, ARRAY), torch.ones(1, *GRID.shape))
    spectrum = mvdr_spectrum(silent, GRID, ARRAY)
    assert torch.allclose(spectrum, spectrum.mean().expand_as(spectrum))


SOURCES = torch.tensor([[-0.6, 0.1, 1.5], [0.1, -0.2, 0.8], [0.55, 0.3, 4.0]], dtype=torch.float64)


@pytest.mark.parametrize("method", ["music", "mvdr"])
@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64])
def test_spectra_of_the_true_covariance_peak_at_the_sources(
    method: str, dtype: torch.dtype
) -> None:
    array = PlanarArray()
    # Sources between the points of the grid: refined peaks come within a third of a cell.
    grid = PolarGrid(
        tuple(np.linspace(-1.0, 1.0, 81)),
        tuple(np.linspace(-0.5, 0.5, 41)),
        tuple(np.linspace(0.1, 1.5, 15)),
    )
    R = LowRankCovariance(steering_vector(SOURCES, array).mT.to(dtype)).normalized()
    spectrum = (
        music_spectrum(R, grid, 3, array)
        if method == "music"
        else mvdr_spectrum(R, grid, array, loading=1e-3)
    )
    position, height = find_peaks(spectrum, grid, 3)
    found = position[position[:, 0].argsort()].double()
    assert (height > 0).all()
    error = (found - SOURCES).abs()
    assert float(error[:, :2].max()) < 0.025 / 3
    assert float((1 / found[:, 2] - 1 / SOURCES[:, 2]).abs().max()) < 0.1 / 3 * 2


def test_music_is_at_its_ceiling_exactly_on_a_source() -> None:
    p = SOURCES[0].tolist()
    grid = PolarGrid((p[0], 0.9), (p[1],), (1 / p[2],))
    R = LowRankCovariance(steering_vector(SOURCES, ARRAY).mT)
    spectrum = music_spectrum(R, grid, 3, ARRAY).flatten()
    assert float(spectrum[0]) > 1e12
    assert float(spectrum[1]) < 100
    assert torch.isfinite(spectrum).all()


def test_a_grid_first_used_in_inference_mode_serves_gradients_later() -> None:
    grid = PolarGrid((0.0, 0.123), (0.0,), (0.25,))
    factor = complex_normal(ARRAY.size, 2).requires_grad_()
    with torch.inference_mode():
        music_spectrum(LowRankCovariance(factor.detach()), grid, 1, ARRAY)
    music_spectrum(LowRankCovariance(factor), grid, 1, ARRAY).sum().backward()
    assert factor.grad is not None


def test_gradients_of_both_spectra_match_finite_differences() -> None:
    array, grid = PlanarArray(3, 2), PolarGrid((-0.4, 0.3), (0.1,), (0.2, 0.9))
    factor = complex_normal(2, 6, 3).requires_grad_()
    for spectrum in (
        lambda f: music_spectrum(LowRankCovariance(f), grid, torch.tensor([1, 2]), array),
        lambda f: mvdr_spectrum(LowRankCovariance(f), grid, array, loading=0.1),
    ):
        assert torch.autograd.gradcheck(spectrum, (factor,))


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64])
@pytest.mark.parametrize("counts", [0, 1, 3, 9, -1, torch.tensor([3, 0, 1])])
def test_spectra_are_the_same_with_and_without_a_gradient(
    dtype: torch.dtype, counts: int | Tensor
) -> None:
    R = covariance(3, 4, loading=0.1, dtype=dtype)
    wanted = LowRankCovariance(R.factor.clone().requires_grad_(), R.loading)
    music, mvdr = music_spectrum(wanted, GRID, counts, ARRAY), mvdr_spectrum(wanted, GRID, ARRAY)
    assert mvdr.requires_grad
    with torch.no_grad():
        plain = music_spectrum(wanted, GRID, counts, ARRAY), mvdr_spectrum(wanted, GRID, ARRAY)
    for one, two in zip((music, mvdr), plain, strict=True):
        assert not two.requires_grad
        assert relative_error(one, two) < 2e4 * eps(dtype)
    loading = R.loading.clone().requires_grad_()
    assert mvdr_spectrum(LowRankCovariance(R.factor, loading), GRID, ARRAY).requires_grad


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64])
def test_weak_sources_keep_their_direction_beside_strong_ones(dtype: torch.dtype) -> None:
    # The Gram matrix knows a weak eigenvector up to rounding times the ratio of the powers.
    weak = 30 * eps(dtype) ** 0.5
    close = SOURCES[[0, 0, 1]] + torch.tensor([[0.0] * 3, [0.4, 0.0, 0.0], [0.0] * 3])
    close[2] = SOURCES[0] + torch.tensor([0.2, 0.2, 0.0])
    factor = steering_vector(close, ARRAY).mT * torch.tensor([1.0, 0.5, weak]).double()
    mixing, _ = torch.linalg.qr(complex_normal(3, 3))  # as snapshots mix the sources
    factor = factor @ mixing
    exact = LowRankCovariance(factor)
    rounded = LowRankCovariance(factor.to(dtype))
    form = search.music_form(rounded, 3)
    gram = (form.rows @ form.rows.mH).to(torch.complex128)
    assert relative_error(gram, torch.eye(3)) < 30 * eps(dtype)
    one, two = (music_spectrum(R, GRID, 3, ARRAY).double() for R in (rounded, exact))
    assert relative_error(1 / one, 1 / two) < 30 * eps(dtype) / weak


@pytest.mark.parametrize("room", [1, 5000, 2**21])
def test_blocks_of_points_and_of_scenes_do_not_show(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    R, grid = covariance(7, 3), PolarGrid.covering(SceneConfig(), 29, 17, 5)
    a = grid.steering(ARRAY, dtype=torch.complex128)
    expected = [
        (a.conj() @ search.music_form(R, 2).rows.mH).abs().square().sum(-1),
        (a.conj() @ search.mvdr_form(R).rows.mH).abs().square().sum(-1),
    ]
    monkeypatch.setitem(search._BLOCK_BYTES, "cpu", room)
    for form, value in zip((search.music_form(R, 2), search.mvdr_form(R)), expected, strict=True):
        assert torch.allclose(form.energy(a), value)
    monkeypatch.setattr(spectra, "_STEERING_ROWS", 100)
    grid = PolarGrid((*grid.azimuth, 1.1), grid.elevation, grid.inverse_range)
    rows = steering_vector(grid.positions(dtype=torch.float64).reshape(-1, 3), ARRAY)
    assert torch.allclose(grid.steering(ARRAY, dtype=torch.complex128), rows)


def test_a_spectrum_allocates_little_beside_its_result() -> None:
    R, grid = (
        covariance(64, 4, dtype=torch.complex64),
        PolarGrid.covering(SceneConfig(), 41, 31, 16),
    )
    kept = grid.steering(ARRAY)
    for call in (
        lambda: music_spectrum(R, grid, 4, ARRAY),
        lambda: mvdr_spectrum(R, grid, ARRAY),
    ):
        with LargestTensor() as largest:
            result = call()
        # The result's 5 MB; all projections together would have 4 * 2 times as much.
        assert largest.elements * 8 == max(result.nbytes, kept.nbytes)
        assert result.nbytes > kept.nbytes


@pytest.mark.parametrize("batch", [(), (0,), (2, 0), (2, 3)])
def test_spectra_take_any_leading_shape(batch: tuple[int, ...]) -> None:
    factor = complex_normal(*batch, ARRAY.size, 3)
    R = LowRankCovariance(factor)
    music, mvdr = music_spectrum(R, GRID, 2, ARRAY), mvdr_spectrum(R, GRID, ARRAY)
    assert music.shape == mvdr.shape == (*batch, *GRID.shape)
    if batch == (2, 3):
        alone = LowRankCovariance(factor[1, 2])
        assert torch.allclose(music[1, 2], music_spectrum(alone, GRID, 2, ARRAY))
        assert torch.allclose(mvdr[1, 2], mvdr_spectrum(alone, GRID, ARRAY))


def test_bad_spectra_requests_are_refused() -> None:
    R = covariance()
    with pytest.raises(ValueError, match="30 x 30 but the array has 144"):
        music_spectrum(R, GRID, 1, PlanarArray())
    for value in (math.nan, math.inf):
        factor = R.factor.clone()
        factor[1, 2, 3] = value
        for broken in (
            LowRankCovariance(factor),
            LowRankCovariance(R.factor, torch.tensor([1.0, value], dtype=torch.float64)),
        ):
            with pytest.raises(ValueError, match="non-finite"):
                music_spectrum(broken, GRID, 1, ARRAY)
            with pytest.raises(ValueError, match="non-finite"):
                mvdr_spectrum(broken, GRID, ARRAY)
    for loading in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="loading"):
            mvdr_spectrum(R, GRID, ARRAY, loading=loading)
    with pytest.raises(ValueError, match="at least one point"):
        PolarGrid((), (0.0,), (0.0,))
    with pytest.raises(ValueError, match="inverse range"):
        PolarGrid((0.0,), (0.0,), (-0.1,))


@pytest.mark.parametrize(
    "fixed",
    [{"azimuth_deg": (7.0, 7.0)}, {"elevation_deg": (0.0, 0.0)}, {"range_m": (5.0, 5.0)}],
)
def test_a_direction_or_range_that_is_fixed_makes_no_copies_of_peaks(fixed: Any) -> None:
    """With copies of the plane every copy of the highest peak would come before the second."""
    array, grid = PlanarArray(), PolarGrid.covering(SceneConfig(**fixed))
    assert grid.shape == tuple(
        1 if name in fixed else count
        for name, count in (("azimuth_deg", 61), ("elevation_deg", 31), ("range_m", 8))
    )
    places = zip((5, 30, 52), (4, 26, 14), (1, 2, 0), strict=True)
    cells = [tuple(min(p, n - 1) for p, n in zip(at, grid.shape, strict=True)) for at in places]
    true = torch.stack([grid.positions()[cell] for cell in cells])
    R = LowRankCovariance(steering_vector(true, array).mT)
    position, _ = find_peaks(music_spectrum(R, grid, 3, array), grid, 3, refine=False)
    assert sorted(position.tolist()) == sorted(true.tolist())
    assert PolarGrid((0.1, 0.1), (0.0, 0.0, 0.0), (0.2,)).shape == (1, 1, 1)


def on_grid(cells: list[tuple[int, int, int]], grid: PolarGrid) -> Tensor:
    return torch.tensor(
        [(grid.azimuth[i], grid.elevation[j], 1 / grid.inverse_range[q]) for i, j, q in cells],
        dtype=torch.float64,
    ).reshape(-1, 3)


@settings(max_examples=25)
@given(
    sides=st.tuples(st.integers(1, 7), st.integers(1, 5), st.integers(1, 4)),
    n_peaks=st.integers(0, 6),
    seed=st.integers(0, 1000),
)
def test_peaks_match_the_loops(sides: tuple[int, int, int], n_peaks: int, seed: int) -> None:
    grid = PolarGrid.covering(SceneConfig(), *sides)
    spectrum = torch.rand(
        2, *sides, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    position, height = find_peaks(spectrum + 0.1, grid, n_peaks, refine=False)
    assert position.shape == (2, n_peaks, 3)
    for b in range(2):
        cells = reference.peaks(spectrum[b].numpy() + 0.1, n_peaks)
        assert torch.allclose(position[b, : len(cells)], on_grid(cells, grid))
        expected = [float(spectrum[b][cell]) + 0.1 for cell in cells]
        assert height[b, : len(cells)].tolist() == pytest.approx(expected)
        assert not height[b, len(cells) :].any()
        assert position[b, len(cells) :].isnan().all()


def test_refinement_follows_the_parabola_through_the_logarithm() -> None:
    g = torch.Generator().manual_seed(0)
    spectrum = torch.rand(*GRID.shape, generator=g, dtype=torch.float64) + 0.1
    position, _ = find_peaks(spectrum, GRID, 3)
    log = spectrum.log().numpy()
    axes = (GRID.azimuth, GRID.elevation, GRID.inverse_range)
    for found, cell in zip(position, reference.peaks(spectrum.numpy(), 3), strict=True):
        for axis, points in enumerate(axes):
            expected = points[cell[axis]]
            if 0 < cell[axis] < len(points) - 1:
                line = [
                    log[tuple(c + s * (i == axis) for i, c in enumerate(cell))] for s in (-1, 0, 1)
                ]
                expected += reference.parabola_vertex(*line) * (points[1] - points[0])
            value = float(found[axis])
            assert (1 / value if axis == 2 else value) == pytest.approx(expected, abs=1e-9)


def test_refinement_finds_the_top_of_a_gaussian_exactly() -> None:
    p = GRID.positions(dtype=torch.float64)
    top = torch.tensor([0.2, -0.1, 0.7], dtype=torch.float64)
    coordinates = torch.stack([p[..., 0], p[..., 1], 1 / p[..., 2]], dim=-1)
    spectrum = torch.exp(-3 * (coordinates - top).square().sum(-1))
    position, _ = find_peaks(spectrum, GRID, 1)
    assert position[0, :2].tolist() == pytest.approx(top[:2].tolist(), abs=1e-9)
    assert 1 / float(position[0, 2]) == pytest.approx(0.7, abs=1e-9)


def test_every_cell_of_a_plateau_counts_as_a_peak() -> None:
    spectrum = torch.ones(*GRID.shape)
    spectrum[4, 2, 1] = spectrum[4, 3, 1] = 2.0
    position, height = find_peaks(spectrum, GRID, 2, refine=False)
    assert height.tolist() == [2.0, 2.0]
    expected = on_grid([(4, 2, 1), (4, 3, 1)], GRID).float()
    assert torch.allclose(position[position[:, 1].argsort()], expected)
    assert torch.isfinite(find_peaks(torch.ones(*GRID.shape), GRID, 5)[0]).all()


def test_peaks_take_any_leading_shape_and_may_be_more_than_the_grid_holds() -> None:
    grid = PolarGrid((0.0, 0.1), (0.0,), (0.1, 0.2))
    for batch in ((), (3,), (2, 3), (0,), (2, 0)):
        position, height = find_peaks(torch.rand(*batch, 2, 1, 2), grid, 6)
        assert position.shape == (*batch, 6, 3)
        assert height.shape == (*batch, 6)
    assert find_peaks(torch.zeros(2, 1, 2), grid, 1)[1].tolist() == [0.0]


def test_bad_peak_requests_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 9, 5, 4\)"):
        find_peaks(torch.ones(9, 5, 3), GRID, 1)
    with pytest.raises(ValueError, match="n_peaks is -1"):
        find_peaks(torch.ones(*GRID.shape), GRID, -1)
    for value in (math.nan, math.inf):
        spectrum = torch.ones(*GRID.shape)
        spectrum[1, 2, 3] = value
        with pytest.raises(ValueError, match=r"spectrum holds 1 non-finite.*\(1, 2, 3\)"):
            find_peaks(spectrum, GRID, 1)


def test_trap_autocast_stays_out_of_the_spectra(device: torch.device) -> None:
    R = covariance(dtype=torch.complex64).to(device)
    plain = music_spectrum(R, GRID, 2, ARRAY), mvdr_spectrum(R, GRID, ARRAY)
    with torch.autocast(device.type, torch.bfloat16):
        cast = music_spectrum(R, GRID, 2, ARRAY), mvdr_spectrum(R, GRID, ARRAY)
    for one, two in itertools.starmap(lambda a, b: (a, b), zip(plain, cast, strict=True)):
        assert torch.equal(one, two)
