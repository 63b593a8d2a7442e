"""TensorBoard's event files, read back record by record as TensorBoard reads them."""

from __future__ import annotations

import math
import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event

from tuner.config import load_study
from tuner.records import TrialRecord
from tuner.study import Ledger

Scalars = dict[str, list[tuple[int, float]]]


def scalars(folder: Path) -> Scalars:
    """Step and value of every scalar in a trial's folder, in the order of writing."""
    found: Scalars = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content = path.read_bytes()
        at = 0
        while at < len(content):
            # length (8 bytes), its checksum (4), the event, its checksum (4)
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def expected(trial: TrialRecord) -> Scalars:
    """The same of the ledger, in single precision."""
    found: Scalars = {}
    for epoch, metrics in sorted(trial.epochs.items()):
        for name, value in metrics.items():
            if type(value) in (int, float) and math.isfinite(value) and name != "epoch":
                (single,) = struct.unpack("f", struct.pack("f", value))
                found.setdefault(name, []).append((epoch, single))
    return found


def assert_mirrors_the_ledger(folder: Path) -> None:
    """Every trial that reported has its folder, and in it the ledger's epochs, each once."""
    ledger = Ledger(folder / "study.db", load_study(folder / "config.yaml"))
    trials = {f"trial-{t.number:04d}": t for t in ledger.trials() if t.epochs}
    ledger.close()
    assert trials
    assert sorted(path.name for path in (folder / "tensorboard").iterdir()) == sorted(trials)
    for name, trial in trials.items():
        assert scalars(folder / "tensorboard" / name) == expected(trial)
