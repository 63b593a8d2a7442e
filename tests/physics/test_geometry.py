from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from physics import ArrayConfig, PlanarArray, direction, from_cartesian, to_cartesian
from physics.geometry import elements_on
from tests.reference import steering as reference


@pytest.mark.parametrize("offset", [(0.0, 0.0), (-0.075, -0.075), (0.4, -1.0)])
def test_elements_are_centred_on_the_offset_with_the_horizontal_index_fastest(
    offset: tuple[float, float],
) -> None:
    array = PlanarArray(5, 3, spacing=0.2, offset=offset)
    expected = torch.tensor(reference.elements(5, 3, 0.2, offset), dtype=torch.float64)
    assert torch.allclose(array.elements, expected, atol=1e-15)
    assert torch.allclose(array.elements[:, :2].mean(0), torch.tensor(offset, dtype=torch.float64))
    assert array.size == 15


def test_boresight_is_z_azimuth_turns_to_x_and_elevation_to_y() -> None:
    zero, quarter = torch.tensor(0.0), torch.tensor(math.pi / 2)
    assert torch.allclose(direction(zero, zero), torch.tensor([0.0, 0.0, 1.0]))
    assert torch.allclose(direction(quarter, zero), torch.tensor([1.0, 0.0, 0.0]), atol=1e-7)
    assert torch.allclose(direction(zero, quarter), torch.tensor([0.0, 1.0, 0.0]), atol=1e-7)


def test_cartesian_coordinates_come_back_in_the_front_half_space() -> None:
    g = torch.Generator().manual_seed(0)
    position = torch.rand(200, 3, generator=g, dtype=torch.float64)
    position = (position - torch.tensor([0.5, 0.5, 0.0])) * torch.tensor([3.1, 3.1, 10.0])
    assert torch.allclose(from_cartesian(to_cartesian(position)), position, atol=1e-12)
    expected = torch.tensor([reference.cartesian(*p) for p in position.tolist()])
    assert torch.allclose(to_cartesian(position).float(), expected, atol=1e-5)


@pytest.mark.parametrize(
    "bad",
    [
        {"n_horizontal": 0},
        {"spacing": 0.0},
        {"wavelength": -1.0},
        {"offset": (math.nan, 0.0)},
        {"spacings": 0.1},
    ],
)
def test_bad_array_configuration_is_refused_by_name(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        ArrayConfig.model_validate(bad)


@pytest.mark.parametrize("bad", [{"n_vertical": 0}, {"spacing": -0.1}, {"wavelength": 0.0}])
def test_bad_array_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"array has|must be positive"):
        PlanarArray(**bad)  # type: ignore[arg-type]


def test_configuration_builds_the_array_it_describes() -> None:
    config = ArrayConfig(n_horizontal=3, n_vertical=4, spacing=0.1, offset=(0.5, 0.0))
    assert config.build() == PlanarArray(3, 4, spacing=0.1, offset=(0.5, 0.0))


def test_elements_first_asked_for_in_inference_mode_serve_gradients_later() -> None:
    from physics import steering_vector

    array = PlanarArray(3, 4)
    with torch.inference_mode():
        assert array.elements.shape == (12, 3)
        steering_vector(torch.ones(1, 3, dtype=torch.float64), array)
    position = torch.tensor([[0.1, 0.2, 3.0]], dtype=torch.float64, requires_grad=True)
    steering_vector(position, array).real.sum().backward()
    assert position.grad is not None
    assert torch.isfinite(position.grad).all()


def test_elements_are_brought_to_a_device_once() -> None:
    host = torch.device("cpu")
    brought = elements_on(PlanarArray(3, 4), host, torch.float32)
    assert elements_on(PlanarArray(3, 4), host, torch.float32) is brought
    assert torch.equal(brought.double(), PlanarArray(3, 4).elements.float().double())
    assert not torch.equal(elements_on(PlanarArray(4, 3), host, torch.float32), brought)
    listed = PlanarArray(3, 4, offset=[0.0, 0.0])  # type: ignore[arg-type]  # as YAML has it
    assert elements_on(listed, host, torch.float32) is brought
