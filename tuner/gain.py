"""The improvement of a search over the study's own values, which the first trial runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tuner.records import STATE_WORDS, TrialRecord

if TYPE_CHECKING:
    from model.config import Objective
    from tuner.config import StudyConfig


def gain_of(study: StudyConfig, trials: Sequence[TrialRecord], best: TrialRecord) -> str:
    """Return a sentence comparing the winner to the study's own values; empty if none ran them."""
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
    """Return the median objective of the study's untrained networks over its trials.

    The score of a single network depends on its random weights. None if no trial reported one.
    """
    told = [trial.metrics.get("untrained_objective") for trial in trials]
    known = [value for value in told if isinstance(value, float)]
    return statistics.median(known) if known else None


def change_in_words(objective: Objective, before: float, now: float, share: str = ".0%") -> str:
    """Describe how far an objective is below or above another one, as a share if meaningful.

    Args:
        objective: kind of objective. For a likelihood, which may be negative, there is no share.
        before: the value to compare with.
        now: the objective's value.
        share: format of a share.
    """
    change = now - before
    if objective == "nll" or before <= 0:
        words = f"{abs(change):.3g}" + " nat" * (objective == "nll")
    else:
        words = format(abs(change) / before, share)
    return f"{words} {'below' if change < 0 else 'above'}"
