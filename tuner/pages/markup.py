"""Small pieces of HTML: text, tables and formatted numbers, all escaped."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

_MOST_ROWS = 60  # of a table below a chart
_LONGEST = 300  # characters of a cell


class Markup(str):
    """Text that is already safe HTML."""

    __slots__ = ()


class Number(Markup):
    """A formatted number, aligned to the right in a table."""

    __slots__ = ()


def escape(value: object) -> Markup:
    """Escape a value as text of a page; markup is returned unchanged."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def note(text: str) -> Markup:
    """Return a muted line of explanation, such as why a section is empty."""
    return Markup(f"<p class='quiet'>{escape(text)}</p>")


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    marked: int | None = None,
    most: int = _MOST_ROWS,
    whole: bool = False,
) -> Markup:
    """Return a table in a scrollable box, with numbers aligned right and text aligned left.

    Args:
        heads: one header per column.
        rows: cells, escaped here; a float is shown with five digits.
        marked: index of a row to highlight.
        most: maximum number of rows; the number of omitted rows is shown.
        whole: whether the box shows all rows without scrolling.
    """
    every = list(rows)
    lines = [f"<div class='scroll{' whole' * whole}'><table><thead><tr>"]
    words = [_is_text(value) for value in every[0]] if every else []
    lines += [
        f"<th class='text'>{escape(head)}"
        if index < len(words) and words[index]
        else f"<th>{escape(head)}"
        for index, head in enumerate(heads)
    ]
    lines.append("<tbody>")
    for index, row in enumerate(every[:most]):
        lines.append("<tr class='best'>" if index == marked else "<tr>")
        lines += [_cell(value) for value in row]
    lines.append("</table></div>")
    if len(every) > most:
        lines.append(note(f"{len(every) - most} more rows are left out."))
    return Markup("".join(lines))


def pairs(rows: Iterable[tuple[str, object]]) -> Markup:
    """Return a list of names and their values."""
    cells = (f"<dt>{escape(name)}<dd>{escape(value)}" for name, value in rows)
    return Markup(f"<dl>{''.join(cells)}</dl>")


def details(summary: str, inside: str) -> Markup:
    """Return a collapsible element."""
    return Markup(f"<details><summary>{escape(summary)}</summary>{inside}</details>")


def short(value: Any, digits: int = 4) -> str:
    """Format a value with few digits; empty for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.{digits}g}" if math.isfinite(value) else str(value)
    return str(value)


def listed(words: Sequence[str]) -> str:
    """Join words as "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else list(words))


def _is_text(value: object) -> bool:
    return isinstance(value, bool | str) and not isinstance(value, Number)


def _cell(value: object) -> str:
    if isinstance(value, Markup):
        return f"<td>{value}" if isinstance(value, Number) else f"<td class='text'>{value}"
    if _is_text(value):
        text = str(value)
        if len(text) > _LONGEST:
            text = text[: _LONGEST - 1] + "…"
        return f"<td class='text'>{escape(text)}"
    return f"<td>{escape(short(value, 5))}"
