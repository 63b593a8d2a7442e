"""What a search gained over the values that its study holds itself, which a first trial runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tuner.records import STATE_WORDS, TrialRecord

if TYPE_CHECKING:
    from model.config import Objective
    from tuner.config import StudyConfig


def gain_of(study: StudyConfig, trials: Sequence[TrialRecord], best: TrialRecord) -> str:
    """A sentence about the winner beside the study's own values; empty where no trial ran them."""
    start = study.base_point()
    own = next((trial for trial in trials if trial.params == start), None)
    if own is None or not start:
        return ""
    if own.number == best.number and len(trials) == 1:
        return ""
    if own.number == best.number:
        return "It ran the study's own values: none that the search proposed did better."
    if own.state != "done" or own.objective is None or best.objective is None:
        return f"Trial {own.number:04d} ran the study's own values: {STATE_WORDS[own.state]}."
    words = change_in_words(study.objective, own.objective, best.objective, ".1%")
    return f"That is {words} the study's own values (trial {own.number:04d}), {own.objective:.5g}."


def untrained_objective(trials: Sequence[TrialRecord]) -> float | None:
    """What the study's networks score before their first step, in the median over its trials.

    One of them alone is the luck of its weights. None where no trial has told.
    """
    told = [trial.metrics.get("untrained_objective") for trial in trials]
    known = [value for value in told if isinstance(value, float)]
    return statistics.median(known) if known else None


def change_in_words(objective: Objective, before: float, now: float, share: str = ".0%") -> str:
    """How far an objective lies below or above another one, a share of it if that makes sense.

    Args:
        objective: what it is. Of a likelihood, which may be below zero, there is no share.
        before: what it is compared with.
        now: the objective.
        share: how a share is written.
    """
    change = now - before
    if objective == "nll" or before <= 0:
        words = f"{abs(change):.3g}" + " nat" * (objective == "nll")
    else:
        words = format(abs(change) / before, share)
    return f"{words} {'below' if change < 0 else 'above'}"
