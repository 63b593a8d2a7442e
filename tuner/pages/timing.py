"""When trials trained where: from the times at which their epochs were reported."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuner.records import State, TrialRecord

_PAUSE = 5.0  # seconds between two epochs that are drawn as one stretch
_OVERLAP = 0.25  # share of a stretch by which it may seem to overlap its neighbour


@dataclass(frozen=True)
class Segment:
    """A stretch of epochs of one trial in one place."""

    number: int
    state: State
    place: str  # node and device
    begin: float  # Unix time [s]
    end: float
    busy: float  # seconds of training in it
    epochs: tuple[int, int]  # the first and the last
    slot: int = 0  # among those that trained in the place at the same time


def segments_of(trials: Iterable[TrialRecord]) -> list[Segment]:
    """Every trial's stretches, by their beginning; epochs that were not timed are left out."""
    found: list[Segment] = []
    for trial in trials:
        last: Segment | None = None
        for epoch in sorted(trial.reported):
            metrics = trial.epochs[epoch]
            seconds = metrics.get("epoch_seconds")
            if not isinstance(seconds, int | float):
                continue
            end = trial.reported[epoch]
            begin, place = end - seconds, place_of(metrics)
            if last is not None and last.place == place and begin - last.end <= _PAUSE:
                last = replace(
                    last, end=end, busy=last.busy + seconds, epochs=(last.epochs[0], epoch)
                )
                found[-1] = last
            else:
                last = Segment(
                    trial.number, trial.state, place, begin, end, seconds, (epoch, epoch)
                )
                found.append(last)
    return sorted(found, key=lambda segment: (segment.begin, segment.number))


def slots_of(segments: Iterable[Segment]) -> list[Segment]:
    """The same stretches with slots: those of a place that overlap have different ones.

    An epoch is known by when its report came, and reports wait for one another: a stretch may seem
    to begin a little before its forerunner has ended.
    """
    free: dict[str, list[tuple[float, float]]] = {}  # end and length of the last in each slot
    result = []
    for segment in segments:
        slots = free.setdefault(segment.place, [])
        length = segment.end - segment.begin
        index = next(
            (
                index
                for index, (end, before) in enumerate(slots)
                if segment.begin >= end - min(_PAUSE, _OVERLAP * min(length, before))
            ),
            len(slots),
        )
        slots[index : index + 1] = [(segment.end, length)]
        result.append(replace(segment, slot=index))
    return result


def place_of(metrics: dict[str, object]) -> str:
    """Node and device of an epoch, as in node-3 GPU 0."""
    node = str(metrics.get("node") or "unknown node")
    gpu = metrics.get("gpu")
    return f"{node} GPU {gpu}" if gpu else f"{node} {metrics.get('device') or ''}".strip()
