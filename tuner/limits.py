"""What ends a study before its trials have run: its time budget and its target."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import monotonic

from tuner.duration import format_duration
from tuner.space import n_points
from tuner.study import Ledger

_KEEP_EVERY = 1.0  # seconds of the study's time that a killed driver may forget


@dataclass(frozen=True)
class Ended:
    """Why no trial runs any more, and the option of a resume that lifts it, as it is typed."""

    reason: str
    remedy: str | None = None


class Limits:
    """The study's clock, over all its sessions, and its goal.

    Time counts while trials run; what has been spent lies in the ledger. The target is met by a
    trial that ranks: one that is still running may yet fail, and has not had its budget.
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
        """Time that trials have run, in this session and those before."""
        return self._before + (0.0 if self._begun is None else monotonic() - self._begun)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count the time of the block."""
        self._begun = monotonic()
        try:
            yield
        except BaseException:  # what is under way is said, not that the time cannot be kept either
            with suppress(Exception):
                self._stop()
            raise
        self._stop()

    def _stop(self) -> None:
        self._before, self._begun = self.seconds, None
        self._keep()

    def look(self) -> None:
        """Take note that trials have ended: the winner may be another."""
        self._best = self._ledger.best() if self._target is not None else None

    def reached(self) -> Ended | None:
        """What has ended the study, if anything; asked often, it also keeps the time."""
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
    """Why the study has nothing to run, if that is so."""
    if not ledger.has_work:
        search = ledger.config.search
        if search.scheduler != "pbt" and n_points(search.space) <= search.trials:
            return Ended("every point of search.space has run")
        return Ended("all trials have run", f"--trials {2 * search.trials}")
    return limits.reached()
