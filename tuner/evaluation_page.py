"""The evaluation as one self-contained page."""

from __future__ import annotations

from typing import Any

from tuner.pages.markup import note
from tuner.pages.scoreboard import HOW, suite_charts
from tuner.pages.shell import Section, document


def page(content: dict[str, Any]) -> str:
    """Return the page as text; it can be opened offline."""
    told = "" if content["snr"] == "known" else " No estimator is told the SNR."
    network = content["checkpoint"] or "none"
    return document(
        "Estimators on the same scenes",
        note(f"Network: {network}.{told} {HOW}"),
        [
            Section(f"{name}: {suite['description']}", suite_charts(suite))
            for name, suite in content["suites"].items()
        ],
    )
