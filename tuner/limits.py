"""Limits that end a study before all trials have run: the time budget and the target."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import monotonic

from tuner.duration import format_duration
from tuner.space import n_points
from tuner.study import Ledger

_KEEP_EVERY = 1.0  # seconds of the study's time that may be lost when the driver is killed


@dataclass(frozen=True)
class Ended:
    """Why no further trial runs, and the resume option that lifts this, as typed."""

    reason: str
    remedy: str | None = None


class Limits:
    """The study's clock over all sessions, and its target.

    Time counts while trials run, and the ledger stores the time spent. Only a ranked trial can meet
    the target: a running trial may still fail and has not used its full budget.
    """

    def __init__(self, ledger: Ledger) -> None:
        search = ledger.config.search
        self._ledger = ledger
        self._budget, self._target = search.time_budget, search.target
        self._before = self._kept = ledger.seconds
        self._begun: float | None = None
        self.look()

    @property
    def seconds(self) -> float:
        """Time that trials have run, in this and earlier sessions."""
        return self._before + (0.0 if self._begun is None else monotonic() - self._begun)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the time spent in the block."""
        self._begun = monotonic()
        try:
            yield
        except BaseException:  # raise this error, not a second one from storing the time
            with suppress(Exception):
                self._stop()
            raise
        self._stop()

    def _stop(self) -> None:
        self._before, self._begun = self.seconds, None
        self._keep()

    def look(self) -> None:
        """Update the best trial after trials have ended."""
        self._best = self._ledger.best() if self._target is not None else None

    def reached(self) -> Ended | None:
        """Return the limit that ended the study, if any; called often, it also stores the time."""
        if self.seconds - self._kept >= _KEEP_EVERY:
            self._keep()
        best, target = self._best, self._target
        if best is not None and best.objective is not None and target is not None:
            met = f"trial {best.number:04d} has {best.objective:.5f}"
            if best.objective <= target:
                return Ended(f"the target {target:g} is reached ({met})", "--target none")
        if self._budget is not None and self.seconds >= self._budget:
            budget, spent = format_duration(self._budget), format_duration(self.seconds)
            return Ended(
                f"the time budget of {budget} is used up ({spent} over all sessions)",
                "--time-budget none",
            )
        return None

    def _keep(self) -> None:
        self._kept = self.seconds
        self._ledger.keep_seconds(self._kept)


def why_ended(ledger: Ledger, limits: Limits) -> Ended | None:
    """Return why the study has nothing left to run; None if it has."""
    if not ledger.has_work:
        search = ledger.config.search
        if search.scheduler != "pbt" and n_points(search.space) <= search.trials:
            return Ended("every point of search.space has run")
        return Ended("all trials have run", f"--trials {2 * search.trials}")
    return limits.reached()
