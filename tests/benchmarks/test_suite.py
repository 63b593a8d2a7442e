from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.suite import (
    BEGIN,
    END,
    PAGE,
    RESULTS,
    ROOT,
    SUITE,
    beside,
    slug,
    table,
    written_into,
)


def test_every_benchmark_of_the_suite_exists() -> None:
    for name in SUITE:
        assert (ROOT / "benchmarks" / f"{name}.py").exists(), name


def test_the_table_goes_between_its_marks_and_nowhere_else() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert written_into(page, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    with pytest.raises(ValueError, match="expected"):
        written_into("no marks", "new")


def test_the_page_holds_the_table_of_a_result_that_is_kept() -> None:
    page = PAGE.read_text(encoding="utf-8")
    inside = page.partition(BEGIN)[2].partition(END)[0].strip()
    kept = [table(json.loads(path.read_text(encoding="utf-8"))) for path in RESULTS.glob("*.json")]
    assert inside in kept, "run python -m benchmarks.suite --write"


def test_names_of_machines_become_names_of_files() -> None:
    assert slug("AMD EPYC (TM), 2 cores") == "amd-epyc-tm-2-cores"


def test_figures_of_the_processor_keep_its_name_beside_those_of_a_gpu() -> None:
    gpu, processor = {"name": "a GPU"}, {"name": "a processor, 2 cores"}
    assert beside(gpu, {"machine": gpu, "ms": 1.0}) == {"ms": 1.0}
    kept = {"machine": processor, "ms": 2.0}
    assert beside(gpu, kept) == kept


@pytest.mark.slow
def test_a_benchmark_of_the_suite_runs_and_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.suite", "--only", "simulate", "--json", str(path)],
        cwd=ROOT,
        check=True,
    )
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["machine"]["name"]
    rate = result["simulate"]["fluctuating, B=64"]["scenes_per_second"]
    assert rate > 0
    assert "--only simulate" in result["command"]
