"""A Ray Tune searcher that is backed by the ledger.

Plain OptunaSearch marks stopped trials as COMPLETE, never ends a trial whose metric is NaN, and
loses running trials when the driver dies. Here the ledger is the source of truth: the searcher
takes proposals from it and ends trials in it.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from model.files import write_text
from tuner.checkpoints import Storage, StorageOut, storage_error
from tuner.disk import disk_error, speaks_of_full_disk
from tuner.errors import StudyError
from tuner.folder import RunFolder
from tuner.records import Assignment, End
from tuner.retries import exhausted_reason
from tuner.study import Ledger
from tuner.trainable import (
    BEQUEATHS,
    CHECKPOINT,
    CONFIG,
    DEVICE,
    DONOR,
    GIVE_UP,
    HOME,
    NUMBER,
    RESUME,
    STUDY,
    UNTIL,
)
from tuner.trial import DIVERGED, DeviceLost
from tuner.watchers import Watcher

logger = logging.getLogger(__name__)

# Messages of the trial itself and of Ray's memory monitor, which kills processes that exhaust a
# machine's memory. The kernel's OOM killer leaves no such message: Ray's line of possible causes,
# which mentions it, must not match.
_OUT_OF_MEMORY = re.compile(
    r"MemoryExhausted|memory usage threshold|running low on memory|memory pressure \(OOM\)"
)


class LedgerSearch(OptunaSearch):
    """OptunaSearch on the ledger's study that records the correct final state of every trial."""

    def __init__(
        self,
        ledger: Ledger,
        watcher: Watcher,
        folder: RunFolder,
        *,
        device: str,
        n_nodes: Callable[[], int] = lambda: 1,
        stop: Callable[[], bool] = lambda: False,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        Searcher.__init__(self, metric="objective", mode="min")
        self._ledger = ledger
        self._watcher = watcher
        self._folder = folder
        self.storage = Storage.of(folder, ledger.config.resources)
        self._device = device
        self._n_nodes = n_nodes  # number of nodes at the time of the call
        self._stop = stop
        self._after = after
        self._orphans = deque(ledger.orphans())
        self._numbers: dict[str, int] = {}
        self._proposed: dict[str, Assignment] = {}  # not yet taken by a machine
        self._ended: set[str] = set()
        self._in_a_row: dict[int, int] = {}  # consecutive losses without a finished epoch
        self._counted: set[str] = set()  # trials whose last loss was handled, no epoch since
        self._failed_on: dict[str, list[str]] = {}  # reasons of consecutive failures, by node
        self._alive: set[str] = set()  # trials that finished an epoch in this session
        self._given_up: dict[str, str] = {}
        self._stopped: set[str] = set()
        self.closed = False
        self.cut_short: StudyError | None = None  # the error that ends the session
        # Attributes of the base class; the study is that of the ledger.
        self._space = dict(ledger.config.search.space)
        self._ot_study: Any = ledger.optuna_study
        self._ot_trials: dict[str, Any] = {}
        self._completed_trials = self._ended

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial, interrupted trials first; None while all trials wait."""
        if self.closed or self.cut_short or self._stop():
            return Searcher.FINISHED
        while True:
            self._settle()
            found = self._orphans.popleft() if self._orphans else self._ledger.ask()
            if found is None:
                self._settle()  # it is known now that no new trial is left
                # A running trial may still be returned to the ledger.
                return None if self._numbers.keys() - self._ended else Searcher.FINISHED
            self._numbers[trial_id] = found.number
            try:
                config = self._ledger.trial_config(found)
            except ValueError as error:
                self._watcher.started(found)
                self._end(trial_id, "failed", reason=f"configuration: {error}")
                self._ended.discard(trial_id)
                del self._numbers[trial_id]  # the next trial reuses Ray's trial id
                continue
            self._proposed[trial_id] = found
            self._watcher.proposed(found)
            return {
                NUMBER: found.number,
                STUDY: self._ledger.config.name,
                CONFIG: config.model_dump(mode="json"),
                DEVICE: self._device,
                HOME: self.storage.trial(found.number),
                RESUME: found.checkpoint,
                DONOR: found.donor,
                UNTIL: found.until,
                BEQUEATHS: found.bequeaths,
            }

    def _settle(self) -> None:
        for ended in self._ledger.settle():
            self._watcher.finished(ended.number, ended.state, ended.reason)
            self._after()

    def began(self, trial_id: str) -> None:
        """Handle that a machine has started a trial, for the first time or again."""
        found = self._proposed.pop(trial_id, None)
        if found is not None:
            self._watcher.started(found)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Do nothing: :meth:`reported` receives every epoch, including the last one."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """End a trial as done, pruned, failed or lost, or return it to the ledger for later."""
        if trial_id not in self._numbers or trial_id in self._ended or self.closed:
            return
        if error or result is None:
            self._abandoned(trial_id)
        elif result.get("failed"):
            self._suspect(trial_id, result)
            self._end(
                trial_id, "failed", reason=result.get("reason"), traceback=result.get("traceback")
            )
        elif result.get("paused") and trial_id not in self._stopped:
            self._ended.add(trial_id)
            self._ledger.hand_back(self._numbers[trial_id])
            self._watcher.handed_back(self._numbers[trial_id])
        else:
            state: End = "done" if result.get("finished") else "pruned"
            self._end(trial_id, state, objective=result.get("objective"))

    def _abandoned(self, trial_id: str) -> None:
        """Handle a trial that Ray does not restart although it has not been given up.

        An actor that dies while it sets up a trial is reported twice: as a dead actor, after which
        Ray puts the trial back into its queue, and as a failed task of a queued trial, which Ray
        ends. The ledger's trial resumes as a new Ray trial.
        """
        if trial_id not in self._given_up and trial_id not in self._counted:
            self.lost(trial_id, "its process ended while it took the trial")
        if trial_id in self._given_up:  # and the actor that should report it did not start
            self._end(trial_id, "failed", reason=self._given_up[trial_id])
            return
        self._ended.add(trial_id)
        self._ledger.hand_back(self._numbers[trial_id])

    def _suspect(self, trial_id: str, result: dict[str, Any]) -> None:
        """End the session if one node repeatedly fails trials immediately for the same reason.

        Such a node (without a compiler or a driver) would take and fail one trial after another
        until the study is used up. Divergence is not counted, as it does not depend on the node. On
        a single node, the limit is raised by the number of running trials, since these may show
        that the node works.
        """
        reason, node = str(result.get("reason")), str(result.get("node_id"))
        own = trial_id in self._alive or trial_id in self._given_up or reason.startswith(DIVERGED)
        if own:
            return
        reasons = self._failed_on.setdefault(node, [])
        if reasons and reasons[-1] != reason:
            reasons.clear()
        reasons.append(reason)
        at_work = len(self._numbers.keys() - self._ended) - 1
        most = self._ledger.config.resources.max_failures + at_work * (self._n_nodes() == 1)
        if len(reasons) > most:
            self.cut_short = storage_error(
                self._folder.path,
                f"{len(reasons)} trials in a row have failed on {result.get('node')} before they "
                f"had finished an epoch, each with: {reason}; mend that machine or the study",
            )

    def lost(self, trial_id: str, reason: str) -> dict[str, Any]:
        """Handle that a trial's process ended without a result, and that Ray starts another one.

        Returns:
            Changes to the configuration that Ray passes to the next actor. A trial that is given up
            ends on its next actor.
        """
        number = self._numbers[trial_id]
        self._counted.add(trial_id)
        if speaks_of_full_disk(reason):
            # Not the trial's fault: end the session.
            self.cut_short = disk_error(self._folder.path, reason)
            return {}
        if _OUT_OF_MEMORY.search(reason):
            parts = self._ledger.out_of_memory(number, reason)
            if parts is None:
                return self._give_up(trial_id, exhausted_reason(reason))
            self._watcher.halved(number, parts, reason)
            going_on = self._ledger.going_on(number)
            config = self._ledger.trial_config(going_on)
            return {CONFIG: config.model_dump(mode="json"), RESUME: going_on.checkpoint}
        self._in_a_row[number] = times = self._in_a_row.get(number, 0) + 1
        self._ledger.lost(number, reason)
        if times > self._ledger.config.resources.max_failures:
            if any(kind.__name__ in reason for kind in (StorageOut, DeviceLost)):  # nor is this
                self.cut_short = storage_error(self._folder.path, reason)
                return {}
            return self._give_up(
                trial_id,
                f"lost: its process ended {times} times in a row before it had finished an epoch "
                f"({reason}); a crash of the trial's own looks like a lost machine",
            )
        self._watcher.lost(number, reason)
        return {RESUME: self._ledger.going_on(number).checkpoint}

    def _give_up(self, trial_id: str, reason: str) -> dict[str, Any]:
        self._given_up[trial_id] = reason
        return {GIVE_UP: reason}

    def reported(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Record an epoch and its checkpoint, which is on disk; return whether the trial ends."""
        number = self._numbers.get(trial_id)
        if number is None or trial_id in self._ended or self.closed:
            return False
        if not result.get("failed") and not result.get("repeated"):
            self._in_a_row.pop(number, None)
            self._failed_on.pop(str(result.get("node_id")), None)
            self._alive.add(trial_id)
            self._counted.discard(trial_id)
            metrics = own_metrics(result)
            if self._ledger.report(number, metrics, result.get(CHECKPOINT)) is not None:
                self._stopped.add(trial_id)
            self._watcher.reported(number, metrics)
        return trial_id in self._stopped

    def _end(self, trial_id: str, state: End, **details: Any) -> None:
        number = self._numbers[trial_id]
        self._ended.add(trial_id)
        ended = self._ledger.finish(number, state, **details)
        if details.get("traceback"):
            note = self._folder.trial(number) / "error.txt"
            write_text(note, details["traceback"])
        self._watcher.finished(number, ended, self._ledger.trial(number).reason)
        self._after()

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is the state."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray pickles a Tuner's parts with its results; the state of this one is in the ledger.
        return (str, (type(self).__name__,))


class LedgerCallback(Callback):
    """Forwards Ray's events to the ledger through the searcher."""

    def __init__(self, search: LedgerSearch) -> None:
        self._search = search

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Handle that a trial starts on a machine."""
        self._search.began(trial.trial_id)

    def on_trial_recover(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        """Handle that a trial lost its machine and waits for another one."""
        changes = self._search.lost(trial.trial_id, _what_happened(trial))
        trial.config.update(changes)
        if GIVE_UP in changes:
            trial.max_failures = trial.num_failures  # the next failure ends it

    def __reduce__(self) -> tuple[Any, ...]:
        return (str, (type(self).__name__,))


def _what_happened(trial: Trial) -> str:
    """Return one line on a trial's last failure from Ray's error file."""
    try:
        text = Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
    except (OSError, TypeError):
        return f"failure {trial.num_failures}"
    last = re.sub(r"\x1b\[[0-9;]*m", "", text).rpartition("Failure #")[2].splitlines()[1:]
    lines = [line.strip() for line in last if line.strip()]
    errors = [
        line
        for line in lines
        if re.match(r"[\w.]+(Error|Exception|Lost|Exhausted|Out)\b.*: ", line)
    ]
    chosen = errors[-1] if errors else " ".join(lines[:1])
    return chosen[:200] or f"failure {trial.num_failures}"


_RAY_KEYS = frozenset(
    {
        "config", "date", "done", "experiment_tag", "hostname", "iterations_since_restore",
        "node_ip", "pid", "time_since_restore", "time_this_iter_s", "time_total_s", "timestamp",
        "training_iteration", "trial_id", "failed", "finished", "paused", CHECKPOINT,
    }
)  # fmt: skip


def own_metrics(result: dict[str, Any]) -> dict[str, Any]:
    """Return the trial's own metrics, without those that Ray adds."""
    return {
        key: value
        for key, value in result.items()
        if key not in _RAY_KEYS and not key.startswith("config/")
    }
