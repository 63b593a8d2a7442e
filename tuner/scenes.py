"""Spectra and sources of a few held-out scenes by the winner's network, for the report."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.files import write_text
from physics.covariance import LowRankCovariance
from physics.detections import Detections
from physics.metrics import match
from physics.scene import Scenes
from physics.spectrum import PolarGrid, mvdr_spectrum

if TYPE_CHECKING:
    from model.localizer import Localizer
    from tuner.config import StudyConfig
    from tuner.folder import RunFolder

_LOOKED_AT = 64  # held-out scenes, of which the first one of each number of sources is drawn
_MOST = 6
_AZIMUTHS, _ELEVATIONS, _RANGES = 73, 37, 80
DEPTH_DB = 40.0  # depth below the peak at which a spectrum is clipped
_LEVELS = 250


def load_winner(folder: RunFolder, study: StudyConfig) -> Localizer:
    """Load the network in best/ and point it to the study's current data.

    Raises:
        CheckpointError: the network cannot be read.
    """
    from model.localizer import Localizer

    localizer = Localizer.load(folder.best)
    localizer.config = localizer.config.model_copy(update={"data": study.data})
    return localizer


def ensure_scenes(folder: RunFolder, study: StudyConfig) -> bool:
    """Write scenes.json for the network in best/ unless it is up to date.

    Args:
        folder: the run folder.
        study: its configuration, which names the recorded scenes.

    Returns:
        Whether there is a network to draw scenes with.

    Raises:
        CheckpointError, DataError: the network or the recorded scenes cannot be read.
    """
    if not (folder.best / "config.json").exists():
        return False
    fingerprint = folder.fingerprint()
    try:
        if json.loads(folder.scenes.read_text(encoding="utf-8"))["network"] == fingerprint:
            return True
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or damaged: written again
    content = {"network": fingerprint, **drawn_scenes(load_winner(folder, study))}
    write_text(folder.scenes, json.dumps(content, allow_nan=False) + "\n")
    return True


@torch.no_grad()
def drawn_scenes(localizer: Localizer) -> dict[str, Any]:
    """Return the first held-out scene of each number of sources, as plain numbers.

    Spectra are MVDR of R_blend, in steps below the scene's peak: over azimuth and elevation the
    maximum of the planes at the detected ranges (over the whole range axis if none was detected),
    and along the range in the direction of each source.

    Args:
        localizer: the network.

    Returns:
        The content of scenes.json: axes, and for each scene its sources (true and found, paired as
        in :func:`physics.metrics.match`) and spectra.
    """
    from tuner.evaluation import suite_scenes
    from tuner.suites import SUITES

    config, array = localizer.config, localizer.array
    scenes, origin = suite_scenes(config, SUITES["nominal"], array, _LOOKED_AT)
    first = {k: i for i, k in reversed(list(enumerate(scenes.n_sources.tolist())))}
    index = torch.tensor([first[k] for k in sorted(first)][:_MOST])
    chosen = scenes[index].to(localizer.device)
    found, _, blended = localizer.detect(chosen.y, chosen.H, chosen.codes, chosen.known_snr_db)
    matching = match(found, chosen.position, chosen.present)
    covering = PolarGrid.covering(config.scene, _AZIMUTHS, _ELEVATIONS, 1)
    ranges = torch.linspace(*config.scene.range_m, _RANGES, dtype=torch.float64)
    grid = replace(covering, inverse_range=tuple((1.0 / ranges).tolist()))
    views = []
    for item in range(len(chosen)):
        sources = _sources(chosen, found, matching.detection[item].tolist(), item)
        covariance = LowRankCovariance(blended.factor[item], blended.loading[item])
        planes = [1.0 / s["found"][2] for s in sources if s["found"]] or grid.inverse_range[::8]
        directions = replace(grid, inverse_range=tuple(planes))
        # First the spectrum with one row per elevation, then one along the range per source.
        heights = [mvdr_spectrum(covariance, directions, array, config.scene.wavefront).amax(-1).mT]
        for source in sources:
            azimuth, elevation, _ = source["true"] or source["found"]
            ray = PolarGrid(
                (math.radians(azimuth),), (math.radians(elevation),), grid.inverse_range
            )
            height = mvdr_spectrum(covariance, ray, array, config.scene.wavefront)
            heights.append(height.flatten())
        peak = torch.stack([height.amax() for height in heights]).amax()
        level = float(chosen.known_snr_db[item])
        views.append(
            {
                "scene": int(index[item]),
                "snr_db": round(level, 1) if math.isfinite(level) else None,
                "sources": sources,
                "spectrum": _steps(heights[0], peak),
                "along_range": [_steps(height, peak) for height in heights[1:]],
            }
        )
    return {
        "origin": origin,
        "db_per_step": DEPTH_DB / _LEVELS,
        "azimuth_deg": [round(math.degrees(a), 2) for a in grid.azimuth],
        "elevation_deg": [round(math.degrees(e), 2) for e in grid.elevation],
        "range_m": [round(1.0 / q, 4) for q in grid.inverse_range],
        "views": views,
    }


def _sources(
    scenes: Scenes, found: Detections, detection: list[int], item: int
) -> list[dict[str, Any]]:
    """Return true sources with their hits, then false detections: degrees, degrees, metres."""
    truth = scenes.position[item].tolist()
    where, present = found.position[item].tolist(), found.present[item].tolist()
    rows: list[dict[str, Any]] = []
    for slot in range(int(scenes.n_sources[item])):
        hit = detection[slot]
        rows.append({"true": _degrees(truth[slot])} | _detection(found, where, item, hit))
    taken = set(detection)
    rows += [
        {"true": None} | _detection(found, where, item, slot)
        for slot, there in enumerate(present)
        if there and slot not in taken
    ]
    return rows


def _detection(found: Detections, where: list[list[float]], item: int, slot: int) -> dict[str, Any]:
    """Return a detection with the standard deviation [m] of its range, or None values."""
    if slot < 0:
        return {"found": None, "range_std_m": None}
    std = None
    if found.covariance is not None:
        variance = float(found.covariance[item, slot, 2, 2])
        std = round(math.sqrt(variance), 4) if 0 < variance < math.inf else None
    return {"found": _degrees(where[slot]), "range_std_m": std}


def _degrees(position: list[float]) -> list[float]:
    azimuth, elevation, distance = position
    return [round(math.degrees(azimuth), 3), round(math.degrees(elevation), 3), round(distance, 4)]


def _steps(spectrum: Tensor, peak: Tensor) -> Any:
    """Return integer steps below the peak, at most ``_LEVELS``."""
    below = 10.0 * torch.log10(peak / spectrum.double())
    return (below * (_LEVELS / DEPTH_DB)).round().clamp(0, _LEVELS).int().tolist()
