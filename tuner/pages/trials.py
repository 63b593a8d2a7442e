"""The table of trials."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner.pages.failures import fallbacks_of
from tuner.pages.markup import Markup, Number, note, table
from tuner.pages.timing import place_of
from tuner.records import STATE_WORDS

if TYPE_CHECKING:
    from tuner.pages.material import Material
    from tuner.records import TrialRecord

_MOST = 300


def trials(material: Material) -> Markup:
    """Return state, scores, time and parameters of all trials, or of the best and latest."""
    every = material.trials
    if not every:
        return note("No trial has started yet.")
    best = {t.number for t in material.ranking[: _MOST // 2]}
    rest = [t for t in every if t.number not in best]
    room = _MOST - len(best)
    shown = sorted(
        [t for t in every if t.number in best] + rest[-room:], key=lambda trial: trial.number
    )
    paths = list(material.study.search.space)
    heads = ["trial", "state", "objective", "F1", "GOSPA [m]", "epochs", "seconds", "skipped"]
    heads += ["fallbacks", "where", *paths, "reason", "note"]
    won = next((i for i, t in enumerate(shown) if t is material.best), None)
    left_out = (
        note(f"The best {len(best)} and the latest of {len(every):,} trials; all: trials.csv.")
        if len(shown) < len(every)
        else Markup("")
    )
    rows = [_row(trial, paths) for trial in shown]
    return Markup(table(heads, rows, marked=won, most=_MOST) + left_out)


def _row(trial: TrialRecord, paths: list[str]) -> list[object]:
    metrics = trial.metrics
    return [
        Number(f"{trial.number:04d}"),
        Markup(f"<span class='state {trial.state}'>{STATE_WORDS[trial.state]}</span>"),
        trial.objective,
        trial.scored.get("f1"),
        trial.scored.get("gospa"),
        trial.epoch,
        None if trial.seconds is None else round(trial.seconds, 1),
        metrics.get("skipped_steps"),
        fallbacks_of(trial) if trial.epochs else None,
        place_of(metrics) if metrics else "",
        *(trial.params.get(path) for path in paths),
        trial.reason or "",
        trial.note,
    ]
