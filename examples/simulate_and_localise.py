"""Simulate a scene, and find its sources with the network that is shipped and with NOMP.

python examples/simulate_and_localise.py [--seed 5] [--snr-db 15]
"""

from __future__ import annotations

import argparse
import math

import torch

from model import Localizer
from physics import SceneConfig, nomp, simulate


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--seed", type=int, default=5)
    arguments.add_argument("--snr-db", type=float, default=15.0)
    args = arguments.parse_args()

    localizer = Localizer.shipped()
    config = SceneConfig(snr_db=(args.snr_db, args.snr_db))
    generator = torch.Generator().manual_seed(args.seed)
    scenes = simulate(1, config, localizer.array, generator=generator)
    y, H, codes = scenes.y[0], scenes.H[0], scenes.codes[0]  # (L, M), (M, N), (L, N)

    def show(title: str, rows: list[tuple[float, float, float, str]]) -> None:
        print(f"{title}:")
        for azimuth, elevation, range_m, note in rows:
            print(f"  {azimuth:+7.1f}° {elevation:+6.1f}° {range_m:6.2f} m  {note}".rstrip())

    true = scenes.position[0][scenes.present[0]].tolist()
    show("true", [(math.degrees(a), math.degrees(e), r, "") for a, e, r in true])
    found = localizer.locate(y, H, codes, snr_db=args.snr_db)
    show(
        "network",
        [(s.azimuth_deg, s.elevation_deg, s.range_m, f"p {s.probability:.2f}") for s in found],
    )
    classical = nomp(
        scenes.y, scenes.H, scenes.codes, array=localizer.array, scene=config, snr_db=args.snr_db
    ).detections
    picked = classical.position[0][classical.present[0]].tolist()
    show("NOMP", [(math.degrees(a), math.degrees(e), r, "") for a, e, r in picked])


if __name__ == "__main__":
    main()
