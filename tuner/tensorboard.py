"""TensorBoard logs of a study: the scalars of every trial, from the ledger.

The driver writes them from the trials' reports, as trials may run on other machines.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from tuner.records import State
from tuner.study import Ledger
from tuner.trial import trial_name
from tuner.watchers import Watcher


class TensorBoardLog(Watcher):
    """A folder of event files, one per trial, that holds each epoch once.

    Args:
        ledger: the study.
        folder: parent of the trials' folders, such as ``trial-0007``.
    """

    def __init__(self, ledger: Ledger, folder: Path) -> None:
        self._ledger = ledger
        self._folder = folder
        self._files: dict[int, EventsWriter] = {}
        self._written: dict[int, int] = {}  # the last epoch

    def reported(self, number: int, metrics: dict[str, Any]) -> None:
        """Append an epoch.

        A trial that resumes after an interruption or a lost machine may report epochs again: its
        file is then rewritten from the ledger's epochs before this one.
        """
        epoch = int(metrics["epoch"])
        if number not in self._files or epoch <= self._written[number]:
            self._begin(number, before=epoch)
        self._write(number, epoch, metrics)
        self._files[number].flush()

    def handed_back(self, number: int) -> None:
        """Close the file of a waiting trial, as thousands may wait."""
        self._close(number)

    def finished(self, number: int, state: State, reason: str | None) -> None:
        """Close the file of a trial; a trial that never reported has none."""
        self._close(number)

    def _begin(self, number: int, before: int) -> None:
        self._close(number)
        folder = self._folder / trial_name(number)
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._files[number] = EventsWriter(str(folder / "events"))
        for epoch, metrics in sorted(self._ledger.trial(number).epochs.items()):
            if epoch < before:
                self._write(number, epoch, metrics)

    def _write(self, number: int, epoch: int, metrics: Mapping[str, Any]) -> None:
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in metrics.items()
            if name != "epoch" and _is_scalar(value)
        ]
        event = Event(step=epoch, wall_time=time.time(), summary=Summary(value=values))
        self._files[number].write_event(event)
        self._written[number] = epoch

    def _close(self, number: int) -> None:
        if (writer := self._files.pop(number, None)) is not None:
            writer.close()


def _is_scalar(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
