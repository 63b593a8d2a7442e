"""Draws and measures that the tests of physics share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from physics.covariance import LowRankCovariance
from physics.detections import Detections
from tests.reference import covariance as reference_covariance

# For each scene a list of (az deg, el deg, range m).
Places = list[list[tuple[float, float, float]]]


def eps(dtype: torch.dtype) -> float:
    """Rounding unit of the dtype's real part."""
    return float(torch.finfo(dtype.to_real()).eps)


def complex_normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex128) -> Tensor:
    """Circular normal draws of unit variance."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit_codes(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex128) -> Tensor:
    """Codes of unit modulus and uniform phase."""
    return torch.polar(
        torch.ones(shape, dtype=dtype.to_real()),
        torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype.to_real())
        * (2 * torch.pi),
    )


def relative_error(value: Tensor, reference: Any) -> float:
    """||value - reference|| / ||reference|| in complex128; 0 where both are zero."""
    reference = torch.as_tensor(reference, dtype=torch.complex128)
    error = torch.linalg.vector_norm(value.detach().cpu().to(torch.complex128) - reference)
    norm = torch.linalg.vector_norm(reference)
    return float(error / norm) if norm > 0 else float(error)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation's output held."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // 8)
        return result


def padded(scenes: Places, filler: float, dtype: torch.dtype, n_slots: int | None = None) -> Any:
    """Positions (B, n, 3) [rad, rad, m] and presence; the slots left over hold ``filler``."""
    width = max([len(s) for s in scenes], default=0) if n_slots is None else n_slots
    position = torch.full((len(scenes), width, 3), filler, dtype=dtype)
    present = torch.zeros(len(scenes), width, dtype=torch.bool)
    for b, scene in enumerate(scenes):
        for k, (azimuth, elevation, r) in enumerate(scene):
            place = [math.radians(azimuth), math.radians(elevation), r]
            position[b, k] = torch.tensor(place, dtype=torch.float64).to(dtype)
            present[b, k] = True
    return position, present


def truth(*scenes: list[tuple[float, float, float]], dtype: torch.dtype = torch.float64) -> Any:
    """Position and presence; an absent slot's NaN must not matter."""
    return padded(list(scenes), math.nan, dtype)


def found(
    *scenes: list[tuple[float, float, float]], dtype: torch.dtype = torch.float64
) -> Detections:
    """Detections; absent slots lie on (0, 0, 0)."""
    return Detections(*padded(list(scenes), 0.0, dtype))


def three_scenes() -> tuple[Detections, Tensor, Tensor]:
    """2 true, 2 found, 1 hit; 1 true, 3 found, 1 hit; nothing and nothing."""
    position, present = truth([(0, 0, 3), (30, 0, 3)], [(0, 0, 3)], [])
    detections = found([(1, 0, 3), (60, 0, 3)], [(-50, 0, 3), (0, 1, 3), (50, 0, 3)], [])
    return detections, position, present


def covariance(
    B: int = 3,
    N: int = 7,
    r: int = 3,
    *,
    loading: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.complex128,
) -> LowRankCovariance:
    factor = complex_normal(B, N, r, seed=seed, dtype=dtype)
    level = None if loading is None else torch.full((B,), loading, dtype=dtype.to_real())
    return LowRankCovariance(factor, level)


def dense(R: LowRankCovariance) -> list[reference_covariance.Complex]:
    """The oracle's N x N matrices, from factor and loading."""
    return [
        reference_covariance.dense(f.detach().cpu().numpy(), float(d))
        for f, d in zip(R.factor, R.loading, strict=True)
    ]


def assert_equals(R: LowRankCovariance, matrices: list[Any], tolerance: float) -> None:
    for value, matrix in zip(R.dense(), matrices, strict=True):
        assert relative_error(value, torch.from_numpy(matrix)) < tolerance
