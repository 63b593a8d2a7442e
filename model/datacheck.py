"""Verification of a study's data before it starts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.agreement import check_agreement, check_convention, gaps
from model.config import TrialConfig
from model.data import open_split, simulate_split
from model.seeds import Split
from model.shards import SPLITS, ShardSplit, refuse_leaks
from model.wording import counted


@dataclass(frozen=True)
class CheckedData:
    """Data that passed the checks.

    Attributes:
        said: a description in one line.
        notes: notes for the user, one line each.
        digests: of the recorded scenes of each split; empty for simulated scenes.
    """

    said: str
    notes: list[str]
    digests: dict[str, str]


def check_data(config: TrialConfig) -> CheckedData:
    """Verify the data of a study before it starts: every value of every scene.

    Raises:
        DataError: missing, damaged, foreign, non-finite or leaking data, or another convention.
        PluginError: a simulator that cannot be imported, or that makes no scenes.
    """
    if config.data.shards is None:
        if config.data.simulator is not None:
            array = config.array.build()
            next(simulate_split(config.data, config.scene, array, "val", 1))
        fresh = "fresh in every epoch" if config.data.fresh else "the same in every epoch"
        kind = f"{config.scene.source_mode}, {config.scene.wavefront}"
        return CheckedData(
            f"simulated scenes ({config.data.simulator or kind}): "
            f"{config.data.train_scenes} per epoch, {fresh}; {config.data.val_scenes} to validate",
            [],
            {},
        )
    folder = Path(config.data.shards)
    names: list[Split] = ["train", "val"]
    if (folder / "test").is_dir():
        names.append("test")
    array = config.array.build()
    splits = [open_split(config.data, config.scene, array, name) for name in names]
    check_convention(splits)
    notes: list[str] = []
    for split in splits:
        notes += [f"{split.name}: {note}" for note in (*gaps(split), *_dead(split))]
    digests = refuse_leaks(splits)
    notes += [note for split in splits for note in check_agreement(split, config.scene)]
    counts = ", ".join(f"{len(split)} {split.name}" for split in splits)
    said = f"shards in {folder}: {counts} scenes; no scene in two of {'/'.join(SPLITS)}"
    return CheckedData(said, notes, digests)


def _dead(split: ShardSplit) -> Iterator[str]:
    """Read every scene; yield a line if y is zero in some scenes with sources.

    Raises:
        DataError: a value that is invalid in any scene.
    """
    dead: list[int] = []
    for start in range(0, len(split), 256):
        index = np.arange(start, min(start + 256, len(split)), dtype=np.int64)
        scenes = split.read(index)
        silent = (scenes.n_sources > 0) & ~(scenes.y != 0).any(-1).any(-1)
        dead += index[silent.numpy()].tolist()
    if dead:
        yield (
            f"y is zero in {len(dead)} of {counted(len(split), 'scene')} with sources, first in "
            f"{split.where(dead[0])}: nothing is learned of those, and nothing found"
        )
