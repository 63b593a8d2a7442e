from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from model import data as data_module
from model.data import open_source
from tests.tuner.support import TINY, tiny_study
from tuner import finding
from tuner.config import StudyConfig, load_study
from tuner.finding import candidates_found
from tuner.records import Assignment
from tuner.telemetry import Progress
from tuner.yamlfile import dump_yaml

CANDIDATE = {
    "family": "candidate",
    "width": 8,
    "heads": 2,
    "candidates": {"count": 2},
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "CHUNK", 8)
    monkeypatch.setattr(finding, "CHUNK", 8)


def study_in(folder: Path, **data: Any) -> StudyConfig:
    sizes = {"train_scenes": 20, "val_scenes": 10, "fresh": False, "cache": str(folder / "cache")}
    path = folder / "study.yaml"
    sections = TINY | {"network": CANDIDATE, "data": TINY["data"] | sizes | data}
    path.write_text(dump_yaml(sections | {"search": {"space": {}}}), encoding="utf-8")
    return load_study(path)


def shown(progress: Progress) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(progress._draw())
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("fresh", [False, True])
def test_all_is_found_when_a_trial_has_what_an_epoch_needs(tmp_path: Path, fresh: bool) -> None:
    study = study_in(tmp_path, fresh=fresh)
    begun = time.time() - 1.0
    assert candidates_found(study, begun) is None
    source = open_source(study.trial_config({}, 0), torch.device("cpu"))
    source.validation()
    assert candidates_found(study, begun) == (10, 30)
    for _ in source.train_batches(0, 4, 0):
        pass
    assert candidates_found(study, begun) == (30, 30)
    assert candidates_found(study, time.time() + 10.0) is None, "those of before do not count"


def test_a_file_written_within_the_kernels_tick_counts(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    (tmp_path / "cache" / "candidates").mkdir(parents=True)
    kept = tmp_path / "cache" / "candidates" / "one.safetensors"
    kept.touch()
    now = time.time()
    os.utime(kept, (now - 0.01, now - 0.01))
    assert candidates_found(study, now) == (8, 30)
    os.utime(kept, (now - 1.0, now - 1.0))
    assert candidates_found(study, now) is None


def test_families_without_candidates_look_for_none(tmp_path: Path) -> None:
    (tmp_path / "cache" / "candidates").mkdir(parents=True)
    (tmp_path / "cache" / "candidates" / "other.safetensors").touch()
    study = tiny_study(tmp_path, data={"cache": str(tmp_path / "cache")})
    assert candidates_found(study, 0.0) is None


def test_the_live_table_counts_them_until_the_first_epoch(tmp_path: Path) -> None:
    progress = Progress(study_in(tmp_path), [], io.StringIO())
    progress.started(Assignment(0, {}, seed=0))
    assert "of 30 scenes" not in shown(progress)
    (tmp_path / "cache" / "candidates").mkdir(parents=True)
    (tmp_path / "cache" / "candidates" / "one.safetensors").touch()
    assert "8 of 30 scenes" in shown(progress)
    progress.reported(0, {"epoch": 1, "objective": 2.0})
    assert "of 30 scenes" not in shown(progress)
