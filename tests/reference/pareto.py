"""The Pareto front from its definition, every pair compared."""

from __future__ import annotations

from collections.abc import Mapping


def pareto_front(points: Mapping[int, tuple[float, ...]]) -> set[int]:
    """Keys of the points that no other is at most equal to everywhere and below somewhere."""
    return {
        key
        for key, point in points.items()
        if not any(
            all(a <= b for a, b in zip(other, point, strict=True)) and other != point
            for other in points.values()
        )
    }
