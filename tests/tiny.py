"""Configurations small enough to train within a second."""

from __future__ import annotations

from typing import Any

from model import TrialConfig

TINY: dict[str, dict[str, Any]] = {
    "array": {"n_horizontal": 6, "n_vertical": 6, "spacing": 0.15},
    "scene": {"n_antennas": 4, "n_snapshots": 4, "max_sources": 2, "snr_db": (10.0, 20.0)},
    "network": {
        "width": 16,
        "depth": 1,
        "heads": 2,
        "conv_channels": 4,
        "image_channels": 4,
        "rank": 3,
        "azimuth_cells": 6,
        "elevation_cells": 4,
        "range_cells": 2,
    },
    "data": {"train_scenes": 48, "val_scenes": 24},
    "training": {"epochs": 2, "batch_size": 16, "learning_rate": 3e-3},
}


def tiny_config(seed: int = 0, **sections: dict[str, Any]) -> TrialConfig:
    """The tiny configuration with some keys of some sections changed."""
    merged = {name: dict(values) for name, values in TINY.items()}
    for name, values in sections.items():
        merged[name] = merged.get(name, {}) | values
    return TrialConfig.model_validate({"seed": seed} | merged)


# Of the network that judges candidates.
TINY_CANDIDATE: dict[str, Any] = {
    "family": "candidate",
    "width": 16,
    "heads": 2,
    "azimuth_cells": 6,
    "elevation_cells": 4,
    "range_cells": 2,
    "candidates": {"count": 3, "range_cells": 6, "search": {"joint_iterations": 2}},
}


def tiny_candidate_config(
    seed: int = 0, objective: str = "nmse", **sections: dict[str, Any]
) -> TrialConfig:
    """The same with the candidate network; sections as those of :func:`tiny_config`."""
    merged = {name: dict(values) for name, values in TINY.items()}
    merged["network"] = dict(TINY_CANDIDATE)
    merged["scene"] |= {"n_antennas": 6, "n_snapshots": 6}  # that tell three candidates apart
    for name, values in sections.items():
        merged[name] = merged.get(name, {}) | values
    return TrialConfig.model_validate({"seed": seed, "objective": objective} | merged)
