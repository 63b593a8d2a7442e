"""A chart on a page: a plotly figure, a sentence that describes it, and its numbers.

Colours are variables of the page's style sheet, such as ``var(--accent)``; the page's script
inserts their values in light or dark mode, so that a chart follows the reader's preference.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tuner.pages.markup import Markup, details, escape, note

if TYPE_CHECKING:
    import plotly.graph_objects as go

logger = logging.getLogger(__name__)

STATE_COLOURS = {
    "failed": "var(--failed)",
    "pruned": "var(--pruned)",
    "done": "var(--done)",
    "running": "var(--running)",
}
STATE_SYMBOLS = {"running": "circle-open", "done": "circle", "pruned": "x", "failed": "cross"}
_FAULTS = (
    ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
HEIGHT = 380  # pixels
_WIDE = 30.0  # ratio of largest to smallest value from which an axis is logarithmic
_DECADES = 100.0  # ratio from which only powers of ten are labelled


def chart(
    figure: go.Figure,
    label: str,
    *,
    title: str = "",
    numbers: Markup | None = None,
    height: int = HEIGHT,
    remark: str = "",
) -> Markup:
    """A figure as HTML.

    Args:
        figure: plotly figure; the page sets its template and the colours of text and paper.
        label: one sentence with figures that describes the chart, for screen readers.
        title: title above the figure.
        numbers: table of the drawn values.
        height: height in pixels.
        remark: a muted line below the figure.
    """
    parts = [
        "<figure>",
        f"<figcaption>{escape(title)}</figcaption>" if title else "",
        f"<div class='plot' role='img' aria-label='{escape(label)}' style='height:{height}px'>",
        f"<script type='application/json'>{_content(figure)}</script></div>",
        note(remark) if remark else "",
        details("Numbers", numbers) if numbers else "",
        "</figure>",
    ]
    return Markup("".join(parts))


def attempted(draw: Callable[[], Markup], what: str) -> Markup:
    """Draw a section; a failure (few trials, an unexpected file) becomes a note on the page."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return draw()
    except _FAULTS as error:
        logger.warning("%s: cannot be drawn", what, exc_info=True)
        return note(f"{what}: cannot be drawn: {type(error).__name__}: {error}")


def grid(charts: list[Markup], least: int = 420) -> Markup:
    """Arrange charts in rows, each chart at least ``least`` pixels wide."""
    inside = "".join(charts)
    return Markup(f"<div class='grid' style='--least:{least}px'>{inside}</div>")


def axis_for(values: list[float], title: str = "", *, log: bool = False) -> dict[str, Any]:
    """Return an axis, logarithmic if requested or if the values are positive and widely spread."""
    finite = [value for value in values if math.isfinite(value) and value > 0]
    ratio = max(finite) / min(finite) if finite else 1.0
    if not log and (ratio < _WIDE or len(finite) < len(values)):
        return {"title": {"text": title}}
    ticks = "D2" if ratio < _DECADES else 1  # 1, 2 and 5, or powers of ten alone
    return {"title": {"text": title}, "type": "log", "dtick": ticks, "exponentformat": "power"}


def opacity_of(count: int) -> float:
    """Return the opacity of overlapping lines, which falls with their number."""
    return max(0.2, min(0.7, 40 / max(1, count)))


def joined(curves: list[tuple[list[Any], list[Any]]]) -> tuple[list[Any], list[Any]]:
    """Join several curves into one with gaps, as thousands of traces would take seconds."""
    xs: list[Any] = []
    ys: list[Any] = []
    for x, y in curves:
        xs += [*x, None]
        ys += [*y, None]
    return xs, ys


def thinned(items: list[Any], most: int) -> list[Any]:
    """Return at most ``most`` evenly chosen items, including the first and the last."""
    if len(items) <= most:
        return items
    index = np.linspace(0, len(items) - 1, most).round().astype(int)
    return [items[i] for i in index]


def _content(figure: go.Figure) -> str:
    content = figure.to_plotly_json()
    content["layout"].pop("template", None)
    content["layout"].pop("title", None)
    text = json.dumps(_plain(content), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")  # so that nothing in it ends the script


def _plain(value: Any) -> Any:
    """Convert to JSON lists and numbers; six digits of a float suffice for readers."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
