"""The ledger of ASHA as published: trials pause at rungs and resume once among the best.

`asha` stops a trial at the first rung where too many are better, and promotes the first trials at a
rung, which have no others to be compared with. Here every trial waits at each rung with its
checkpoint. A free slot resumes the best waiting trial that is among the best of a rung (one in
`reduction_factor`), searching from the highest rung down; if there is none, a new trial starts. A
trial is not stopped while it may still become one of the best, and is not promoted just because it
arrived first. A trial ends when it can no longer be among the best, whatever the remaining trials
reach: of N trials about N / `reduction_factor` wait at most. A few of these are kept until a trial
has finished, as the leading ones may fail.

The code that runs trials treats a waiting trial like an interrupted one that resumes from its
checkpoint. All decisions follow from the ledger alone. When all trials have started and none
resumes by this rule, the most advanced ones resume until one has finished (or as many as are to be
promoted) and no waiting trial has a better objective. All waiting trials then end as stopped at
their rung. If the study's time would end before one has finished, the most advanced trial resumes
while there is time for it.

Source: Li, Jamieson, Rostamizadeh et al., "A system for massively parallel hyperparameter tuning",
MLSys 2020, algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from tuner.records import Assignment, TrialRecord
from tuner.rungs import rungs_of
from tuner.turns import TurnsLedger

SPARE = 3  # spare trials that wait besides the wanted ones until these have finished
_SLOWER = 1.2  # allowed slowdown of a trial's remaining epochs relative to those so far


@dataclass(frozen=True)
class _Trial:
    """The part of a trial's state that is compared."""

    number: int
    state: TrialState
    reached: int  # the last epoch that need not be trained again
    is_over: bool  # whether training stopped by itself (early stopping) at that epoch
    standing: float  # its objective so far
    objectives: dict[int, float]  # by epoch


class PausingLedger(TurnsLedger):
    """A ledger whose trials wait at the rungs of ASHA."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        search = self.config.search
        self._rungs = rungs_of(search, self.config.training.epochs)
        self._wanted = max(1, search.promote)

    def ask(self) -> Assignment | None:
        """Return a trial to resume or a new one; None while others are due, or if none is left."""
        own = self._own()
        trial = self._next(own)
        trial = self._pressing(own, 0 if trial is None else trial.reached) or trial
        if trial is None and not self._exhausted:
            found = super().ask()
            if found is not None:
                self._handed_out.add(found.number)
                return replace(found, until=self._until(0))
            self._exhausted = True
        trial = trial or self._foremost(own)
        if trial is None:
            return None
        self._handed_out.add(trial.number)
        found = self.going_on(trial.number)
        return replace(found, until=self._until(found.epoch))

    def settle(self) -> list[TrialRecord]:
        """End waiting trials that can no longer resume, so that their checkpoints can be deleted.

        Returns:
            The trials that were ended.
        """
        own, new = self._own(), 0 if self._exhausted else self.n_new
        if not new and not self._handed_out and not (self._next(own) or self._foremost(own)):
            waiting = [trial for trial in own if trial.state == TrialState.RUNNING]
        else:
            waiting = [trial for rung in self._rungs for trial in self._outdone(rung, own, new)]
        for trial in waiting:
            self.finish(trial.number, "pruned", reason=f"stopped after epoch {trial.reached}")
        return [self.trial(trial.number) for trial in waiting]

    def _until(self, epoch: int) -> int | None:
        """Return the next rung after an epoch; None after the last one."""
        return next((rung for rung in self._rungs if rung > epoch), None)

    def _own(self) -> list[_Trial]:
        return [_trial(frozen) for frozen in self._started(self._frozen())]

    def _next(self, own: Sequence[_Trial]) -> _Trial | None:
        """Return a trial interrupted between rungs, or the best one that may be promoted."""
        for trial in own:
            if self._is_free(trial) and (trial.is_over or trial.reached not in self._rungs):
                return trial
        for rung in reversed(self._rungs):
            for trial in self._best_at(rung, own):
                if self._is_free(trial) and trial.reached == rung and not self._is_lost(trial):
                    return trial
        return None

    def _pressing(self, own: Sequence[_Trial], reached: int) -> _Trial | None:
        """Return a trial that must resume now to finish within the time budget, or None.

        While too few trials have finished, the most advanced trials that can still finish in time
        are considered, up to the wanted number. Other work is estimated by the slowest trial so
        far. If all epochs take about the same time, and the budget suffices for one full trial, the
        study has a winner when its time ends.

        Args:
            own: the study's trials.
            reached: epoch from which another trial would otherwise continue to its next rung.
        """
        budget, epochs = self.config.search.time_budget, self.config.training.epochs
        wanted = self._wanted - sum(trial.state == TrialState.COMPLETE for trial in own)
        if budget is None or wanted <= 0:
            return None
        begun = [t for t in own if t.reached]
        spent = {t.number: self.trial(t.number).seconds or 0.0 for t in begun}
        trained = sum(spent.values())
        if not trained:
            return None
        # Account for overhead beyond the epochs; concurrent trials share the study's time.
        lanes = 1 + len(self._handed_out)
        slower = _SLOWER * max(1.0, self.seconds * lanes / trained)
        pace = {t.number: slower * spent[t.number] / t.reached for t in begun}
        left, stretch = budget - self.seconds, (self._until(reached) or epochs) - reached
        elsewhere = stretch * max(pace.values())  # until the next decision
        running = sorted((t for t in begun if t.state == TrialState.RUNNING), key=_by_rung)
        needed = {t.number: (epochs - t.reached) * pace[t.number] for t in running}
        able = [t for t in running if needed[t.number] <= left]
        for trial in able[:wanted]:
            if self._is_free(trial) and left < needed[trial.number] + elsewhere:
                return trial
        return None

    def _best_at(self, rung: int, own: Sequence[_Trial]) -> list[_Trial]:
        """Return the best, one in `reduction_factor`, of all trials at a rung, in order."""
        there = _at(rung, own)
        return there[: len(there) // self.config.search.reduction_factor]

    def _outdone(self, rung: int, own: Sequence[_Trial], new: int) -> Iterator[_Trial]:
        """Yield trials that wait at a rung and can no longer be among its best.

        A trial is kept if it may be needed as one of the wanted trials: it ends only if the wanted
        number of better trials at this rung may still finish, plus a few spares for failures until
        enough trials have finished.

        Args:
            rung: an epoch.
            own: the study's trials.
            new: number of trials that may still start.
        """
        there = _at(rung, own)
        coming = new + sum(t.state == TrialState.RUNNING and t.reached < rung for t in own)
        most = (len(there) + coming) // self.config.search.reduction_factor
        done = sum(t.state == TrialState.COMPLETE for t in own)
        enough = self._wanted + (SPARE if done < self._wanted else 0)
        sound = 0  # better trials that have not failed or been stopped
        for rank, trial in enumerate(there):
            waits = trial.reached == rung and self._is_free(trial) and not trial.is_over
            if waits and rank >= most and sound >= enough:
                yield trial
            sound += trial.state in (TrialState.RUNNING, TrialState.COMPLETE)

    def _is_free(self, trial: _Trial) -> bool:
        return trial.state == TrialState.RUNNING and trial.number not in self._handed_out

    def _foremost(self, own: Sequence[_Trial]) -> _Trial | None:
        """Return the best waiting trial at the highest rung, to resume at the end, or None.

        While too few trials have finished or are running, any waiting trial qualifies; after that
        only trials with a better objective than the finished ones.
        """
        done = sorted(t.standing for t in own if t.state == TrialState.COMPLETE)
        bar = math.inf
        if len(done) >= self._wanted:
            bar = done[self._wanted - 1]
        elif len(done) + len(self._handed_out) >= self._wanted:
            return None
        free = [trial for trial in own if self._is_free(trial)]
        able = [t for t in free if t.standing < bar and not self._is_lost(t)]
        return min(able, key=_by_rung, default=None)

    def _is_lost(self, trial: _Trial) -> bool:
        """Return whether `search.least_chance` rules out a waiting trial."""
        known = math.isfinite(trial.standing)
        return known and self.hopeless(trial.reached, trial.standing) is not None


def _by_rung(trial: _Trial) -> tuple[int, float, int]:
    """Sort key: the most advanced trial first, then the best objective."""
    return -trial.reached, trial.standing, trial.number


def _trial(frozen: FrozenTrial) -> _Trial:
    kept = frozen.user_attrs.get("checkpoint")
    reached = kept["epoch"] if kept else 0
    told = frozen.user_attrs.get(f"epoch/{reached:05d}") or {}
    objectives = frozen.intermediate_values
    done = frozen.state == TrialState.COMPLETE
    standing = float(frozen.values[0]) if done else objectives.get(reached, math.inf)
    over = bool(told.get("early_stopped"))
    return _Trial(frozen.number, frozen.state, reached, over, standing, objectives)


def _at(rung: int, own: Sequence[_Trial]) -> list[_Trial]:
    """Return all trials that have reached a rung, best first."""
    there = [t for t in own if rung in t.objectives and (t.reached >= rung or _ended(t))]
    return sorted(there, key=lambda trial: (trial.objectives[rung], trial.number))


def _ended(trial: _Trial) -> bool:
    return trial.state != TrialState.RUNNING
