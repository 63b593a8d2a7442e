"""Writes a study's results: trials.csv, promoted.csv, best.json and the winner's network."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any

from model.config import TrialConfig
from model.files import write_text
from tuner.checkpoints import Storage, drop, fetched
from tuner.config import ResourcesConfig
from tuner.disk import full_disk
from tuner.files import replace_folder
from tuner.folder import RunFolder, checkpoint_epoch
from tuner.pareto import pareto_front
from tuner.promotion import Promoted, Promotion
from tuner.records import TrialRecord
from tuner.study import Ledger

logger = logging.getLogger(__name__)

_SCORES = ("nmse_blend", "f1", "gospa", "count_accuracy")  # metrics of the best epoch
_COLUMNS = (
    "trial", "state", "objective", "epochs", "seed", "seconds", "gpu_seconds", "node", "device",
    "skipped_steps", "solver_fallbacks", "flops", *_SCORES, "reason", "note",
)  # fmt: skip
_PROMOTED_COLUMNS = (
    "rank", "trial", "mean", "std", "search_objective", "run", "seed", "state", "objective",
    "epochs", "seconds", "gpu_seconds", "node", "device", *_SCORES, "reason", "note",
)  # fmt: skip


def write_trials(folder: RunFolder, ledger: Ledger) -> None:
    """Write trials.csv with one line per trial, including failed ones with their reason."""
    paths = list(ledger.config.search.space)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*_COLUMNS, *paths])
    for trial in ledger.trials():
        metrics, scored = trial.metrics, trial.scored
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
                metrics.get("flops", ""),
                *(_cell(scored.get(name, "")) for name in _SCORES),
                trial.reason or "",
                trial.note,
                *(_cell(trial.params.get(path, "")) for path in paths),
            ]
        )
    write_text(folder.trials_csv, stream.getvalue())


def write_promoted(folder: RunFolder, promotion: Promotion) -> None:
    """Write promoted.csv with one line per promoted run, the best configuration first."""
    paths = list(promotion.config.search.space)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*_PROMOTED_COLUMNS, *paths])
    for rank, promoted in enumerate(promotion.configurations(), start=1):
        trial = promoted.trial
        for run in promoted.runs:
            metrics = run.metrics
            row = [
                *(rank, trial.number, promoted.mean, promoted.std, trial.objective),
                *(run.number, run.seed, run.state, run.objective, run.epoch),
                *("" if s is None else f"{s:.1f}" for s in (run.seconds, run.gpu_seconds)),
                *(metrics.get(name) for name in ("node", "device")),
                *(run.scored.get(name) for name in _SCORES),
                *(run.reason, run.note),
                *(trial.params[path] for path in paths),
            ]
            writer.writerow(["" if value is None else _cell(value) for value in row])
    write_text(folder.promoted_csv, stream.getvalue())


def write_best(
    folder: RunFolder,
    ledger: Ledger,
    promotion: Promotion | None = None,
    patience: float | None = None,
) -> TrialRecord | None:
    """Write the winner's network to best/, and best.json with all that is needed to retrain it.

    The network is written first, so that best.json describes the content of best/. If the
    checkpoint is not accessible, best/ is absent and the network of an earlier winner is moved to
    best.earlier/. For a study of two objectives the networks of the Pareto front are written to
    pareto/.

    Args:
        folder: the run folder.
        ledger: the ledger of the search.
        promotion: the promotion of the search. Once it has ended with a winner, best.json describes
            the best run of that configuration, with mean and spread over all its seeds.
        patience: seconds for which an unresponsive storage is retried.

    Returns:
        The trial or run whose network is the study's result, or None.
    """
    winner = promotion.winner() if promotion is not None else None
    best = winner.best if winner is not None else ledger.best()
    if best is None:
        return None
    study = ledger.config
    front = _write_front(folder, ledger, patience)
    source = ledger if promotion is None or winner is None else promotion
    trained, config = source.config, source.trial_config(best)
    device = best.metrics.get("device", "cpu")
    content = {
        "study": study.name,
        "trial": best.number if winner is None else winner.trial.number,
        "objective": best.objective,
        "metrics": {k: _plain(v) for k, v in best.scored.items()},
        "params": best.params,
        "seed": best.seed,
        "epochs": trained.training.epochs,
        "full_epochs": study.search.full_epochs,
        "device": device,
        "config": config.model_dump(mode="json"),
    }
    if best.heir is not None:
        content["lineage"] = [
            {"trial": ancestor.number, "epochs": epochs, "params": ancestor.params,
             "config": source.trial_config(ancestor).model_dump(mode="json")}
            for ancestor, epochs in lineage(source, best)
        ]  # fmt: skip
    if winner is not None:
        content["promoted"] = _promoted(winner)
    if front is not None:
        content["pareto"] = front
    if not _is_of(folder.best, config):
        if export_network(best, folder.best, patience):
            shutil.rmtree(folder.earlier_best, ignore_errors=True)
        elif folder.best.exists():
            shutil.rmtree(folder.earlier_best, ignore_errors=True)
            folder.best.rename(folder.earlier_best)
    write_text(folder.best_json, json.dumps(content, indent=2) + "\n")
    for beaten in folder.pareto.glob("*"):
        if beaten.name not in {_name(entry["trial"]) for entry in front or ()}:
            shutil.rmtree(beaten, ignore_errors=True)
    return best


def _is_of(network: Path, config: TrialConfig) -> bool:
    """Return whether an exported network is that of a trial, by its seed, which is unique."""
    try:
        held = json.loads((network / "config.json").read_text(encoding="utf-8"))
        return bool(held["seed"] == config.seed)
    except (OSError, ValueError, KeyError, TypeError):  # absent, damaged or in another format
        return False


def _name(number: int) -> str:
    return f"{number:04d}"


def _write_front(
    folder: RunFolder, ledger: Ledger, patience: float | None
) -> list[dict[str, Any]] | None:
    """Write the front's networks to pareto/; return their best.json entries, or None."""
    if (cost := ledger.config.search.cost) is None:
        return None
    found = []
    for trial in pareto_front(ledger):
        network = folder.pareto / _name(trial.number)
        there = network.exists() or export_network(trial, network, patience)
        found.append(
            {
                "trial": trial.number,
                "objective": trial.objective,
                cost: trial.metrics[cost],
                "params": trial.params,
                "seed": trial.seed,
                "config": ledger.trial_config(trial).model_dump(mode="json"),
                "network": str(network.relative_to(folder.path)) if there else None,
            }
        )
    return found


def winners(ledger: Ledger) -> list[TrialRecord]:
    """Return the trials whose checkpoints are kept: the best one and those on the Pareto front."""
    found = [] if (best := ledger.best()) is None else [best]
    return found if ledger.config.search.cost is None else [*found, *pareto_front(ledger)]


def lineage(ledger: Ledger, trial: TrialRecord) -> list[tuple[TrialRecord, int]]:
    """Return the ancestors of a trial's weights, oldest first, each with its last epoch used."""
    found: list[tuple[TrialRecord, int]] = []
    while trial.heir is not None:
        epoch, trial = trial.heir.epoch, ledger.trial(trial.heir.donor)
        found.insert(0, (trial, epoch))
    return found


def _promoted(winner: Promoted) -> dict[str, Any]:
    """Return the promotion's results for the winner."""
    return {
        "mean": winner.mean,
        "std": winner.std,
        "seeds": winner.seeds,
        "failed": len(winner.failed),
        "search_objective": winner.trial.objective,
        "runs": [
            {"run": run.number, "seed": run.seed, "state": run.state, "reason": run.reason,
             "objective": run.objective if run.state == "done" else None}
            for run in winner.runs
        ],
    }  # fmt: skip


def export_network(trial: TrialRecord, place: Path, patience: float | None = None) -> bool:
    """Export the scored weights of a trial to a folder; return False if they are not accessible."""
    from model.checkpoint import CheckpointError, export_best

    if trial.checkpoint is None:
        logger.warning("trial %04d has no checkpoint: %s is not written", trial.number, place.name)
        return False
    try:
        with fetched(trial.checkpoint, patience) as source:
            replace_folder(place, lambda out: export_best(source, out))
    except (CheckpointError, OSError) as error:
        if full_disk(error) is not None:
            raise
        logger.warning("trial %04d: checkpoint cannot be exported: %s", trial.number, error)
        return False
    return True


def drop_losers(folder: RunFolder, ledger: Ledger, *winners: TrialRecord | None) -> None:
    """Delete checkpoints that are no longer needed: all but those of winners and running trials."""
    kept = {
        (winner.number, checkpoint_epoch(winner.checkpoint))
        for winner in winners
        if winner is not None and winner.checkpoint is not None
    }
    # `--local` writes to the run folder, regardless of the study's storage.
    storages = {Storage.of(folder, ResourcesConfig()), Storage.of(folder, ledger.config.resources)}
    for storage in storages:
        try:
            found = {location: number for number, location in storage.checkpoints()}
        except OSError as error:
            logger.warning("checkpoints of ended trials stay in %s: %s", storage.root, error)
            continue
        for location in ledger.unneeded((number, location) for location, number in found.items()):
            # Compare by trial and epoch, as a location may have more than one name.
            if (found[location], checkpoint_epoch(location)) not in kept:
                drop(location)


def _plain(value: Any) -> Any:
    """Replace non-finite floats by None, as JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)
