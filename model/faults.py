"""Validation of externally produced scenes: shapes, dtypes and values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from physics.scene import Scenes


class Sizes(NamedTuple):
    """Expected sizes of scenes."""

    n_scenes: int
    n_snapshots: int
    n_antennas: int
    n_elements: int
    max_sources: int


def first_fault(scenes: Scenes, sizes: Sizes, *, values: bool = True) -> str | None:
    """Describe the first fault of scenes, as a phrase to follow "made" or "got"; None if valid.

    Args:
        scenes: of any shapes and dtypes.
        sizes: the expected sizes.
        values: also check the values, which waits once for the scenes' device.
    """
    B, L, M, N, K = sizes
    expected = {
        "y": ("complex", (B, L, M)),
        "H": ("complex", (B, M, N)),
        "codes": ("complex", (B, L, N)),
        "position": ("real", (B, K, 3)),
        "power": ("real", (B, K)),
        "n_sources": ("integer", (B,)),
        "snr_db": ("real", (B,)),
    }
    for name, (kind, shape) in expected.items():
        tensor = getattr(scenes, name)
        found = tuple(tensor.shape)
        if found != shape:
            return f"{name} of shape {found}; expected {shape}"
        if _kind(tensor) != kind:
            return f"{name} of {tensor.dtype}; expected {kind} values"
    if not values:
        return None
    present, n_sources = scenes.present, scenes.n_sources
    ranges = scenes.position[..., 2]
    faults = {
        f"{name} with NaN or Inf": ~torch.isfinite(getattr(scenes, name)).flatten(1).all(-1)
        for name in ("y", "H", "codes", "position", "power")
    } | {
        f"n_sources outside 0..{K} (scene.max_sources)": (n_sources < 0) | (n_sources > K),
        "a source whose range is not above 0 m": (present & (ranges <= 0)).any(-1),
        "a power below 0, or above it in a slot without a source": (
            (scenes.power < 0) | (~present & (scenes.power != 0))
        ).any(-1),
        "snr_db of Inf (NaN says that it is not known)": torch.isinf(scenes.snr_db),
    }
    counts = torch.stack([bad.sum() for bad in faults.values()]).tolist()
    for (what, bad), count in zip(faults.items(), counts, strict=True):
        if count:
            return f"{what} in {count} of {B} scenes, first in scene {int(bad.nonzero()[0])}"
    return None


def _kind(tensor: Tensor) -> str:
    if tensor.is_complex():
        return "complex"
    if tensor.is_floating_point():
        return "real"
    return "other" if tensor.dtype == torch.bool else "integer"
