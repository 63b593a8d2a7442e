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
