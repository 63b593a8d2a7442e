"""The end of a session: writes results and report, scores the winner, and prints a summary."""

from __future__ import annotations

import json
import logging
import shlex
from collections import Counter
from collections.abc import Callable
from typing import Any

from model.config import OBJECTIVES
from tuner.command import DONE, INTERRUPTED, NOTHING_FINISHED
from tuner.config import StudyConfig
from tuner.folder import RunFolder
from tuner.gain import gain_of, untrained_objective
from tuner.limits import Ended, Limits, why_ended
from tuner.pareto import pareto_front
from tuner.promotion import Promotion
from tuner.records import State
from tuner.report import write_report
from tuner.results import drop_losers, winners, write_best, write_promoted, write_trials
from tuner.scenes import ensure_scenes, load_winner
from tuner.study import Ledger
from tuner.telemetry import Progress

logger = logging.getLogger(__name__)

_SCORED_SCENES = 256  # scenes on which the winner is compared with NOMP


def conclude(
    folder: RunFolder,
    ledger: Ledger,
    promotion: Promotion | None,
    progress: Progress,
    early: Ended | None,
    resume: str,
    *,
    interrupted: bool,
) -> int:
    """Write the results and print how the session ended.

    Args:
        folder: the run folder.
        ledger: the ledger of the search.
        promotion: the promotion of its best trials, if requested.
        progress: prints messages to the user.
        early: the limit that ended it before all trials had run, if any.
        resume: the command that resumes the study.
        interrupted: whether the user interrupted the session.

    Returns:
        The exit code of the command.
    """
    write_trials(folder, ledger)
    over = why_ended(ledger, Limits(ledger)) is not None  # else a promotion was of fewer trials
    best = write_best(folder, ledger, promotion if over else None)
    drop_losers(folder, ledger, *winners(ledger))
    if promotion is not None:
        write_promoted(folder, promotion)
    else:  # of an earlier promotion, which no longer applies; the ledger keeps its runs
        folder.promoted_csv.unlink(missing_ok=True)
    scored = best is not None and not interrupted
    if not scored:  # otherwise it is written below, with the winner's scores
        _draw_report(folder, ledger, progress)
    counts = Counter(trial.state for trial in ledger.trials())
    states: tuple[State, ...] = ("running", "done", "pruned", "failed")
    words: dict[State, str] = {"running": "to go on"}
    summary = ", ".join(f"{counts[s]} {words.get(s, s)}" for s in states if counts[s])
    progress.say(f"trials: {summary or 'none'}")
    where = shlex.quote(str(folder.path))
    if (first := ledger.best()) is not None:
        untrained = untrained_objective(ledger.trials())
        beside = f" (untrained networks: {untrained:.5f})" if untrained is not None else ""
        where_best = "best" if promotion is None else "best in the search"
        progress.say(
            f"{where_best}: trial {first.number:04d}, objective {first.objective:.5f}{beside}"
        )
        if gain := gain_of(ledger.config, ledger.trials(), first):
            what = OBJECTIVES[ledger.config.objective]
            progress.say(f"{gain} (objective: {what}; less is better)")
        own = first.metrics.get("untrained_objective")
        if own is not None and first.objective is not None and first.objective >= own:
            progress.say(
                "training did not help: the winner is no better than before its first step; try "
                "more epochs (--epochs), more scenes or other learning rates in search.space",
                logging.WARNING,
            )
    if study_cost := ledger.config.search.cost:
        front = ", ".join(
            f"{t.number:04d} ({t.metrics[study_cost]:,.0f} {study_cost}, {t.objective:.5f})"
            for t in pareto_front(ledger)
        )
        progress.say(f"Pareto front, cheapest first: {front or 'no trial'}; networks: pareto/")
    for line in promotion.summary() if promotion is not None else []:
        progress.say(line)
    if best is not None and not folder.best.exists():
        progress.say(
            f"best/ was not written: the checkpoint of trial {best.number:04d} cannot be had now "
            f"({folder.log} says why); --resume tries again",
            logging.WARNING,
        )
    if interrupted:
        progress.say(f"interrupted; go on with: {resume}")
        return INTERRUPTED
    if early is not None:
        progress.say(f"ended early: {early.reason}; go on with: {resume} {early.remedy}")
    if best is None:
        reasons = {t.reason for t in ledger.trials() if t.state == "failed" and t.reason}
        why = f"; for example: {sorted(reasons)[0]}" if reasons else ""
        progress.say(f"no trial finished{why}", logging.ERROR)
        return NOTHING_FINISHED
    try:
        study = ledger.config
        _attempt(lambda: _score_winner(folder, study, progress), progress, "evaluation.json")
        with progress.waiting("finding sources in scenes for the report"):
            _attempt(lambda: ensure_scenes(folder, study), progress, "scenes.json")
    except KeyboardInterrupt:
        progress.say(f"the winner's scoring was interrupted; it is made up for with: {resume}")
    _draw_report(folder, ledger, progress)
    progress.say(f"report: {folder.report}")
    if promotion is None or promotion.winner() is None:
        progress.say(f"train the winner at full budget: python -m tuner.train --from {where}")
    if folder.best.exists():
        network = shlex.quote(str(folder.best))
        progress.say(f"locate with it: python -m model.locate SNAPSHOTS --checkpoint {network}")
    return DONE


def _draw_report(folder: RunFolder, ledger: Ledger, progress: Progress) -> None:
    with progress.waiting("drawing the report"):
        _attempt(lambda: write_report(folder, ledger), progress, "report.html")


def _score_winner(folder: RunFolder, study: StudyConfig, progress: Progress) -> None:
    """Write evaluation.json, which compares the winner with NOMP.

    Simulated scenes are ones that no trial has seen. Of recorded scenes the test split is used, or
    else the validation split, on which the winner was chosen; the result says so.
    """
    from tuner.evaluation import evaluate_suite, evaluation_of, write_evaluation
    from tuner.scoreboard import REFERENCE
    from tuner.scoretable import signed

    if not (folder.best / "config.json").exists():
        return  # its checkpoint was not accessible, which has been reported
    fingerprint = folder.fingerprint()
    found = _scored_before(folder, fingerprint)
    if found is None:
        localizer = load_winner(folder, study)
        with progress.counting() as advance:
            found = evaluate_suite(
                "nominal",
                localizer.config,
                localizer,
                n_scenes=_SCORED_SCENES,
                classical=[REFERENCE],
                say=logger.info,
                advance=advance,
            )
            content = evaluation_of({"nominal": found}, localizer.config, checkpoint=folder.best)
            write_evaluation(folder.evaluation, {"network": fingerprint, **content})
    progress.say(f"winner beside NOMP, both told the SNR; scenes: {found['scenes']}")
    for name, report in found["methods"].items():
        numbers = report["overall"]
        progress.say(f"{name}: F1 {numbers['f1']:.3f}, GOSPA {numbers['gospa_m']:.2f} m")
    if f1 := found["paired_f1"].get(REFERENCE, {}).get("network"):
        cost = found["paired_gospa_m"][REFERENCE]["network"]
        progress.say(f"winner less NOMP [95 %]: F1 {signed(f1)}, GOSPA {signed(cost)} m")
    progress.say(f"scoreboard: {folder.path / 'evaluation.html'}")


def _scored_before(folder: RunFolder, fingerprint: str) -> dict[str, Any] | None:
    """Return the scores of an earlier session if the winner is the same network."""
    try:
        content = json.loads(folder.evaluation.read_text(encoding="utf-8"))
        found = dict(content["suites"]["nominal"])
        return found if content["network"] == fingerprint and "paired_gospa_m" in found else None
    except (OSError, ValueError, KeyError, TypeError):  # absent, damaged or in another format
        return None


def _attempt(work: Callable[[], Any], progress: Progress, what: str) -> None:
    # A page that cannot be drawn must not affect the results that are already on disk.
    try:
        work()
    except Exception as error:
        logger.exception("%s was not written", what)
        progress.say(f"{what} was not written: {error}", logging.WARNING)
