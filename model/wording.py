"""Wording of messages: counts with their nouns, and error texts."""

from __future__ import annotations


def counted(count: float, singular: str, plural: str | None = None) -> str:
    """Format a count with its noun: 1 trial, 2 trials, 0.5 GPUs."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:,g}"
    return f"{number} {singular if count == 1 else plural or singular + 's'}"


def in_one_line(error: Exception) -> str:
    """Text of an error on one line, or its type if the text is empty."""
    return " ".join(str(error).split()) or type(error).__name__
