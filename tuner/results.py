"""The study's results as files: trials.csv, best.json and the winner's network."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from typing import Any

from model.files import write_text
from tuner.checkpoints import Storage, drop, fetched
from tuner.config import ResourcesConfig
from tuner.files import replace_folder
from tuner.folder import RunFolder
from tuner.study import Ledger, TrialRecord

logger = logging.getLogger(__name__)

_SCORES = ("nmse_blend", "f1", "gospa", "count_accuracy")  # of the last epoch
_COLUMNS = (
    "trial", "state", "objective", "epochs", "seed", "seconds", "gpu_seconds", "node", "device",
    "skipped_steps", "solver_fallbacks", *_SCORES, "reason", "note",
)  # fmt: skip


def write_trials(folder: RunFolder, ledger: Ledger) -> None:
    """One line a trial, failed ones with their reason."""
    paths = list(ledger.config.search.space)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*_COLUMNS, *paths])
    for trial in ledger.trials():
        metrics = trial.metrics
        writer.writerow(
            [
                trial.number,
                trial.state,
                "" if trial.objective is None else repr(trial.objective),
                trial.epoch,
                trial.seed,
                "" if trial.seconds is None else f"{trial.seconds:.1f}",
                "" if trial.gpu_seconds is None else f"{trial.gpu_seconds:.1f}",
                metrics.get("node", ""),
                metrics.get("device", ""),
                metrics.get("skipped_steps", ""),
                "" if trial.fallbacks is None else f"{trial.fallbacks:.0f}",
                *(_cell(metrics.get(name, "")) for name in _SCORES),
                trial.reason or "",
                trial.note,
                *(_cell(trial.params.get(path, "")) for path in paths),
            ]
        )
    write_text(folder.trials_csv, stream.getvalue())


def write_best(folder: RunFolder, ledger: Ledger) -> TrialRecord | None:
    """best.json: the winner with all that is needed to train it again."""
    best = ledger.best()
    if best is None:
        return None
    study = ledger.config
    config = ledger.trial_config(best)
    device = best.metrics.get("device", "cpu")
    content = {
        "study": study.name,
        "trial": best.number,
        "objective": best.objective,
        "metrics": {k: _plain(v) for k, v in best.metrics.items()},
        "params": best.params,
        "seed": best.seed,
        "epochs": study.training.epochs,
        "full_epochs": study.search.full_epochs,
        "device": device,
        "config": config.model_dump(mode="json"),
    }
    write_text(folder.best_json, json.dumps(content, indent=2) + "\n")
    return best


def export_winner(folder: RunFolder, best: TrialRecord) -> bool:
    """best/: the weights that were scored; False where the checkpoint is out of reach."""
    from model.checkpoint import CheckpointError, export_best

    if best.checkpoint is None:
        logger.warning("trial %04d has no checkpoint: best/ is not written", best.number)
        return False
    try:
        with fetched(best.checkpoint) as source:
            replace_folder(folder.best, lambda out: export_best(source, out))
    except (CheckpointError, OSError) as error:
        logger.warning("trial %04d: checkpoint cannot be exported: %s", best.number, error)
        return False
    return True


def drop_losers(folder: RunFolder, ledger: Ledger) -> None:
    """Delete checkpoints that nobody will go on from: all but the winner's and the running."""
    best = ledger.best()
    kept = best.checkpoint if best is not None else None
    ended = {trial.number for trial in ledger.trials() if trial.state != "running"}
    # `--local` writes to the run folder whatever storage the study names.
    storages = {Storage.of(folder, ResourcesConfig()), Storage.of(folder, ledger.config.resources)}
    for storage in storages:
        try:
            found = list(storage.checkpoints())
        except OSError as error:
            logger.warning("checkpoints of ended trials stay in %s: %s", storage.root, error)
            continue
        for number, location in found:
            if number in ended and location != kept:
                drop(location)


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)
