"""MUSIC and MVDR: spectra in factored form against N x N matrices, and coarse-to-fine search.

    python -m benchmarks.spectra [--json FILE]

R_samp of rank 16 (N=144, K of 1 to 5, complex64) on a grid of 121 x 61 x 16 points of the exact
spherical wavefront, on the CPU. The dense form uses fewer scenes, so that it finishes in time.
Prints scenes per second with their targets; a missed target does not change the exit status.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks._timing import alternate, median_ratio, parser, peak_bytes, save, verdict
from physics import (
    LowRankCovariance,
    PlanarArray,
    PolarGrid,
    SceneConfig,
    Scenes,
    music_spectrum,
    mvdr_spectrum,
    sample_covariance,
    simulate,
    steering_vector,
)
from physics.baselines import bounds_of, highest_peaks, local_maxima, music, mvdr
from physics.detections import Detections
from physics.fit import position_of
from physics.scene import SourceMode
from physics.search import SpectralForm, climb, music_form, mvdr_form

B, B_DENSE, ARRAY, LOADING = 64, 2, PlanarArray(), 1e-2
GRID = PolarGrid.covering(SceneConfig(), 121, 61, 16)
TARGET = {"MUSIC": 50.0, "MVDR": 20.0}
ALL = 100  # local maxima per scene, taken as all of them
SAME = 0.95  # |a^H b|^2 above which two searches found the same peak


def measured(n_scenes: int, mode: SourceMode) -> tuple[LowRankCovariance, Scenes]:
    """R_samp of simulated scenes."""
    g = torch.Generator().manual_seed(0)
    scenes = simulate(n_scenes, SceneConfig(source_mode=mode), ARRAY, generator=g)
    return sample_covariance(scenes.y, scenes.H, scenes.codes), scenes


def dense_music(matrix: Tensor, a: Tensor, n_sources: Tensor) -> list[Tensor]:
    """1 / ||U_n^H a||^2 with the noise subspace (N, N - K) of each scene."""
    _, vectors = torch.linalg.eigh(matrix)
    return [
        1.0 / (a.conj() @ v[:, : v.shape[0] - int(k)]).abs().square().sum(-1)
        for v, k in zip(vectors, n_sources, strict=True)
    ]


def dense_mvdr(matrix: Tensor, a: Tensor) -> list[Tensor]:
    """1 / (a^H R^-1 a) with the inverse (N, N) of each scene."""
    inverse = torch.linalg.inv(matrix + LOADING * torch.eye(matrix.shape[-1]))
    return [1.0 / ((a.conj() @ m) * a).sum(-1).real for m in inverse]


def agreement(mode: SourceMode) -> dict[str, dict[str, float]]:
    """Shares of the K highest peaks of the full grid that each search found.

    The peaks are all local maxima of the full grid, moved to the maxima of the spectrum: parabolas
    and cells alone give some maxima twice and miss others.
    """
    shares = {}
    R, scenes = measured(B, mode)
    counts = scenes.n_sources
    forms = {"MUSIC": music_form(R, counts), "MVDR": mvdr_form(R, LOADING)}
    for (name, form), estimate in zip(forms.items(), (music, mvdr), strict=True):
        energy = form.energy(GRID.steering(ARRAY)).unflatten(-1, GRID.shape)
        start, found = local_maxima(energy, GRID, ALL)
        top, energy = climb(form, start, bounds_of(GRID).to(start), ARRAY, n_steps=30)
        height = torch.where(found, form.height(energy), 0.0)
        tops = highest_peaks(
            position_of(top), height, counts, ARRAY, "spherical", int(counts.max())
        )
        full, quick = (
            estimate(R, ARRAY, "spherical", GRID, counts, search=search)
            for search in ("grid", "coarse-to-fine")
        )
        same = overlap(full, quick)
        higher = height_of(form, quick).unsqueeze(1) >= height_of(form, full).unsqueeze(2) * (
            1 - 1e-6
        )
        matched = same.any(-1)
        shares[name] = {
            "coarse-to-fine": float(overlap(tops, quick).any(-1)[tops.present].float().mean()),
            "grid": float(overlap(tops, full).any(-1)[tops.present].float().mean()),
            "as_high": float((same & higher).any(-1)[matched].float().mean()),
        }
    return shares


def overlap(one: Detections, other: Detections) -> Tensor:
    """Which pairs of detections (B, P, P) are the same peak."""
    a, b = (steering_vector(d.position, ARRAY) for d in (one, other))
    close = (a @ b.mH).abs().square() > SAME
    return close & one.present.unsqueeze(2) & other.present.unsqueeze(1)


def height_of(form: SpectralForm, found: Detections) -> Tensor:
    """Values (B, P) of the spectrum at detections."""
    seen = steering_vector(found.position, ARRAY) @ form.rows.mT
    return form.height(seen.abs().square().sum(-1))


def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    # A call takes seconds: three rounds of the five alternating calls take half a minute.
    rounds = min(arguments.rounds, 3)
    R, scenes = measured(B, "fluctuating")
    few = R.normalized().dense()[:B_DENSE]
    counts = scenes.n_sources
    a = GRID.steering(ARRAY)
    calls: dict[str, Callable[[], object]] = {
        "MUSIC": partial(music_spectrum, R, GRID, counts, ARRAY),
        "MVDR": partial(mvdr_spectrum, R, GRID, ARRAY, loading=LOADING),
        "dense MUSIC": partial(dense_music, few, a, counts[:B_DENSE]),
        "dense MVDR": partial(dense_mvdr, few, a),
        "MUSIC search": partial(music, R, ARRAY, "spherical", GRID, counts),
        "MVDR search": partial(mvdr, R, ARRAY, "spherical", GRID, counts),
    }
    print(
        f"B={B} ({B_DENSE} dense) N={ARRAY.size} rank={R.rank} grid {GRID.shape} = {len(a)} points "
        f"complex64, {arguments.threads} threads, {rounds} rounds"
    )
    seconds = alternate(calls, rounds)
    rate = {
        name: (B_DENSE if name.startswith("dense") else B) / statistics.median(times)
        for name, times in seconds.items()
    }
    figures: dict[str, Any] = {"scenes_per_second": rate}
    result_mb = B * len(a) * 4 / 1e6
    for name, target in TARGET.items():
        ratio = median_ratio(seconds[f"dense {name}"], seconds[name]) * B / B_DENSE
        extra_mb = peak_bytes(calls[name]) / 1e6
        figures[name] = {"speedup": ratio, "peak_mb": extra_mb, "result_mb": result_mb}
        print(
            f"{name}: {rate[name]:.0f} scenes/s, target {target:.0f}: "
            f"{verdict(rate[name] >= target)}; dense {rate[f'dense {name}']:.1f} scenes/s, "
            f"{ratio:.0f} times slower; memory {extra_mb:.0f} MB for {result_mb:.0f} MB of result"
        )
    for name in TARGET:
        print(f"{name}: coarse-to-fine search {rate[f'{name} search']:.0f} scenes/s")
    modes: tuple[SourceMode, ...] = ("fluctuating", "constant")
    for mode in modes:
        figures[f"agreement_{mode}"] = shares = agreement(mode)
        for name, share in shares.items():
            print(
                f"{name}, {mode}: of the K highest peaks coarse-to-fine finds "
                f"{100 * share['coarse-to-fine']:.1f} %, grid and parabola "
                f"{100 * share['grid']:.1f} %; of those of the latter that it finds, "
                f"{100 * share['as_high']:.1f} % at least as high"
            )
    save(figures, arguments.json, "cpu")


if __name__ == "__main__":
    main()
