"""Scenes that the simulator makes in a second.

    python -m benchmarks.simulate [--json FILE]

Default scenes (M=16, N=144, L=16, K=1..5) on the CPU, both source modes, three batch sizes.
A missed target changes no exit status.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any, get_args

import torch

from benchmarks._timing import alternate, parser, save, verdict
from physics import SceneConfig, simulate
from physics.scene import SourceMode

BATCHES = (64, 256, 1024)
TARGET = 1000.0  # scenes per second


def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    modes: tuple[SourceMode, ...] = get_args(SourceMode)
    calls = {
        f"{mode}, B={batch}": partial(
            simulate, batch, SceneConfig(source_mode=mode), generator=generator
        )
        for mode in modes
        for batch in BATCHES
    }
    seconds = alternate(calls, arguments.rounds)
    figures: dict[str, Any] = {}
    print(f"{'scenes':<22}{'median':>12}{'scenes/s':>12}   target {TARGET:.0f}")
    for name in calls:
        median = statistics.median(seconds[name])
        rate = int(name.rpartition("=")[2]) / median
        figures[name] = {"median_ms": 1e3 * median, "scenes_per_second": rate}
        print(f"{name:<22}{1e3 * median:>9.1f} ms{rate:>12.0f}   {verdict(rate >= TARGET)}")
    save(figures, arguments.json, "cpu")


if __name__ == "__main__":
    main()
