"""Trained networks that are shipped with the package."""

from __future__ import annotations

from pathlib import Path

from model.checkpoint import read_config
from model.config import TrialConfig

_FOLDER = Path(__file__).resolve().parent / "networks"
# Settings that a network is trained for: with other values its inputs are out of distribution.
_CONVENTIONS = ("n_antennas", "n_snapshots", "wavefront", "source_mode", "codebook")


def shipped() -> dict[str, Path]:
    """Folders of the networks by name, each laid out like ``RUN_DIR/best``, plus a model card."""
    folders = sorted(path.parent for path in _FOLDER.glob("*/config.json"))
    return {folder.name: folder for folder in folders}


def shipped_for(config: TrialConfig) -> Path | None:
    """The network for scenes of this configuration; None if none was trained for them.

    Array, antennas, snapshots, wavefront, source mode and codebook must be those of its training.
    """
    for folder in shipped().values():
        trained = read_config(folder)
        same = all(getattr(trained.scene, n) == getattr(config.scene, n) for n in _CONVENTIONS)
        if same and trained.array == config.array:
            return folder
    return None
