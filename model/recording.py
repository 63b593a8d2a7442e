"""Writes scenes as shards, in the format of :mod:`model.shards`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.faults import Sizes, first_fault
from model.files import replacing
from model.shards import GAIN, SPLITS
from physics.covariance import LowRankCovariance, sample_covariance
from physics.geometry import PlanarArray
from physics.scene import Scenes
from physics.steering import Wavefront


def write_shards(
    folder: Path,
    name: str,
    scenes: Scenes,
    array: PlanarArray,
    wavefront: Wavefront,
    *,
    shard_size: int = 1000,
) -> list[Path]:
    """Write scenes as shards in the origin's format.

    Args:
        folder: data folder; the split's folder is created in it.
        name: ``train``, ``val`` or ``test``.
        scenes: what to write.
        array: the surface of the true covariance R.
        wavefront: its steering model.
        shard_size: scenes per file.

    Returns:
        The files written.

    Raises:
        ValueError: an unknown split, a shard size below 1, or scenes with a tensor of another shape
            or dtype or with invalid values; nothing is written then.
        FileExistsError: the split already holds shards.
    """
    if name not in SPLITS:
        raise ValueError(f"split {name!r} unknown; choose from {SPLITS}")
    if shard_size < 1:
        raise ValueError(f"shard_size is {shard_size}; at least 1 needed")
    scenes = _checked(scenes, array)
    split = folder / name
    split.mkdir(parents=True, exist_ok=True)
    if any(split.glob("*.npz")):
        raise FileExistsError(f"{split} already holds shards; write to an empty folder")
    paths = []
    for number, start in enumerate(range(0, len(scenes), shard_size)):
        part = scenes[slice(start, start + shard_size)].to("cpu")
        points = torch.where(part.present.unsqueeze(-1), part.position, 0.0)
        path = split / f"shard_{number:03d}.npz"
        with replacing(path) as fresh, fresh.open("wb") as stream:
            np.savez(
                stream,
                y=_pairs(part.y * GAIN),
                H=_pairs(part.codes @ part.H.mT),
                H_full=_pairs(part.H),
                codes=_pairs(part.codes),
                ptr=points.mT.flatten(1).float().numpy(),
                K=part.n_sources.to(torch.int32).numpy(),
                snr=part.snr_db.float().numpy(),
                R=_pairs(_dense(part.covariance(array, wavefront), part)),
                R_samp=_pairs(sample_covariance(part.y, part.H, part.codes).dense()),
            )
        paths.append(path)
    return paths


def _checked(scenes: Scenes, array: PlanarArray) -> Scenes:
    """Validate scenes and convert them to single precision, as they are written.

    Raises:
        ValueError: the scenes are invalid.
    """
    single = {}
    for name, value in vars(scenes).items():
        if value.is_complex():
            single[name] = value.to(torch.complex64)
        elif value.is_floating_point():
            single[name] = value.float()
        elif name == "n_sources":
            single[name] = value.long()
    scenes = replace(scenes, **single)
    if scenes.y.ndim != 3 or scenes.position.ndim != 3:
        raise ValueError(
            f"write_shards got y of shape {tuple(scenes.y.shape)} and position of shape "
            f"{tuple(scenes.position.shape)}; expected (B, L, M) and (B, K, 3)"
        )
    n_scenes, n_snapshots, n_antennas = scenes.y.shape
    sizes = Sizes(n_scenes, n_snapshots, n_antennas, array.size, scenes.position.shape[1])
    fault = first_fault(replace(scenes, y=scenes.y * GAIN), sizes)
    if fault is not None:
        raise ValueError(
            f"write_shards got {fault}; (B, L, M, N, K) are {tuple(sizes)} of y, array and position"
        )
    return scenes


def _dense(covariance: LowRankCovariance, scenes: Scenes) -> Tensor:
    """R (n, N, N), zero for scenes without sources, as the format requires."""
    return covariance.dense() * (scenes.n_sources > 0)[:, None, None]


def _pairs(value: Tensor) -> NDArray[np.float32]:
    return torch.view_as_real(value.resolve_conj().to(torch.complex64)).numpy()
