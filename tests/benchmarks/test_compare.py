from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.compare import compare, figures, report

ROOT = Path(__file__).resolve().parent.parent.parent
OLD = {
    "machine": {"name": "one", "launch_ms": 1.0},
    "hot": {
        "limits": {"gflop_per_second": 50.0},
        "functions": {"nomp": {"median_ms": 10.0, "reached": 0.5, "n_operations": 7}},
    },
    "simulate": {"B=64": {"scenes_per_second": 1000.0}},
    "step": [{"peak_mib": 100}],
}


def changed(**values: float) -> dict[str, object]:
    text = json.dumps(OLD)
    for old, new in (("10.0", "time"), ("1000.0", "rate")):
        if new in values:
            text = text.replace(old, str(values[new]))
    found: dict[str, object] = json.loads(text)
    return found


def test_only_figures_that_say_which_way_is_better_are_compared() -> None:
    assert dict(figures(OLD)) == {
        "hot/functions/nomp/median_ms": 10.0,
        "simulate/B=64/scenes_per_second": 1000.0,
        "step/0/peak_mib": 100.0,
    }


@pytest.mark.parametrize(
    ("values", "regressed"),
    [
        ({"time": 11.4}, False),
        ({"time": 11.6}, True),
        ({"time": 5.0}, False),
        ({"rate": 880.0}, False),
        ({"rate": 860.0}, True),
        ({"rate": 2000.0}, False),
    ],
)
def test_what_is_worse_by_more_than_the_tolerance_is_flagged(
    values: dict[str, float], regressed: bool
) -> None:
    text, found = report(compare(OLD, changed(**values)), 0.15)
    assert found is regressed
    assert ("REGRESSED" in text) is regressed


def test_the_command_exits_with_one_where_something_regressed(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps(OLD))
    (tmp_path / "new.json").write_text(json.dumps(changed(time=20.0)))

    def run(*names: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.compare", *(str(tmp_path / n) for n in names)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert run("old.json", "old.json").returncode == 0
    worse = run("old.json", "new.json")
    assert worse.returncode == 1
    assert worse.stdout.splitlines()[0].startswith("hot/functions/nomp/median_ms")
    (tmp_path / "other.json").write_text("{}")
    assert run("old.json", "other.json").returncode == 2
    missing = run("old.json", "missing.json")
    assert "missing.json" in missing.stderr
    assert missing.returncode != 0
