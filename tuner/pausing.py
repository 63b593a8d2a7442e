"""The ledger of ASHA as it was published: who waits at a rung goes on once among its best.

`asha` ends a trial at the first rung where too many are better, and lets the first ones pass, who
have nobody to be compared with. Here a trial waits at each rung with its checkpoint. A free slot
takes the best of those that wait among the best of a rung, one in `reduction_factor`, from the
highest rung down; where nobody is, a new trial begins. Nobody is stopped for good while it may
come to be among the best, and nobody goes on for having come first. Who may not any more, whatever
those that are still to come will reach, ends: of N trials some N / `reduction_factor` wait at most.
A few are spared until somebody has finished, as those in the lead may fail.

To whoever runs it, a trial that waits is one that was cut and goes on from its checkpoint. What is
decided follows from the ledger alone. When all trials have begun and none goes on by this rule, the
foremost do until one has finished (as many as are to be promoted) and nobody who waits stands
better already. All that wait then end as stopped at their rung. Where the study's time would end
before one has finished, the foremost goes on while there is time for it.

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

SPARE = 3  # trials that wait beside those who are wanted, until these have finished
_SLOWER = 1.2  # than its epochs so far a trial may become before it finishes too late


@dataclass(frozen=True)
class _Trial:
    """A trial, as far as it is compared."""

    number: int
    state: TrialState
    reached: int  # the last epoch that it need not train again
    is_over: bool  # whether its training has ended by itself with that epoch
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
        """Who goes on, or a new trial; None while others have to come first, or none is left."""
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
        """End those that wait in vain, whose checkpoints nobody needs any more.

        Returns:
            The trials that waited until now.
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
        """The rung after an epoch; None after the last."""
        return next((rung for rung in self._rungs if rung > epoch), None)

    def _own(self) -> list[_Trial]:
        return [_trial(frozen) for frozen in self._started(self._frozen())]

    def _next(self, own: Sequence[_Trial]) -> _Trial | None:
        """Who was cut between two rungs, or is the best of those that the rungs let go on."""
        for trial in own:
            if self._is_free(trial) and (trial.is_over or trial.reached not in self._rungs):
                return trial
        for rung in reversed(self._rungs):
            for trial in self._best_at(rung, own):
                if self._is_free(trial) and trial.reached == rung and not self._is_lost(trial):
                    return trial
        return None

    def _pressing(self, own: Sequence[_Trial], reached: int) -> _Trial | None:
        """Who goes on at once, as the study's time would be too short for it later, or None.

        As many of the foremost that can finish in time as are wanted, while too few have finished.
        It goes by the slowest trial so far; a study whose epochs take as long as each other, or
        nearly, has a winner when its time ends, where its time is enough for one.

        Args:
            own: the study's trials.
            reached: from which epoch a trial would go on to the next rung instead.
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
        # What a stretch takes beside its epochs; trials side by side share the study's time.
        lanes = 1 + len(self._handed_out)
        slower = _SLOWER * max(1.0, self.seconds * lanes / trained)
        pace = {t.number: slower * spent[t.number] / t.reached for t in begun}
        left, stretch = budget - self.seconds, (self._until(reached) or epochs) - reached
        elsewhere = stretch * max(pace.values())  # before this is asked again
        running = sorted((t for t in begun if t.state == TrialState.RUNNING), key=_by_rung)
        needed = {t.number: (epochs - t.reached) * pace[t.number] for t in running}
        able = [t for t in running if needed[t.number] <= left]
        for trial in able[:wanted]:
            if self._is_free(trial) and left < needed[trial.number] + elsewhere:
                return trial
        return None

    def _best_at(self, rung: int, own: Sequence[_Trial]) -> list[_Trial]:
        """The best, in order, of all that have come to a rung: one in `reduction_factor`."""
        there = _at(rung, own)
        return there[: len(there) // self.config.search.reduction_factor]

    def _outdone(self, rung: int, own: Sequence[_Trial], new: int) -> Iterator[_Trial]:
        """Who waits at a rung and will not be among its best, whoever comes there yet.

        Nor among the foremost: as many as are wanted have stood better here and may finish, and
        until they have a few more, in whose place others would fail.

        Args:
            rung: an epoch.
            own: the study's trials.
            new: trials that may begin yet.
        """
        there = _at(rung, own)
        coming = new + sum(t.state == TrialState.RUNNING and t.reached < rung for t in own)
        most = (len(there) + coming) // self.config.search.reduction_factor
        done = sum(t.state == TrialState.COMPLETE for t in own)
        enough = self._wanted + (SPARE if done < self._wanted else 0)
        sound = 0  # of the better ones
        for rank, trial in enumerate(there):
            waits = trial.reached == rung and self._is_free(trial) and not trial.is_over
            if waits and rank >= most and sound >= enough:
                yield trial
            sound += trial.state in (TrialState.RUNNING, TrialState.COMPLETE)

    def _is_free(self, trial: _Trial) -> bool:
        return trial.state == TrialState.RUNNING and trial.number not in self._handed_out

    def _foremost(self, own: Sequence[_Trial]) -> _Trial | None:
        """Who goes on at the end: the best at the highest rung where somebody waits, or None.

        As long as too few have finished, and are not on their way there; then, of those who stand
        better than they.
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
        """Whether a trial that waits has no chance to win any more, where that is asked."""
        known = math.isfinite(trial.standing)
        return known and self.hopeless(trial.reached, trial.standing) is not None


def _by_rung(trial: _Trial) -> tuple[int, float, int]:
    """The foremost first: who has come furthest, and of those who stands best."""
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
    """All that have come to a rung, best first."""
    there = [t for t in own if rung in t.objectives and (t.reached >= rung or _ended(t))]
    return sorted(there, key=lambda trial: (trial.objectives[rung], trial.number))


def _ended(trial: _Trial) -> bool:
    return trial.state != TrialState.RUNNING
