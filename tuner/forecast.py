"""Forecasts the remaining time of a study from its trials so far."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Self

from tuner.duration import format_duration
from tuner.records import State, TrialRecord
from tuner.rungs import epochs_in_all

if TYPE_CHECKING:
    from tuner.study import Ledger


@dataclass(frozen=True)
class Pace:
    """The progress of a trial, and the durations of its epochs [s]."""

    state: State
    epoch: int
    seconds: tuple[float, ...]

    @classmethod
    def of(cls, trial: TrialRecord) -> Self:
        """Create a pace from a trial's record."""
        spent = (metrics.get("epoch_seconds") for metrics in trial.epochs.values())
        return cls(trial.state, trial.epoch, tuple(float(s) for s in spent if s is not None))


def seconds_left(ledger: Ledger) -> float | None:
    """Estimate the remaining seconds of a ledger's trials; None while unknown."""
    search, epochs = ledger.config.search, ledger.config.training.epochs
    return time_left(
        [Pace.of(trial) for trial in ledger.trials()],
        epochs=epochs,
        n_new=ledger.n_new,
        elapsed=ledger.seconds,
        budget=search.time_budget,
        in_all=epochs_in_all(search, epochs),
    )


def time_left(
    paces: Iterable[Pace],
    *,
    epochs: int,
    n_new: int,
    elapsed: float,
    budget: float | None = None,
    in_all: int | None = None,
) -> float | None:
    """Estimate the remaining seconds of a study's trials; None while unknown.

    New trials are assumed to last the mean number of epochs of ended trials, and a running trial as
    many further epochs as ended trials that went beyond it. The duration of an epoch is the median
    within a trial, so that a first epoch that waits for data is not counted again. Concurrency is
    estimated as the total time in epochs over the study's time.

    Args:
        paces: paces of all started trials.
        epochs: a trial's budget.
        n_new: trials that have not started.
        elapsed: time for which the study's trials have run [s].
        budget: time for which they may run [s]; the remainder bounds the result.
        in_all: epochs of the whole study, if known in advance.
    """
    left = _trials_left(paces, epochs, n_new, elapsed, in_all)
    if budget is None:
        return left
    rest = max(0.0, budget - elapsed)
    return rest if left is None else min(left, rest)


def _trials_left(
    paces: Iterable[Pace], epochs: int, n_new: int, elapsed: float, in_all: int | None
) -> float | None:
    known = list(paces)
    ended = [pace.epoch for pace in known if pace.state != "running"]
    running = [pace.epoch for pace in known if pace.state == "running"]
    if not running and not n_new:
        return 0.0
    timed = [pace for pace in known if pace.seconds]
    n_timed = sum(len(pace.seconds) for pace in timed)
    if not (any(ended) or in_all) or not n_timed or elapsed <= 0:
        return None
    typical = sum(len(pace.seconds) * median(pace.seconds) for pace in timed) / n_timed
    side_by_side = max(1.0, sum(sum(pace.seconds) for pace in timed) / elapsed)
    if in_all is not None:
        due = n_new or 1  # lower bound, as more trials may continue than estimated
        return typical * max(due, in_all - n_timed) / side_by_side
    more = [_more(epoch, ended, epochs) for epoch in running]
    more += [sum(ended) / len(ended)] * n_new
    lanes = min(side_by_side, len(more))
    return typical * max(sum(more) / lanes, max(more))


def _more(epoch: int, ended: Sequence[int], epochs: int) -> float:
    """Estimate the remaining epochs of a running trial from ended trials that went beyond it."""
    further = [other - epoch for other in ended if other > epoch]
    return sum(further) / len(further) if further else max(0, epochs - epoch)


def about(seconds: float) -> str:
    """Format an estimated duration."""
    return f"about {format_duration(max(1.0, round(seconds)))}"
