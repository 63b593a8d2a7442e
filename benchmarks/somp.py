"""SOMP by how fine its grid is, beside NOMP: what it finds, time and memory.

    python -m benchmarks.somp [--json FILE] [--threads 2] [--scenes 500] [--seed 77]

Scenes of the default convention (spherical waves, fluctuating symbols), the SNR told and not told.
Time is that of the process on the CPU: a busy machine changes it least. Memory is what a call of 64
scenes holds at its peak beyond its arguments and the grid.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

from benchmarks._timing import parser, peak_bytes, save
from physics import PlanarArray, SceneConfig, nomp, simulate, somp
from physics.bootstrap import f1_interval
from physics.metrics import gospa, match

BATCH = 64
OVERSAMPLING = (2.0, 3.0, 4.0)


def main() -> None:
    """Run the benchmark and print the result."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--scenes", type=int, default=500, help="scenes (%(default)s)")
    arguments.add_argument("--seed", type=int, default=77, help="of the scenes (%(default)s)")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    array, config = PlanarArray(), SceneConfig()
    scenes = simulate(
        args.scenes, config, array, generator=torch.Generator().manual_seed(args.seed)
    )
    calls: dict[str, Any] = {
        f"SOMP, oversampling {fine:g}": partial(somp, oversampling=fine) for fine in OVERSAMPLING
    }
    calls["NOMP"] = nomp
    result: dict[str, Any] = {}
    for name, call in calls.items():
        for known in (True, False):

            def run(index: slice, call: Any = call, known: bool = known) -> Any:
                some = scenes[index]
                level = some.known_snr_db if known else None
                return call(some.y, some.H, some.codes, array=array, scene=config, snr_db=level)

            run(slice(0, BATCH))
            memory = peak_bytes(partial(run, slice(0, BATCH)))
            start = time.process_time()
            found = run(slice(0, args.scenes)).detections
            speed = args.scenes / (time.process_time() - start)
            matching = match(found, scenes.position, scenes.present)
            low, high = f1_interval(matching)
            label = f"{name}, SNR {'told' if known else 'not told'}"
            row = result[label] = {
                "f1": matching.f1,
                "f1_interval": [low, high],
                "gospa_m": float(gospa(found, scenes.position, scenes.present).total.mean()),
                "count_accuracy": matching.count_accuracy,
                "scenes_per_cpu_second": speed,
                "peak_megabytes": memory / 1e6,
            }
            print(
                f"{label:>35}: F1 {row['f1']:.3f} [{low:.3f}, {high:.3f}], "
                f"GOSPA {row['gospa_m']:.3f} m, K right {row['count_accuracy']:.3f}, "
                f"{speed:.1f} scenes/CPU s, {row['peak_megabytes']:.0f} MB"
            )
    save(result, args.json, "cpu")


if __name__ == "__main__":
    main()
