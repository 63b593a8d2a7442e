"""A chart on a page: a plotly figure, the sentence that stands for it, and its numbers.

Colours are names of the page's style sheet, ``var(--accent)``; the page's script puts in what they
are by day or by night, so that a chart follows the reader's preference.
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
_WIDE = 30.0  # ratio of the largest value to the least from which an axis is logarithmic
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
        figure: of plotly; its template and colours of text and paper are the page's.
        label: what it shows in one sentence with figures, for who cannot see it.
        title: above it.
        numbers: a table of what is drawn.
        height: in pixels.
        remark: a quiet line below.
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
    """What cannot be drawn, from few trials or a file of another form, is said and not fatal."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return draw()
    except _FAULTS as error:
        logger.warning("%s: cannot be drawn", what, exc_info=True)
        return note(f"{what}: cannot be drawn: {type(error).__name__}: {error}")


def grid(charts: list[Markup], least: int = 420) -> Markup:
    """Charts side by side, as many in a row as have ``least`` pixels each."""
    inside = "".join(charts)
    return Markup(f"<div class='grid' style='--least:{least}px'>{inside}</div>")


def axis_for(values: list[float], title: str = "", *, log: bool = False) -> dict[str, Any]:
    """An axis: logarithmic if asked, or where the values are positive and spread widely."""
    finite = [value for value in values if math.isfinite(value) and value > 0]
    ratio = max(finite) / min(finite) if finite else 1.0
    if not log and (ratio < _WIDE or len(finite) < len(values)):
        return {"title": {"text": title}}
    ticks = "D2" if ratio < _DECADES else 1  # 1, 2 and 5, or powers of ten alone
    return {"title": {"text": title}, "type": "log", "dtick": ticks, "exponentformat": "power"}


def opacity_of(count: int) -> float:
    """Of so many lines over one another: the more, the fainter."""
    return max(0.2, min(0.7, 40 / max(1, count)))


def joined(curves: list[tuple[list[Any], list[Any]]]) -> tuple[list[Any], list[Any]]:
    """Several curves as one with gaps: a trace for each of a thousand would take seconds."""
    xs: list[Any] = []
    ys: list[Any] = []
    for x, y in curves:
        xs += [*x, None]
        ys += [*y, None]
    return xs, ys


def thinned(items: list[Any], most: int) -> list[Any]:
    """At most so many, evenly chosen, the first and the last among them."""
    if len(items) <= most:
        return items
    index = np.linspace(0, len(items) - 1, most).round().astype(int)
    return [items[i] for i in index]


def _content(figure: go.Figure) -> str:
    content = figure.to_plotly_json()
    content["layout"].pop("template", None)
    content["layout"].pop("title", None)
    text = json.dumps(_plain(content), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")  # nothing in it ends the script


def _plain(value: Any) -> Any:
    """Lists and numbers as JSON has them; six digits of a float, as nobody reads more."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
