"""Running the study's trials through Ray Tune."""

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
_OTHER_HEAD = "WrongClusterID"  # in what a head says that has restarted without its state
_SCRATCH = ".ray"  # in the run folder: by what is in it Ray would restore; the ledger does that


class LedgerStopper(tune.Stopper):
    """Hands every result to the ledger, whose verdict ends trials; ends the run where wished."""

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
    """Run the study to its end, or until `stop` says so.

    Args:
        ledger: the study.
        folder: where checkpoints go, unless the study names another storage.
        progress: who is told what happens.
        gpus: GPUs a trial.
        device: where trials compute.
        concurrent: trials side by side.
        stop: asked often; True ends the run and leaves running trials to a resume.
        after: called when a trial has ended.

    Raises:
        StudyError: trials could not be saved: a disk is full, or the storage cannot be used.
    """
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    # An actor takes the next step for word that its last result has been recorded.
    os.environ["TUNE_RESULT_BUFFER_LENGTH"] = "1"
    study = ledger.config
    resources = study.resources
    scratch = folder.path / _SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)  # of a driver that was killed
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
            scheduler=FIFOScheduler(),  # the ledger judges
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
    # Its result grid looks for Ray's own result files, which are not written.
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
        # What Ray Tune has taken for a trial's fault, or wrapped:
        if ledger.database_lost is not None:
            raise ledger.database_lost
    if search.cut_short is not None:
        raise search.cut_short


def _n_nodes() -> int:
    return sum(bool(node["Alive"]) for node in ray.nodes())


def _trial_name(trial: Trial) -> str:
    return trial_name(trial.config[NUMBER])
