"""Runs a study's trials with Ray Tune."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from tuner.checkpoints import StorageOut, storage_error
from tuner.errors import HeadLost
from tuner.folder import RunFolder
from tuner.search import LedgerCallback, LedgerSearch
from tuner.study import Ledger
from tuner.trainable import NUMBER, TrialActor
from tuner.trial import trial_name
from tuner.watchers import Watcher

# Ray Tune's own output, loggers and snapshots are not wanted: the ledger is the record.
_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_MAX_PENDING_TRIALS_PG": "auto",
}
_OTHER_HEAD = "WrongClusterID"  # in the error of a head that has restarted without its state
_SCRATCH = ".ray"  # in the run folder: Ray would restore from its content, but the ledger does that


class LedgerStopper(tune.Stopper):
    """Passes every result to the ledger, which decides on pruning; stops the run on request."""

    def __init__(self, search: LedgerSearch, wished: Callable[[], bool]) -> None:
        self._search = search
        self._wished = wished

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return self._search.reported(trial_id, result)

    def stop_all(self) -> bool:
        return self._wished() or self._search.cut_short is not None

    def __reduce__(self) -> tuple[Any, ...]:
        return (str, (type(self).__name__,))


def run_distributed(
    ledger: Ledger,
    folder: RunFolder,
    progress: Watcher,
    *,
    gpus: float,
    device: str,
    concurrent: int,
    stop: Callable[[], bool],
    after: Callable[[], None],
) -> None:
    """Run the study to its end or until `stop` returns True.

    Args:
        ledger: the study.
        folder: the run folder, to which checkpoints are written unless the study names a storage.
        progress: receives trial events.
        gpus: GPUs per trial.
        device: the torch device of the trials.
        concurrent: number of concurrent trials.
        stop: called often; True ends the run and leaves running trials to be resumed.
        after: called after a trial has ended.

    Raises:
        StudyError: trials cannot be saved, as a disk is full or the storage cannot be used.
    """
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    # An actor takes the next step as confirmation that its last result was recorded.
    os.environ["TUNE_RESULT_BUFFER_LENGTH"] = "1"
    study = ledger.config
    resources = study.resources
    scratch = folder.path / _SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)  # left by a killed driver
    search = LedgerSearch(
        ledger, progress, folder, device=device, n_nodes=_n_nodes, stop=stop, after=after
    )
    try:
        search.storage.make()
    except StorageOut as error:
        raise storage_error(folder.path, str(error)) from error
    tuner = tune.Tuner(
        tune.with_resources(TrialActor, {"cpu": resources.cpus_per_trial or 1, "gpu": gpus}),
        tune_config=TuneConfig(
            search_alg=search,
            scheduler=FIFOScheduler(),  # the ledger prunes
            num_samples=-1,
            max_concurrent_trials=concurrent,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=RunConfig(
            name=_SCRATCH,
            storage_path=str(folder.path),
            failure_config=FailureConfig(max_failures=-1),  # LedgerSearch.lost gives up
            checkpoint_config=CheckpointConfig(checkpoint_at_end=False),  # TrialActor keeps its own
            callbacks=[LedgerCallback(search)],
            stop=LedgerStopper(search, stop),
            verbose=0,
        ),
    )
    # Ray's result grid looks for Ray's own result files, which are not written.
    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)
    try:
        tuner.fit()
    except RayError as error:
        if _OTHER_HEAD not in str(error):
            raise
        raise HeadLost("Ray's head has restarted and no longer knows this run") from error
    finally:
        search.closed = True
        shutil.rmtree(scratch, ignore_errors=True)
        # Ray Tune may have wrapped this error or treated it as a trial's failure.
        if ledger.database_lost is not None:
            raise ledger.database_lost
    if search.cut_short is not None:
        raise search.cut_short


def _n_nodes() -> int:
    return sum(bool(node["Alive"]) for node in ray.nodes())


def _trial_name(trial: Trial) -> str:
    return trial_name(trial.config[NUMBER])
