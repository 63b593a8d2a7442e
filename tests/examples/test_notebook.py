"""The notebook runs from its first cell to its last, and says what it says in the repository."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.tuner.support import ROOT

NOTEBOOK = ROOT / "examples" / "localise_and_tune.ipynb"


def read() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def printed(notebook: Any) -> Iterator[str]:
    """What each cell of code printed, without figures."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            streams = (out.text for out in cell.outputs if out.output_type == "stream")
            yield "".join(streams)


def test_the_notebook_is_kept_with_its_outputs_small_and_of_no_machine() -> None:
    assert NOTEBOOK.stat().st_size < 1_000_000
    notebook = read()
    ran = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert ran == list(range(1, len(ran) + 1))
    figures = [
        o for c in notebook.cells for o in c.get("outputs", ()) if "image/png" in o.get("data", {})
    ]
    assert len(figures) == 2
    assert not re.search(r"/(home|root|tmp|work|Users)/", NOTEBOOK.read_text(encoding="utf-8"))
    assert "Warning" not in "".join(printed(notebook))


@pytest.mark.slow
def test_the_notebook_runs_and_prints_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "quickstart.yaml", tmp_path / "configs")
    notebook = read()
    before = list(printed(notebook))
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=280, kernel_name="python3", resources=resources).execute()

    # The last digits are the processor's; words, and which numbers there are, are not.
    def words(text: str) -> list[str]:
        return re.findall(r"[^\W\d_]+", re.sub(r"\d[\d.e+-]*", "", text))

    after = list(printed(notebook))
    searched = next(i for i, text in enumerate(before) if text.startswith("exit code"))
    assert [words(text) for text in after[:searched]] == [words(text) for text in before[:searched]]
    assert after[searched].startswith("exit code 0; best: trial")
    assert (tmp_path / "runs" / "notebook" / "best.json").exists()
