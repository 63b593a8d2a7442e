"""A search in virtual time: the real ledger proposes and stops trials that take no time.

A heap holds the ends of epochs on G GPUs. One driver processes them one at a time in order of
time, as Ray Tune's does: it records the epoch, gets the ledger's decision, and either lets the
trial continue or ends it and proposes the next trial of the GPU. The driver's own time passes in
virtual time too, while the GPU waits.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from optuna.pruners import MedianPruner
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from benchmarks._surrogate import Curve
from tuner.config import MEDIAN_OVER, StudyConfig
from tuner.pausing import PausingLedger
from tuner.records import Assignment, End, TrialRecord
from tuner.study import Ledger

CurveOf = Callable[[Assignment], Curve]


class MemoryLedger(Ledger):
    """The ledger in memory."""

    def __init__(self, study: StudyConfig) -> None:
        super().__init__(InMemoryStorage(), study)


class WaitingLedger(PausingLedger):
    """The ledger of trials that wait at rungs, in memory."""

    def __init__(self, study: StudyConfig) -> None:
        super().__init__(InMemoryStorage(), study)


class PlainLedger(MemoryLedger):
    """Reports a stopped trial to Optuna as COMPLETE with its last value, as Ray Tune does."""

    def finish(self, number: int, state: End, **details: Any) -> End:
        """End a trial, treating a stopped one as if it had used its budget."""
        if state != "pruned":
            return super().finish(number, state, **details)
        trial = self._storage.get_trial(self._id(number))
        last = trial.intermediate_values[trial.last_step or 0]
        self._study.tell(number, last, state=TrialState.COMPLETE)
        return state


class MedianPruned(MemoryLedger):
    """Stops trials with Optuna's median pruner, as a plain sequential study does.

    The study is one without a scheduler.
    """

    def __init__(self, study: StudyConfig) -> None:
        super().__init__(study)
        self._pruner = MedianPruner(
            n_startup_trials=MEDIAN_OVER,
            n_warmup_steps=study.search.grace_epochs,
            n_min_trials=MEDIAN_OVER,
        )

    def report(
        self, number: int, metrics: Mapping[str, Any], checkpoint: str | None = None
    ) -> str | None:
        """Record an epoch; return the reason why the trial ends with it, or None."""
        stopped = super().report(number, metrics, checkpoint)
        trial = self._storage.get_trial(self._id(number))
        return stopped or ("pruned" if self._pruner.prune(self._study, trial) else None)


class Proposer(Protocol):
    """The methods of a ledger that the simulation calls."""

    def ask(self) -> Assignment | None:
        """Return a new trial, or None if there are no more."""

    def report(self, number: int, metrics: Mapping[str, Any], checkpoint: str) -> str | None:
        """Record the end of an epoch; return the reason why the trial ends with it, or None."""

    def settle(self) -> list[TrialRecord]:
        """Return trials that end without running further."""

    def hand_back(self, number: int) -> None:
        """Hand back a trial that has reached the epoch it was to run to."""

    def finish(self, number: int, state: End, *, objective: float | None = None) -> End:
        """Record the end of a trial."""


class Stopped:
    """Proposer of trials with known numbers of epochs, for figures that depend only on times.

    Args:
        epochs: number of epochs of each trial.
    """

    def __init__(self, epochs: Sequence[int]) -> None:
        self._epochs = epochs
        self._next = 0

    def ask(self) -> Assignment | None:
        """Return the next trial, without parameters."""
        if self._next == len(self._epochs):
            return None
        self._next += 1
        return Assignment(self._next - 1, {}, 0)

    def report(self, number: int, metrics: Mapping[str, Any], checkpoint: str) -> str | None:
        """End a trial when its epochs are used up."""
        return None if metrics["epoch"] < self._epochs[number] else "stopped"

    def settle(self) -> list[TrialRecord]:
        """Return no trials."""
        return []

    def hand_back(self, number: int) -> None:
        """Do nothing."""

    def finish(self, number: int, state: End, *, objective: float | None = None) -> End:
        """Do nothing."""
        return state


@dataclass(frozen=True)
class DriverCost:
    """Seconds for which the driver is busy.

    Args:
        ask: for a proposal, by the number of trials proposed before.
        report: for an epoch.
        end: for a trial's end, by the number of trials proposed.
    """

    ask: Callable[[int], float] = lambda n: 0.0
    report: float = 0.0
    end: Callable[[int], float] = lambda n: 0.0


@dataclass(frozen=True)
class Span:
    """The time of a trial on its GPU."""

    number: int
    gpu: int
    start: float  # [s]
    end: float  # [s]
    epochs: int
    busy: float  # [s] of its epochs
    state: End
    objective: float


@dataclass
class Run:
    """Result of a simulated search.

    Attributes:
        spans: ended trials in the order of their ends.
        seconds: virtual time from the first proposal to the last end, or to the end of the budget.
        driver: seconds for which the driver was busy.
        busy: seconds for which GPUs computed, summed over GPUs and including interrupted trials.
        waiting: start of waiting by number, for waiting trials that have not ended.
    """

    gpus: int
    spans: list[Span] = field(default_factory=list)
    seconds: float = 0.0
    driver: float = 0.0
    busy: float = 0.0
    waiting: dict[int, float] = field(default_factory=dict)

    @property
    def gpu_seconds(self) -> float:
        """Time for which GPUs were held, idle or not."""
        return self.gpus * self.seconds

    @property
    def idle(self) -> float:
        """Share of the held time for which GPUs waited."""
        return max(0.0, 1.0 - self.busy / self.gpu_seconds)

    def done(self) -> Iterator[Span]:
        """Trials that used the whole budget; only these are ranked."""
        return (span for span in self.spans if span.state == "done")

    def best(self) -> float:
        """The lowest objective of a finished trial; infinite if none has finished."""
        return min((span.objective for span in self.done()), default=math.inf)

    def gpu_seconds_to(self, target: float) -> float:
        """Held GPU time until a finished trial is at or below the target; infinite if none is."""
        ends = (span.end for span in self.done() if span.objective <= target)
        return self.gpus * min(ends, default=math.inf)


@dataclass
class _Trial:
    assignment: Assignment
    curve: Curve
    start: float
    epoch: int = 0
    until: int | None = None

    @property
    def next_seconds(self) -> float:
        return float(self.curve.seconds[self.epoch])


def simulate(
    ledger: Proposer,
    curve_of: CurveOf,
    *,
    gpus: int,
    cost: DriverCost = DriverCost(),
    gpu_seconds: float = math.inf,
) -> Run:
    """Run the ledger's study on G GPUs until its trials or the time are used up.

    Args:
        ledger: a fresh study; its ``search.trials`` bounds the number of trials, the curves' length
            the epochs of a trial.
        curve_of: gives the reports of a trial and the duration of its epochs.
        gpus: number of trials that run in parallel.
        cost: of the driver.
        gpu_seconds: held GPU time after which nothing is counted any more: trials that are running
            then are interrupted, as by ``search.time_budget``.
    """
    run = Run(gpus)
    until = gpu_seconds / gpus
    known: dict[int, _Trial] = {}
    running: dict[int, _Trial] = {}  # by GPU
    idle = list(range(gpus))
    ends: list[tuple[float, int]] = []  # of epochs: time, GPU
    free = 0.0  # the driver's time

    def work(since: float, seconds: float) -> None:
        nonlocal free
        free = max(free, since) + seconds
        run.driver += seconds

    def ended(trial: _Trial, gpu: int, now: float, state: End) -> None:
        number, objective = trial.assignment.number, float(trial.curve.objective[trial.epoch - 1])
        busy = float(trial.curve.seconds[: trial.epoch].sum())
        run.spans.append(Span(number, gpu, trial.start, now, trial.epoch, busy, state, objective))
        run.waiting.pop(number, None)

    def begin(now: float) -> None:
        """Assign trials to idle GPUs while the ledger proposes any."""
        while idle:
            for record in ledger.settle():
                ended(known[record.number], idle[0], now, "pruned")
            found = ledger.ask()
            if found is None:
                return
            gpu = idle.pop(0)
            trial = known.get(found.number)
            if trial is None:
                work(now, cost.ask(len(known)))
                trial = known[found.number] = _Trial(found, curve_of(found), free)
            trial.until = found.until
            run.waiting.pop(found.number, None)
            running[gpu] = trial
            heapq.heappush(ends, (max(free, now) + trial.next_seconds, gpu))

    begin(0.0)
    while ends and ends[0][0] <= until:
        now, gpu = heapq.heappop(ends)
        trial = running[gpu]
        number, objective = trial.assignment.number, float(trial.curve.objective[trial.epoch])
        run.busy += trial.next_seconds
        trial.epoch += 1
        work(now, cost.report)
        metrics = {"epoch": trial.epoch, "objective": objective}
        stopped = ledger.report(number, metrics, f"checkpoint-{trial.epoch:05d}")
        last = trial.epoch == len(trial.curve.objective)
        goes_on = not last and stopped is None
        if goes_on and trial.epoch != trial.until:
            heapq.heappush(ends, (free + trial.next_seconds, gpu))
            continue
        if goes_on:
            ledger.hand_back(number)
            run.waiting[number] = now
        else:
            state: End = "done" if last else "pruned"
            ledger.finish(number, state, objective=objective if last else None)
            ended(trial, gpu, now, state)
            work(now, cost.end(len(known)))
        run.seconds = now
        del running[gpu]
        idle.append(gpu)
        begin(free)
    if ends:  # the time is used up, and the epochs in progress are lost
        run.seconds = until
        for end, gpu in ends:
            run.busy += max(0.0, until - (end - running[gpu].next_seconds))
    return run
