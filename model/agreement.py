"""Checks that recorded measurements contain the sources listed with them.

The true covariance stored with recorded scenes is often computed from the positions, and agrees
with them even if they are wrong. The measurements do not: with positions in degrees, a transposed
or conjugated array, or codes in degrees, the sources explain nothing of y.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from glob import escape
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.shards import DataError, ShardSplit
from model.wording import counted
from physics.fit import Measurement
from physics.geometry import PlanarArray
from physics.scaling import power
from physics.scene import SceneConfig, Scenes, SourceMode
from physics.steering import Wavefront, steering_vector

CONVENTION_SHARE = 0.999  # smallest share of R that the sources' steering vectors must explain
_SCENES = 64  # scenes examined, spread evenly over a split
# The next three are fractions of the energy that the sources should explain beyond chance.
_LEAST = 0.2  # below it the data are refused, if another reading explains them
_NOTHING = 0.05  # the same if no other reading does: even very wrong hardware leaves more
_ENOUGH = 0.45  # above it nothing is reported: hardware errors leave more (tests)
_ASSUMED = 10.0  # dB, where no SNR is known; that alone causes no error and no note
_TELLS = 0.1  # smallest share of the energy to be explained beyond chance; less is inconclusive
_ALIKE = 0.9  # fraction of the free symbols' result above which symbols count as constant
_LIKELY = 0.5  # fraction from which another reading of the data is taken to be the right one


def check_convention(splits: list[ShardSplit], per_shard: int = 4) -> None:
    """Check that array and wavefront are those that the shards' R was made with.

    Raises:
        DataError: a share of R lies outside the sources' steering vectors; it says what to set.
    """
    for split in splits:
        for start, shard in split.starts():
            with_sources = np.flatnonzero(np.asarray(shard.arrays["K"]))[:per_shard]
            if not len(with_sources):
                continue
            share = split.subspace_share(start + with_sources).min()
            if not share > CONVENTION_SHARE:
                offset = tuple(float(v) for v in split.array.offset)
                raise DataError(
                    f"{shard.path}: the sources' steering vectors explain only {float(share):.3f} "
                    f"of R (expected above {CONVENTION_SHARE}) with scene.wavefront="
                    f"{split.wavefront}, array.offset={list(offset)}, array.spacing="
                    f"{split.array.spacing:g}, array.wavelength={split.array.wavelength:g}; set "
                    "them as the data were made, with ptr in radians and metres (the origin's: "
                    "wavefront paraxial, offset [-0.075, -0.075], as in configs/origin-shards.yaml)"
                )


def check_agreement(split: ShardSplit, scene: SceneConfig) -> list[str]:
    """Check that the measurements of a split contain its sources' signals.

    Each y is fitted by the signals of its listed sources, with free amplitudes, and by those of
    another scene's sources through the same channel and codes. With noise at the recorded SNR, the
    former explain more by a known amount.

    Args:
        split: recorded scenes.
        scene: source mode and field of view.

    Returns:
        Notes for the user, one line each.

    Raises:
        DataError: the sources explain hardly more of y than another scene's would. The message
            names another reading of the data with which they would, if there is one.
    """
    chosen = np.unique(np.linspace(0, len(split) - 1, _SCENES).astype(np.int64))
    scenes = split.read(chosen)
    telling = (scenes.n_sources > 0) & (scenes.y != 0).any(-1).any(-1)
    scenes = scenes[telling.nonzero().squeeze(-1)]
    if not len(scenes):
        return []
    told = [f"{split.name}: {note}" for note in _outside(scenes, scene)]
    of = split.array, split.wavefront
    found = _agreement(scenes, *of, scene.source_mode)
    if math.isnan(found):
        return told
    if found >= _ENOUGH:
        fluctuating = scene.source_mode == "fluctuating" and scene.n_snapshots > 1
        if fluctuating and _agreement(scenes, *of, "constant") >= _ALIKE * found:
            told.append(
                f"{split.name}: the sources' symbols are the same in all snapshots; with "
                "scene.source_mode=constant more is found"
            )
        return told
    other: SourceMode = "constant" if scene.source_mode == "fluctuating" else "fluctuating"
    readings = {
        f"scene.source_mode={other}": (scenes, other),
        **{name: (read, scene.source_mode) for name, read in _readings(scenes)},
    }
    likely = [
        name for name, (read, mode) in readings.items() if _agreement(read, *of, mode) >= _LIKELY
    ]
    hint = (
        f"they would with {likely[0]}"
        if likely
        else "check the units (radians, metres), the order of the axes, the sign of the phases, "
        "array.wavelength, array.spacing, scene.source_mode and the SNR that is named"
    )
    said = (
        f"{split.folder / split.name}: the sources that ptr names explain of y, beyond what those "
        f"of other scenes do, {max(0.0, found):.2f} of what they should in {len(scenes)} scenes; "
        f"{hint}"
    )
    known = bool(torch.isfinite(scenes.snr_db).all())
    if not known and not likely:
        return told
    if found < _LEAST if likely else known and found < _NOTHING:
        raise DataError(said)
    return [*told, said]


def doubts(path: Path, scene: SceneConfig, array: PlanarArray) -> list[str]:
    """Reasons why recorded scenes may not match a network's training, one line each.

    Args:
        path: a shard or a folder of shards; other files list no sources and give no reasons.
        scene: the scene configuration of the network's training.
        array: the surface of the network.
    """
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    which = "*.npz" if path.is_dir() else escape(path.name)
    sizes = scene.n_antennas, scene.n_snapshots, scene.max_sources
    try:
        split = ShardSplit(folder.parent, folder.name, array, scene.wavefront, *sizes, which)
    except DataError:
        return []
    found = []
    for check in (lambda: check_convention([split]), lambda: check_agreement(split, scene)):
        try:
            found += check() or []
        except DataError as error:
            found.append(str(error))
    return found


def _agreement(scenes: Scenes, array: PlanarArray, wavefront: Wavefront, mode: SourceMode) -> float:
    """Energy of y that the sources explain beyond chance, over its expectation; NaN if unclear.

    They should explain the signal and the part of the noise that lies in their signals' span. The
    energy that sources of another scene explain is chance: nearly as much where all are close
    together, or where a strong path dominates the surface. An unknown SNR is taken as 10 dB.
    """
    own = _explained(scenes, array, wavefront, mode)
    order = torch.arange(len(scenes)).roll(len(scenes) // 2)
    strangers = replace(scenes, position=scenes.position[order], n_sources=scenes.n_sources[order])
    chance = _explained(strangers, array, wavefront, mode)
    ratio = 10.0 ** (torch.nan_to_num(scenes.snr_db.double(), nan=_ASSUMED) / 10.0)
    n_snapshots, n_antennas = scenes.y.shape[-2:]
    n_rows = n_antennas if mode == "fluctuating" else n_antennas * n_snapshots
    spanned = (scenes.n_sources.double() / n_rows).clamp_max(1.0)
    expected = (ratio + spanned) / (1.0 + ratio) - chance
    if len(scenes) < 2 or float(expected.mean()) < _TELLS:
        return math.nan
    return float((own - chance).mean() / expected.mean())


def _explained(
    scenes: Scenes, array: PlanarArray, wavefront: Wavefront, mode: SourceMode
) -> Tensor:
    """Share (B,) of the energy of y in the span of the sources' signals."""
    y, H, codes = (t.to(torch.complex128) for t in (scenes.y, scenes.H, scenes.codes))
    measurement = Measurement.of(y, H, codes, array, wavefront, mode)
    steering = steering_vector(scenes.position.double(), array, wavefront)
    steering = steering * scenes.present.unsqueeze(-1)
    signals = measurement.rows(steering).mT  # (B, G, R, K)
    basis, size, _ = torch.linalg.svd(signals, full_matrices=False)
    basis = basis * (size > 1e-6 * size[..., :1]).unsqueeze(-2)
    inside = power((basis.mH @ measurement.y.unsqueeze(-1)).squeeze(-1)).sum((-2, -1))
    return inside / measurement.energy


def _readings(scenes: Scenes) -> Iterator[tuple[str, Scenes]]:
    """The scenes reinterpreted as if written with each of several common mistakes."""
    angles, distance = scenes.position[..., :2], scenes.position[..., 2:]
    places = {
        "angles read as degrees (ptr holds radians)": [torch.deg2rad(angles), distance],
        "azimuth and elevation exchanged": [angles.flip(-1), distance],
        "ranges read as centimetres (ptr holds metres)": [angles, distance / 100.0],
        "ranges read as millimetres (ptr holds metres)": [angles, distance / 1000.0],
    }
    for name, parts in places.items():
        yield name, replace(scenes, position=torch.cat(parts, -1))
    for name in ("y", "H", "codes"):
        yield f"{name} conjugated", replace(scenes, **{name: getattr(scenes, name).conj()})
    if not bool(scenes.codes.imag.any()):
        turns = {"degrees": torch.deg2rad(scenes.codes.real), "radians": scenes.codes.real}
        for unit, phase in turns.items():
            codes = torch.polar(torch.ones_like(phase), phase)
            yield (
                f"codes that are no phases in {unit}, but exp(1j * phase)",
                replace(scenes, codes=codes),
            )
    if scenes.y.shape[-1] == scenes.y.shape[-2]:
        yield "the axes of y exchanged: (snapshots, antennas)", replace(scenes, y=scenes.y.mT)


def gaps(split: ShardSplit) -> Iterator[str]:
    """Yield a line if the numbers of the shards have gaps."""
    found = (re.fullmatch(r"shard_(\d+)", shard.path.stem) for shard in split.shards)
    numbers = {int(match[1]) for match in found if match}
    missing = sorted(set(range(min(numbers, default=0), max(numbers, default=0))) - numbers)
    if missing:
        names = ", ".join(f"shard_{number:03d}" for number in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        yield f"there is no {names}{more} between the others"


def _outside(scenes: Scenes, scene: SceneConfig) -> Iterator[str]:
    """Yield a line for each coordinate in which sources lie outside the searched field."""
    names = ("azimuth_deg", "elevation_deg", "range_m")
    position = scenes.position.double()
    values = torch.rad2deg(position[..., 0]), torch.rad2deg(position[..., 1]), position[..., 2]
    total = int(scenes.present.sum())
    for name, value in zip(names, values, strict=True):
        low, high = getattr(scene, name)
        slack = 1e-3 * max(abs(low), abs(high))
        away = scenes.present & ((value < low - slack) | (value > high + slack))
        if bool(away.any()):
            spread = value[scenes.present]
            yield (
                f"{int(away.sum())} of {counted(total, 'source')} that were looked at stand "
                f"outside scene.{name}=[{low:g}, {high:g}], from {float(spread.min()):.3g} to "
                f"{float(spread.max()):.3g}: nothing is looked for there"
            )
