"""Two results of the suite side by side; what got slower by more than 15 % is flagged.

    python -m benchmarks.compare OLD.json NEW.json [--tolerance 0.15]

Compares every figure with a name that tells which direction is better: lower for `_ms`,
`_seconds`, `_mb` and `_mib`, higher for `_per_second`, `ratio` and `speedup`. The exit status is 1
if anything regressed, and 2 if the two cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOLERANCE = 0.15
_LOWER = ("_ms", "_seconds", "_mb", "_mib")
_HIGHER = ("_per_second", "ratio", "speedup")
_NOT_OURS = ("machine", "limits")  # properties of the machine are not results


@dataclass(frozen=True)
class Change:
    """One figure in both results."""

    name: str
    old: float
    new: float

    @property
    def slower(self) -> float:
        """Factor by which the figure got worse; below 1 it improved."""
        return self.old / self.new if self.name.endswith(_HIGHER) else self.new / self.old


def figures(result: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield every comparable figure of a result with its path."""
    if isinstance(result, dict):
        for key, value in result.items():
            if key not in _NOT_OURS:
                yield from figures(value, f"{path}/{key}" if path else key)
    elif isinstance(result, list):
        for index, value in enumerate(result):
            yield from figures(value, f"{path}/{index}")
    elif path.endswith((*_LOWER, *_HIGHER)) and isinstance(result, int | float) and result > 0:
        yield path, float(result)


def compare(old: Any, new: Any) -> list[Change]:
    """The figures in both results, worst change first."""
    before, after = dict(figures(old)), dict(figures(new))
    shared = [Change(name, before[name], after[name]) for name in before if name in after]
    return sorted(shared, key=lambda change: -change.slower)


def report(changes: list[Change], tolerance: float) -> tuple[str, bool]:
    """Lines for a terminal, and whether anything regressed."""
    lines = []
    for change in changes:
        worse = change.slower > 1.0 + tolerance
        mark = "REGRESSED" if worse else "improved" if change.slower < 1.0 - tolerance else ""
        lines.append(
            f"{change.name:<72}{change.old:>12.4g}{change.new:>12.4g}"
            f"{change.new / change.old - 1.0:>+9.1%}  {mark}".rstrip()
        )
    return "\n".join(lines), any(c.slower > 1.0 + tolerance for c in changes)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SystemExit(f"error: {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise SystemExit(f"error: {path}: no JSON: {error}") from error
    if not isinstance(found, dict):
        raise SystemExit(f"error: {path}: expected what benchmarks.suite writes")
    return found


def main() -> int:
    """Compare two files and print the report."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("old", type=Path)
    arguments.add_argument("new", type=Path)
    arguments.add_argument("--tolerance", type=float, default=TOLERANCE)
    args = arguments.parse_args()
    old, new = _read(args.old), _read(args.new)
    changes = compare(old, new)
    if not changes:
        print("error: the two files share no figure", file=sys.stderr)
        return 2
    where = [result.get("machine", {}).get("name", "an unnamed machine") for result in (old, new)]
    if where[0] != where[1]:
        print(f"note: measured on different machines: {where[0]}; {where[1]}")
    text, regressed = report(changes, args.tolerance)
    print(text)
    return int(regressed)


if __name__ == "__main__":
    sys.exit(main())
