"""Determines when and where trials trained from the times of their epoch reports."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tuner.records import State, TrialRecord

_PAUSE = 5.0  # maximum seconds between two epochs that are drawn as one period
_OVERLAP = 0.25  # share of a period by which it may appear to overlap its neighbour


@dataclass(frozen=True)
class Segment:
    """A period of consecutive epochs of one trial in one place."""

    number: int
    state: State
    place: str  # node and device
    begin: float  # Unix time [s]
    end: float
    busy: float  # seconds of training within the period
    epochs: tuple[int, int]  # the first and the last
    slot: int = 0  # index among concurrent trials in the place


def segments_of(trials: Iterable[TrialRecord]) -> list[Segment]:
    """Return the periods of all trials sorted by start; untimed epochs are omitted."""
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
    """Return the periods with slots assigned; overlapping ones in a place get different slots.

    An epoch's end is the time of its report, and reports may be delayed by others, so that a period
    may appear to start slightly before the previous one has ended.
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
    """Return node and device of an epoch, as in node-3 GPU 0."""
    node = str(metrics.get("node") or "unknown node")
    gpu = metrics.get("gpu")
    return f"{node} GPU {gpu}" if gpu else f"{node} {metrics.get('device') or ''}".strip()
