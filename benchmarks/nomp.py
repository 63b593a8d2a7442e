"""NOMP with the number of sources by BIC: scenes a second and what it finds.

    python -m benchmarks.nomp [--json FILE] [--threads 2] [--batch 64] [--scenes 1536] [--seed 20]
        [--data FOLDER]

Scenes of the origin's convention (paraxial waves, constant symbols, Rayleigh channel) and of the
default one (spherical waves, fluctuating symbols); on a GPU where there is one. ``--data`` takes
the origin's recorded scenes, of all splits, in place of simulated ones.
"""

from __future__ import annotations

import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._timing import parser, save, verdict
from model.shards import SPLITS, ShardSplit
from physics import PlanarArray, SceneConfig, Scenes, nomp, scene_crb, simulate
from physics.bootstrap import f1_interval
from physics.metrics import crb_gated, errors, match, normalized_errors

TARGET = 60.0  # scenes per second on two cores
CONVENTIONS: dict[str, tuple[PlanarArray, SceneConfig]] = {
    "origin": (
        PlanarArray(offset=(-0.075, -0.075)),
        SceneConfig(wavefront="paraxial", source_mode="constant", k_factor_db=-100.0),
    ),
    "default": (PlanarArray(), SceneConfig()),
}


def recorded(folder: Path, array: PlanarArray, config: SceneConfig) -> Scenes:
    """The scenes of all splits of a shard folder."""
    sizes = config.n_antennas, config.n_snapshots, config.max_sources
    splits = [
        ShardSplit(folder, name, array, config.wavefront, *sizes)
        for name in SPLITS
        if (folder / name).is_dir()
    ]
    return Scenes.concatenate([split.read(np.arange(len(split))) for split in splits])


def measure(
    array: PlanarArray, config: SceneConfig, scenes: Scenes, batch: int, rounds: int
) -> dict[str, Any]:
    """Measure the speed over batches, and the scores of all scenes."""
    n_scenes, device = len(scenes), scenes.y.device.type
    options: dict[str, Any] = {"array": array, "scene": config}

    def run(index: slice) -> Any:
        some = scenes[index]
        return nomp(some.y, some.H, some.codes, snr_db=some.snr_db, **options)

    run(slice(0, batch))
    speeds = []
    n_timed = min(n_scenes, 6 * batch)
    for _ in range(rounds):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for first in range(0, n_timed, batch):
            run(slice(first, first + batch))
        if device == "cuda":
            torch.cuda.synchronize()
        speeds.append(n_timed / (time.perf_counter() - start))
    found = run(slice(0, n_scenes)).detections
    matching = match(found, scenes.position, scenes.present)
    bound = scene_crb(scenes, array, config.wavefront, config.source_mode)
    std = bound.diagonal(dim1=-2, dim2=-1).sqrt()
    strong = crb_gated(std) & scenes.present & (scenes.snr_db >= 5.0).unsqueeze(-1)
    ratio = normalized_errors(errors(found, matching, scenes.position), std)[strong]
    low, high = f1_interval(matching)
    return {
        "scenes": n_scenes,
        "batch": batch,
        "scenes_per_second": statistics.median(speeds),
        "scenes_per_second_rounds": speeds,
        "f1": matching.f1,
        "f1_interval": [low, high],
        "count_accuracy": matching.count_accuracy,
        "median_error_over_crb": float(ratio[torch.isfinite(ratio)].median()),
    }


def main() -> None:
    """Run the benchmark and print the result."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--batch", type=int, default=64, help="scenes a call (%(default)s)")
    arguments.add_argument("--scenes", type=int, default=1536, help="scenes (%(default)s)")
    arguments.add_argument("--seed", type=int, default=20, help="of the scenes (%(default)s)")
    arguments.add_argument("--data", type=Path, help="recorded scenes of the origin")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    print(f"torch {torch.__version__} on {name}, {args.threads} threads, batch {args.batch}")
    result: dict[str, Any] = {"torch": torch.__version__, "device": name}
    rounds = max(1, args.rounds // 5)
    for label, (array, config) in CONVENTIONS.items():
        if args.data is not None and label != "origin":
            continue
        if args.data is not None:
            scenes = recorded(args.data, array, config)
        else:
            generator = torch.Generator().manual_seed(args.seed)
            scenes = simulate(args.scenes, config, array, generator=generator)
        row = result[label] = measure(array, config, scenes.to(device), args.batch, rounds)
        low, high = row["f1_interval"]
        speed = row["scenes_per_second"]
        print(
            f"{label:>8}: {speed:6.1f} scenes/s (target {TARGET:.0f}: {verdict(speed >= TARGET)}); "
            f"F1 {row['f1']:.3f} [{low:.3f}, {high:.3f}], K right {row['count_accuracy']:.3f}, "
            f"|err|/CRB of gated sources from 5 dB on {row['median_error_over_crb']:.3f}"
        )
    save(result, args.json, device)


if __name__ == "__main__":
    main()
