from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch

from benchmarks import _timing

FOLDER = Path(_timing.__file__).parent


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says that it has a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")


@pytest.mark.usefixtures("a_gpu")
def test_figures_are_filed_under_what_computed_them(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    for device, is_gpu in ((torch.device("cuda"), True), ("cuda", True), ("cpu", False)):
        _timing.save({"ms": 1.0}, path, device)
        saved = json.loads(path.read_text())
        assert (saved["machine"]["name"] == "a GPU") == is_gpu, device
        assert saved["ms"] == 1.0


def test_a_benchmark_that_never_asks_for_a_gpu_files_its_figures_under_the_processor() -> None:
    filed = {}
    for path in FOLDER.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "save":
                filed[path.stem] = (ast.unparse(node.args[2]), "cuda.is_available()" in source)
    assert len(filed) > 10
    for name, (device, asks) in filed.items():
        assert device == ("device" if asks else "'cpu'"), name


def test_nothing_is_written_where_no_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _timing.save({}, None, "cpu")
    assert not list(tmp_path.iterdir())
    _timing.save({"figure": 1}, Path("file.json"), "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
