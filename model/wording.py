"""Numbers beside their nouns, and what errors say."""

from __future__ import annotations


def counted(count: float, singular: str, plural: str | None = None) -> str:
    """1 trial, 2 trials, 0.5 GPUs."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:,g}"
    return f"{number} {singular if count == 1 else plural or singular + 's'}"


def in_one_line(error: Exception) -> str:
    """What an error says, or its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
