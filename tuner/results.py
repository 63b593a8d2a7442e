"""The study's results as files: trials.csv, best.json and the winner's network."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

from model.files import write_text
from tuner.files import replace_folder
from tuner.folder import RunFolder
from tuner.study import Ledger, TrialRecord

logger = logging.getLogger(__name__)

_SCORES = ("nmse_blend", "f1", "gospa", "count_accuracy")  # of the last epoch
_COLUMNS = (
    "trial", "state", "objective", "epochs", "seed", "seconds", "node", "device",
    "skipped_steps", "solver_fallbacks", *_SCORES, "reason",
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
                metrics.get("node", ""),
                metrics.get("device", ""),
                metrics.get("skipped_steps", ""),
                metrics.get("solver_fallbacks", ""),
                *(_cell(metrics.get(name, "")) for name in _SCORES),
                trial.reason or "",
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
    config = study.trial_config(best.params, best.seed)
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
        if "://" in best.checkpoint:
            from ray.tune import Checkpoint

            with Checkpoint(best.checkpoint).as_directory() as local:
                replace_folder(folder.best, lambda out: export_best(Path(local), out))
        else:
            source = Path(best.checkpoint)
            replace_folder(folder.best, lambda out: export_best(source, out))
    except (CheckpointError, OSError) as error:
        logger.warning("trial %04d: checkpoint cannot be exported: %s", best.number, error)
        return False
    return True


def drop_losers(folder: RunFolder, ledger: Ledger) -> None:
    """Delete checkpoints that nobody will go on from: all but the winner's and the running."""
    best = ledger.best()
    kept = best.checkpoint if best is not None else None
    running = ledger.running()
    for path in folder.trials.glob("[0-9]*/checkpoint*"):
        number = int(path.parent.name.partition("-")[0])  # 0007, 0007-after-epoch-3, 10007
        if number not in running and str(path) != kept:
            shutil.rmtree(path, ignore_errors=True)


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)
