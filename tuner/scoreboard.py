"""Scores estimators on the same scenes."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.localizer import Localizer
from physics.baselines import music, mvdr
from physics.bootstrap import f1_interval
from physics.bounds import scene_crb
from physics.covariance import LowRankCovariance, nmse, sample_covariance, source_covariance
from physics.detections import Detections
from physics.geometry import PlanarArray
from physics.metrics import (
    Matching,
    count_confusion,
    coverage,
    crb_gated,
    errors,
    gated_recall,
    gospa,
    match,
    median_normalized_error,
    normalized_errors,
    subspace_error,
)
from physics.nomp import NompConfig, NompResult, nomp, polish
from physics.scaling import divisor
from physics.scene import SceneConfig, Scenes
from physics.somp import somp
from physics.spectrum import PolarGrid
from physics.steering import steering_vector
from physics.tikhonov import TikhonovConfig

BATCH = 64
COVERAGE = (0.5, 0.9, 0.95)
RANGE_EDGES = (0.0, 2.0, 4.0, 6.0, 8.0, math.inf)
SNR_STEP = 5.0
REFERENCE = "nomp"
# A grid three times finer than a beam, with eight times as many points evaluated exactly.
DENSE = NompConfig(oversampling=3.0, candidates=1000)

Estimate = tuple[Detections, LowRankCovariance | None]


@dataclass(frozen=True)
class Estimator:
    """A method that finds sources in a batch of scenes."""

    name: str
    note: str
    run: Callable[[Scenes], Estimate]


@dataclass(frozen=True)
class Truth:
    """Scenes, and the true steering vectors and bounds of their sources."""

    scenes: Scenes
    steering: Tensor  # (S, K, N) of the model that generated the scenes
    crb_std: Tensor  # (S, K, 3) [rad, rad, m]; inf without a source
    gated: Tensor  # (S, K) bool: sources whose bound is within 2.5 degrees, 2.5 degrees, 0.5 m

    @classmethod
    def of(cls, scenes: Scenes, array: PlanarArray, config: SceneConfig) -> Truth:
        """Compute the bounds at the true positions, with the model that generated the scenes."""
        bound = scene_crb(scenes, array, config.wavefront, config.source_mode)
        std = bound.diagonal(dim1=-2, dim2=-1).sqrt()
        steering = steering_vector(scenes.position, array, config.wavefront)
        return cls(scenes, steering, std, crb_gated(std) & scenes.present)


@dataclass(frozen=True)
class Score:
    """One estimator's result on all scenes."""

    name: str
    note: str
    scenes_per_second: float
    found: Detections
    matching: Matching
    gospa: Tensor  # (S,) [m]
    error: Tensor  # (S, K, 3) of the hits, NaN elsewhere
    nmse: Tensor | None  # (S,) of the covariance, where the estimator gives one
    subspace: Tensor | None  # (S,)


def classical_estimators(
    array: PlanarArray, scene: SceneConfig, tikhonov: TikhonovConfig, *, snr_known: bool
) -> list[Estimator]:
    """Return MUSIC and MVDR on R_samp (told K), SOMP (told nothing) and NOMP (told the SNR).

    Where the noise is estimated, the part of a source that a grid or a wrong model misses counts as
    noise: SOMP is not given the SNR, and ``nomp-blind`` is NOMP without it. ``nomp-dense``
    evaluates more grid points before it selects one, which finds more sources and takes longer.
    """
    grid = PolarGrid.covering(scene)

    def spectral(method: Callable[..., Detections]) -> Callable[[Scenes], Estimate]:
        def run(scenes: Scenes) -> Estimate:
            R = sample_covariance(
                scenes.y, scenes.H, scenes.codes, tikhonov.regularization, tikhonov.solver
            )
            counts = scenes.n_sources
            most = max(1, int(counts.max()))
            return method(R, array, scene.wavefront, grid, counts, max_sources=most), R

        return run

    def on_a_grid(scenes: Scenes) -> Estimate:
        result = somp(scenes.y, scenes.H, scenes.codes, array=array, scene=scene)
        return _with_covariance(result, array, scene)

    def pursuit(config: NompConfig, *, told: bool) -> Callable[[Scenes], Estimate]:
        def run(scenes: Scenes) -> Estimate:
            measured = scenes.y, scenes.H, scenes.codes
            snr_db = scenes.known_snr_db if told else None
            result = nomp(*measured, array=array, scene=scene, snr_db=snr_db, config=config)
            return _with_covariance(result, array, scene)

        return run

    plain = NompConfig()
    criterion = plain.criterion.upper()
    every = [
        Estimator("somp", f"SOMP on a grid, K by {criterion}", on_a_grid),
        Estimator(REFERENCE, f"NOMP, K by {criterion}", pursuit(plain, told=snr_known)),
        Estimator(
            "nomp-dense",
            f"NOMP on a denser grid, K by {criterion}",
            pursuit(DENSE, told=snr_known),
        ),
    ]
    if snr_known:
        blind = pursuit(plain, told=False)
        every.append(Estimator("nomp-blind", f"NOMP, K by {criterion}, told no SNR", blind))
    if array.size > scene.max_sources:  # otherwise there is no noise subspace
        every = [
            Estimator("music", "MUSIC on R_samp, K told", spectral(music)),
            Estimator("mvdr", "MVDR on R_samp, K told", spectral(mvdr)),
            *every,
        ]
    return every


def network_estimators(
    localizer: Localizer, array: PlanarArray, scene: SceneConfig, *, snr_known: bool
) -> list[Estimator]:
    """Return the network as trained, and with its positions refined by maximum likelihood.

    Args:
        localizer: the network.
        array, scene: the model that the refinement assumes.
        snr_known: whether both are given the SNR.
    """

    def network(scenes: Scenes) -> Estimate:
        snr_db = scenes.known_snr_db if snr_known else None
        found, prediction, _ = localizer.detect(scenes.y, scenes.H, scenes.codes, snr_db)
        return found, prediction.covariance

    def refined(scenes: Scenes) -> Estimate:
        found, _ = network(scenes)
        snr_db = scenes.known_snr_db if snr_known else None
        result = polish(
            scenes.y, scenes.H, scenes.codes, found, array=array, scene=scene, snr_db=snr_db
        )
        return _with_covariance(result, array, scene)

    sizes = localizer.config.network
    every = [Estimator("network", sizes.method, network)]
    if sizes.front_end is None:  # candidates of matching pursuit are already refined
        note = "its positions, refined by maximum likelihood"
        every.append(Estimator("network+refinement", note, refined))
    return every


def _with_covariance(result: NompResult, array: PlanarArray, scene: SceneConfig) -> Estimate:
    amplitude = result.amplitude.abs()
    amplitude = amplitude / divisor(amplitude.amax((1, 2)))[:, None, None]  # the scale is free
    power = amplitude.square().mean(1)
    a = steering_vector(result.detections.position, array, scene.wavefront)
    return result.detections, source_covariance(a, power * result.detections.present)


def score(
    estimator: Estimator,
    truth: Truth,
    advance: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Score:
    """Run an estimator on all scenes, batch by batch, and compare it with the truth.

    The first batch is run once before timing starts. `advance` is called with the estimator's name,
    the number of scenes done, and their total.
    """
    scenes = truth.scenes
    batches = [slice(i, i + BATCH) for i in range(0, len(scenes), BATCH)]
    advance(estimator.name, 0, len(scenes))
    estimator.run(scenes[batches[0]])
    found: list[Detections] = []
    error: list[Tensor] = []
    subspace: list[Tensor] = []
    seconds = 0.0
    for index in batches:
        batch = scenes[index]
        _synchronize(batch.y)
        start = time.perf_counter()
        detections, covariance = estimator.run(batch)
        _synchronize(batch.y)
        seconds += time.perf_counter() - start
        found.append(detections)
        if covariance is not None:
            true = source_covariance(truth.steering[index], batch.power)
            error.append(nmse(covariance, true).double())
            subspace.append(
                subspace_error(covariance, truth.steering[index], batch.present).double()
            )
        advance(estimator.name, min(index.stop, len(scenes)), len(scenes))
    detections = Detections.concatenate(found)
    matching = match(detections, scenes.position, scenes.present)
    return Score(
        estimator.name,
        estimator.note,
        len(scenes) / seconds,
        detections,
        matching,
        gospa(detections, scenes.position, scenes.present).total.double(),
        errors(detections, matching, scenes.position),
        torch.cat(error) if error else None,
        torch.cat(subspace) if subspace else None,
    )


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def summary(score: Score, truth: Truth, chosen: Tensor | None = None) -> dict[str, Any]:
    """Return an estimator's measures on chosen scenes (S,) bool; None where undefined."""
    if chosen is None:
        chosen = torch.ones(len(truth.scenes), dtype=torch.bool, device=truth.gated.device)
    matching = score.matching[chosen]
    present, gated = truth.scenes.present[chosen], truth.gated[chosen]
    if not len(matching):
        return {"scenes": 0}
    error, std = score.error[chosen], truth.crb_std[chosen]
    low, high = f1_interval(matching)
    ratio = median_normalized_error(error, std, gated)
    content: dict[str, Any] = {
        "scenes": len(matching),
        "sources": int(present.sum()),
        "f1": matching.f1,
        "f1_interval": [low, high],
        "precision": matching.precision,
        "recall": matching.recall,
        "gated_sources": int(gated.sum()),
        "gated_recall": gated_recall(matching, gated, present),
        "gospa_m": float(score.gospa[chosen].mean()),
        "count_accuracy": matching.count_accuracy,
        "all_found": matching.all_found,
        "median_error_over_crb": pooled_median(error, std, gated),
        "median_error_over_crb_azimuth": float(ratio[0]),
        "median_error_over_crb_elevation": float(ratio[1]),
        "median_error_over_crb_range": float(ratio[2]),
    }
    if score.nmse is not None and score.subspace is not None:
        content["nmse"] = float(score.nmse[chosen].mean())
        content["subspace_error"] = float(score.subspace[chosen].mean())
    if score.found.covariance is not None:
        found = score.found[chosen]
        share = coverage(found, matching, truth.scenes.position[chosen], COVERAGE)
        content["coverage"] = dict(
            zip((f"{level:g}" for level in COVERAGE), share.tolist(), strict=True)
        )
    return _without_nan(content)


def pooled_median(error: Tensor, std: Tensor, mask: Tensor) -> float:
    """Return the median |error| / CRB over azimuth, elevation and range of the hits in a mask."""
    values = normalized_errors(error, std)[mask]
    values = values[torch.isfinite(values)]
    return float(values.quantile(0.5)) if len(values) else math.nan


def by_range(score: Score, truth: Truth) -> list[dict[str, Any]]:
    """Return the recall of the sources in each band of true range."""
    distance = truth.scenes.position[..., 2]
    rows = []
    for low, high in itertools.pairwise(RANGE_EDGES):
        here = truth.scenes.present & (distance >= low) & (distance < high)
        gated = here & truth.gated
        rows.append(
            _without_nan(
                {
                    "low_m": low,
                    "high_m": high if math.isfinite(high) else None,
                    "sources": int(here.sum()),
                    "recall": float(score.matching.hit[here].double().mean()),
                    "gated_sources": int(gated.sum()),
                    "gated_recall": float(score.matching.hit[gated].double().mean()),
                    "median_error_over_crb": pooled_median(score.error, truth.crb_std, gated),
                }
            )
        )
    return rows


def snr_bands(truth: Truth) -> list[tuple[float, float]]:
    """Return 5 dB bands that cover all scenes with known SNR; empty if there are none."""
    level = truth.scenes.snr_db
    level = level[torch.isfinite(level)]
    if not len(level):
        return []
    low = SNR_STEP * math.floor(float(level.min()) / SNR_STEP)
    high = SNR_STEP * math.ceil(float(level.max()) / SNR_STEP)
    count = max(1, round((high - low) / SNR_STEP))
    return [(low + i * SNR_STEP, low + (i + 1) * SNR_STEP) for i in range(count)]


def in_band(truth: Truth, band: tuple[float, float], *, last: bool) -> Tensor:
    """Return the scenes (S,) bool whose SNR is in a band; the last band includes its upper end."""
    level = truth.scenes.snr_db
    return (level >= band[0]) & ((level <= band[1]) if last else (level < band[1]))


def full_report(score: Score, truth: Truth) -> dict[str, Any]:
    """Return the JSON content for one estimator."""
    bands, counts = snr_bands(truth), truth.scenes.n_sources
    largest = int(max(counts.max(), score.matching.n_found.max()))
    return {
        "note": score.note,
        "scenes_per_second": score.scenes_per_second,
        "overall": summary(score, truth),
        "by_snr": [
            {"low_db": band[0], "high_db": band[1]}
            | summary(score, truth, in_band(truth, band, last=band == bands[-1]))
            for band in bands
        ],
        "by_k": [
            {"n_sources": k} | summary(score, truth, counts == k) for k in counts.unique().tolist()
        ],
        "by_range": by_range(score, truth),
        "confusion": count_confusion(counts, score.matching.n_found, largest).tolist(),
    }


def _without_nan(content: dict[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {k: plain(v) for k, v in content.items()}
