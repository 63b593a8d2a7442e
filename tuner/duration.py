"""Durations in human-readable form: 90m, 1h30m, 2h, or seconds."""

from __future__ import annotations

import re

_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_WRITTEN = re.compile("".join(rf"(?:(?P<{unit}>\d+(?:\.\d+)?){unit})?" for unit in _UNITS))


def parse_duration(text: str) -> float:
    """Parse a number of seconds, or numbers with units, to seconds.

    Raises:
        ValueError: invalid text; the message says what is expected.
    """
    compact = "".join(text.split())
    if re.fullmatch(r"\d+(?:\.\d+)?", compact):
        return float(compact)
    found = _WRITTEN.fullmatch(compact)
    if not compact or found is None:
        raise ValueError("expected seconds, or numbers with d, h, m or s as in 90m, 1h30m or 2d")
    return sum(float(value or 0) * _UNITS[unit] for unit, value in found.groupdict().items())


def format_duration(seconds: float) -> str:
    """Format by the two largest units, as in 1h30m, 4m5s or 12s; tenths below ten seconds."""
    if seconds < 10:
        return f"{seconds:.3g}s"
    left = round(seconds)
    parts: list[tuple[int, str]] = []
    for unit, length in _UNITS.items():
        count, left = divmod(left, length)
        if parts or count:
            parts.append((count, unit))
    return "".join(f"{count}{unit}" for count, unit in parts[:2] if count)
