"""What a search gained over the values that its study holds itself, which a first trial runs."""

from __future__ import annotations

from collections.abc import Iterable

from tuner.config import StudyConfig
from tuner.records import STATE_WORDS, TrialRecord


def gain_of(study: StudyConfig, trials: Iterable[TrialRecord], best: TrialRecord) -> str:
    """A sentence about the winner beside the study's own values; empty where no trial ran them."""
    start = study.base_point()
    own = next((trial for trial in trials if trial.params == start), None)
    if own is None or not start:
        return ""
    if own.number == best.number:
        return "It ran the study's own values: none that the search proposed did better."
    if own.state != "done" or own.objective is None or best.objective is None:
        return f"Trial {own.number:04d} ran the study's own values: {STATE_WORDS[own.state]}."
    gain = own.objective - best.objective
    # Of a likelihood, which may be below zero, there is no share.
    words = f"{gain:.3g} nat" if study.objective == "nll" else f"{gain / own.objective:.1%}"
    name = f"the study's own values (trial {own.number:04d})"
    return f"That is {words} below {name}, {own.objective:.5g}."
