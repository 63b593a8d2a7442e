from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from physics import PlanarArray, direction, steering_derivatives, steering_vector
from tests.physics.helpers import eps, relative_error
from tests.reference import steering as reference

ARRAYS = [
    PlanarArray(),
    PlanarArray(offset=(-0.075, -0.075)),
    PlanarArray(5, 3, spacing=0.1, wavelength=0.11, offset=(0.3, -0.2)),
    PlanarArray(1, 1),
]


def oracle(position: Tensor, array: PlanarArray) -> Tensor:
    points = reference.elements(array.n_horizontal, array.n_vertical, array.spacing, array.offset)
    rows = [
        reference.steering_vector(*p, points, array.wavelength) for p in position.double().tolist()
    ]
    return torch.from_numpy(np.stack(rows))


def draw(count: int, low: float = 0.5, high: float = 10.0, seed: int = 0) -> Tensor:
    unit = torch.rand(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    first = torch.tensor([-math.pi / 3, -math.pi / 6, low], dtype=torch.float64)
    last = torch.tensor([math.pi / 3, math.pi / 6, high], dtype=torch.float64)
    return first + (last - first) * unit


def tolerance(array: PlanarArray, position: Tensor) -> float:
    """Rounding of the largest phase k |p_n|; two units for each of a few operations."""
    reach = float(array.elements.norm(dim=-1).max()) + array.spacing
    return 8 * eps(position.dtype) * (1 + array.wavenumber * reach)


@pytest.mark.parametrize("array", ARRAYS, ids=["centred", "off-centre", "odd", "single"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_trap_one_steering_function_matches_the_exact_distance(
    array: PlanarArray, dtype: torch.dtype, device: torch.device
) -> None:
    position = draw(40).to(dtype)
    a = steering_vector(position.to(device), array)
    # The exact distance itself cancels: its oracle is good to eps of float64 times k r.
    assert (a.cpu() - oracle(position, array)).abs().max() < tolerance(array, position) + 1e-12
    assert a.dtype == dtype.to_complex()


@pytest.mark.parametrize("range_m", [0.5, 10.0, 1e6, math.inf])
def test_float32_keeps_its_digits_at_every_range(range_m: float) -> None:
    array = PlanarArray()
    position = draw(20)
    position[:, 2] = range_m
    position = position.float()
    error = (steering_vector(position, array) - oracle(position, array)).abs().max()
    # At 1e6 m the oracle's own distances cancel to 1e6 * 2^-52 m, 5e-9 rad of phase.
    assert error < tolerance(array, position)


@settings(max_examples=40)
@given(
    azimuth=st.floats(-1.5, 1.5),
    elevation=st.floats(-1.5, 1.5),
    range_m=st.floats(0.05, 1e4),
    n_horizontal=st.integers(1, 6),
    n_vertical=st.integers(1, 6),
    offset=st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
)
def test_spherical_wave_matches_the_exact_distance_anywhere(
    azimuth: float,
    elevation: float,
    range_m: float,
    n_horizontal: int,
    n_vertical: int,
    offset: tuple[float, float],
) -> None:
    array = PlanarArray(n_horizontal, n_vertical, offset=offset)
    position = torch.tensor([[azimuth, elevation, range_m]], dtype=torch.float64)
    error = (steering_vector(position, array) - oracle(position, array)).abs().max()
    # The oracle loses eps * k * r to the cancellation of its distances.
    assert error < 1e-12 + 8 * eps(position.dtype) * array.wavenumber * (range_m + 4)


@pytest.mark.parametrize("wavefront", ["spherical", "fresnel", "paraxial", "planar"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_steering_vectors_have_unit_norm(wavefront: str, dtype: torch.dtype) -> None:
    a = steering_vector(draw(30).to(dtype), PlanarArray(), wavefront)  # type: ignore[arg-type]
    assert torch.allclose(a.norm(dim=-1), torch.ones(30, dtype=dtype), atol=20 * eps(dtype))


@pytest.mark.parametrize("wavefront", ["spherical", "fresnel", "paraxial"])
def test_far_sources_send_plane_waves(wavefront: str) -> None:
    array, position = PlanarArray(), draw(10)
    planar = steering_vector(position, array, "planar")
    reach = float(array.elements.square().sum(-1).max())
    for range_m in (1e3, 1e6):
        position[:, 2] = range_m
        error = (steering_vector(position, array, wavefront) - planar).abs().max()  # type: ignore[arg-type]
        # Second-order phase: k |p|^2 / 2r, over sqrt(N).
        assert error <= array.wavenumber * reach / (2 * range_m) / math.sqrt(array.size) * 1.01
    position[:, 2] = math.inf
    assert relative_error(steering_vector(position, array, wavefront), planar) < 1e-13  # type: ignore[arg-type]


def path_error(wavefront: str, range_m: float, azimuth: float) -> float:
    """Largest path error [m] against the exact distance, from the phase."""
    array = PlanarArray(4, 4)
    position = torch.tensor([[azimuth, 0.3, range_m]], dtype=torch.float64)
    ratio = steering_vector(position, array, wavefront) * oracle(position, array).conj()  # type: ignore[arg-type]
    return float(ratio.angle().abs().max()) / array.wavenumber


def test_fresnel_error_falls_with_the_square_of_the_range_and_paraxial_with_the_range() -> None:
    for wavefront, order in (("fresnel", 2), ("paraxial", 1), ("planar", 1)):
        ratio = path_error(wavefront, 20.0, 0.7) / path_error(wavefront, 80.0, 0.7)
        assert ratio == pytest.approx(4**order, rel=0.15), wavefront


def test_paraxial_equals_fresnel_only_where_the_wave_meets_the_surface_head_on() -> None:
    array = PlanarArray()
    head_on = torch.tensor([[0.0, 0.0, 2.0]], dtype=torch.float64)
    oblique = torch.tensor([[0.8, 0.2, 2.0]], dtype=torch.float64)
    a, b = (steering_vector(head_on, array, w) for w in ("paraxial", "fresnel"))
    assert torch.allclose(a, b, atol=1e-14)
    a, b = (steering_vector(oblique, array, w) for w in ("paraxial", "fresnel"))
    assert float((a.conj() * b).sum().abs()) < 0.9


def test_near_paraxial_and_spherical_waves_overlap_by_about_a_half() -> None:
    array, position = PlanarArray(), draw(2000, 0.5, 1.0)
    paraxial = steering_vector(position, array, "paraxial")
    overlap = (paraxial.conj() * steering_vector(position, array)).sum(-1).abs()
    assert float(overlap.mean()) == pytest.approx(0.47, abs=0.03)


def test_displacement_moves_the_elements_of_each_scene() -> None:
    array = PlanarArray(3, 2)
    g = torch.Generator().manual_seed(1)
    shift = 0.02 * torch.randn(4, 1, array.size, 3, generator=g, dtype=torch.float64)
    position = draw(8).reshape(4, 2, 3)
    a = steering_vector(position, array, displacement=shift)
    for b in range(4):
        points = [tuple(p) for p in (array.elements + shift[b, 0]).tolist()]
        for k in range(2):
            expected = reference.steering_vector(*position[b, k].tolist(), points, array.wavelength)
            assert relative_error(a[b, k], torch.from_numpy(expected)) < 1e-12


def test_gradient_of_the_position_matches_finite_differences() -> None:
    position = draw(3).requires_grad_()
    array = PlanarArray(3, 3)
    assert torch.autograd.gradcheck(lambda p: steering_vector(p, array), (position,))


def test_leading_dimensions_are_free_and_may_be_empty() -> None:
    array = PlanarArray(2, 3)
    position = draw(6)
    flat = steering_vector(position, array)
    assert torch.equal(steering_vector(position.reshape(2, 3, 3), array).reshape(6, 6), flat)
    assert torch.allclose(steering_vector(position[0], array), flat[0], atol=1e-14)
    assert steering_vector(position[:0], array).shape == (0, 6)


def test_bad_shape_and_unknown_wavefront_are_refused() -> None:
    with pytest.raises(ValueError, match="azimuth"):
        steering_vector(torch.zeros(4, 2), PlanarArray())
    with pytest.raises(ValueError, match="spherical"):
        steering_vector(torch.zeros(4, 3), PlanarArray(), "cylindrical")  # type: ignore[arg-type]


def test_trap_the_origins_convention_explains_its_covariances(origin_shards: Path) -> None:
    array = PlanarArray(offset=(-0.075, -0.075))
    files = sorted(origin_shards.glob("*/shard_*.npz"))
    assert files
    for file in files:
        with np.load(file, allow_pickle=False) as shard:
            n_sources, ptr, pairs = shard["K"], shard["ptr"], shard["R"]
        R = torch.from_numpy(pairs[..., 0] + 1j * pairs[..., 1])
        position = torch.from_numpy(ptr.astype(np.float64)).reshape(-1, 3, 5).mT
        for scene, k in enumerate(n_sources.tolist()):
            explained = {}
            for name, candidate in (("origin", array), ("centred", PlanarArray())):
                q, _ = torch.linalg.qr(
                    steering_vector(position[scene, :k], candidate, "paraxial").mT
                )
                projected = q @ (q.mH @ R[scene].to(q.dtype))
                explained[name] = float(projected.norm() / R[scene].norm())
            assert explained["origin"] > 0.999
            spherical = steering_vector(position[scene, :k], array)
            assert torch.allclose(spherical.norm(dim=-1), torch.ones(k, dtype=torch.float64))


def test_direction_is_a_unit_vector() -> None:
    p = draw(50)
    assert torch.allclose(direction(p[:, 0], p[:, 1]).norm(dim=-1), torch.ones(50).double())


def test_trap_near_field_vectors_are_not_centro_symmetric() -> None:
    """Forward-backward averaging takes J a* for a; that holds for plane waves only."""
    array = PlanarArray()
    position = draw(50, 0.5, 2.0)
    planar = steering_vector(position, array, "planar")
    near = steering_vector(position, array, "spherical")
    # J reverses the element order; a unit-norm vector overlaps itself with 1.
    kept = (planar.conj() * planar.conj().flip(-1)).sum(-1).abs()
    lost = (near.conj() * near.conj().flip(-1)).sum(-1).abs()
    torch.testing.assert_close(kept, torch.ones_like(kept))
    assert float(lost.mean()) < 0.5


@pytest.mark.parametrize("wavefront", ["spherical", "fresnel", "paraxial", "planar"])
@pytest.mark.parametrize("array", ARRAYS)
def test_derivatives_match_finite_differences(array: PlanarArray, wavefront: Any) -> None:
    position = draw(20, seed=3)
    a, da = steering_derivatives(position, array, wavefront)
    assert torch.equal(a, steering_vector(position, array, wavefront))

    def moved(axis: int, step: float) -> Tensor:
        coordinates = torch.cat([position[:, :2], position[:, 2:].reciprocal()], dim=-1)
        coordinates[:, axis] += step
        return steering_vector(
            torch.cat([coordinates[:, :2], coordinates[:, 2:].reciprocal()], dim=-1),
            array,
            wavefront,
        )

    for axis in range(3):
        slope = (moved(axis, 1e-6) - moved(axis, -1e-6)) / 2e-6
        assert torch.allclose(da[:, axis], slope, atol=1e-6)


@pytest.mark.parametrize("wavefront", ["spherical", "fresnel", "paraxial", "planar"])
def test_derivatives_are_finite_at_infinite_range_and_on_an_element(wavefront: Any) -> None:
    array = PlanarArray(3, 3, spacing=0.1, wavelength=0.2)  # an element 0.1 m along x
    on_element = torch.tensor([[math.pi / 2, 0.0, 0.1], [0.2, 0.1, math.inf]], dtype=torch.float64)
    _, da = steering_derivatives(on_element, array, wavefront)
    assert torch.isfinite(torch.view_as_real(da)).all()


def test_derivatives_refuse_what_steering_vectors_refuse() -> None:
    with pytest.raises(ValueError, match="last dimension"):
        steering_derivatives(torch.zeros(2), PlanarArray())
    with pytest.raises(ValueError, match="wavefront 'flat' unknown"):
        steering_derivatives(torch.ones(1, 3), PlanarArray(), "flat")  # type: ignore[arg-type]
