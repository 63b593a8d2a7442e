"""A run folder that was moved or copied goes on where it stands, and touches no other."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import pytest
import torch

from model import Localizer, write_shards
from physics import PlanarArray, simulate
from tests.tuner.support import (
    Clock,
    FakeRun,
    kill,
    outcome,
    read_until,
    run_here,
    start,
    trials_of,
    write_study,
)
from tuner.checkpoints import Storage, TrialCheckpoints
from tuner.config import load_study
from tuner.folder import RunFolder


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """A study whose first trial has finished and whose second was killed amid its epochs.

    The driver died before it wrote the winner's network.
    """
    config = write_study(
        tmp_path, training={"epochs": 40}, search={"scheduler": "none", "trials": 2}
    )
    process = start("--config", config, "--local", "--out", tmp_path / "cut")
    read_until(process, "trial 0001 epoch 2/40")
    kill(process)
    return tmp_path / "cut"


def test_a_moved_study_keeps_its_winner_and_goes_on_from_its_checkpoints(
    tmp_path: Path, cut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(cut, whole)
    assert run_here("--resume", whole, "--local") == 0
    capsys.readouterr()
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    shutil.move(cut, moved)
    assert run_here("--resume", moved, "--local") == 0
    said = capsys.readouterr().out
    goes_on = re.search(r"trial 0001 goes on after epoch (\d+)", said)
    assert goes_on is not None
    assert f"trial 0001 epoch {int(goes_on[1]) + 1}/40" in said
    assert "trial 0001 epoch 1/40" not in said
    assert "starting from the beginning" not in (moved / "tuner.log").read_text()
    assert outcome(moved) == outcome(whole)
    best = min(trials_of(moved), key=lambda trial: trial.objective or 9e9)
    assert best.checkpoint is not None
    assert Path(best.checkpoint).is_relative_to(moved)
    assert Path(best.checkpoint).is_dir()
    assert contents(moved / "best") == contents(whole / "best")
    Localizer.load(moved / "best")


def test_a_copy_leaves_the_original_alone(tmp_path: Path, cut: Path) -> None:
    before = contents(cut)
    shutil.copytree(cut, tmp_path / "copy")
    assert run_here("--resume", tmp_path / "copy", "--local") == 0
    assert contents(cut) == before
    assert run_here("--resume", cut, "--local") == 0
    assert outcome(cut) == outcome(tmp_path / "copy")


def test_successors_find_their_donors_where_the_folder_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    begun: list[Path | None] = []

    class Run(FakeRun):
        def __init__(self, *given: object) -> None:
            begun.extend(path for path in given[2:] if isinstance(path, Path))
            super().__init__(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("tuner.local.TrialRun", Run)
    Clock(monkeypatch)
    search = {
        "scheduler": "pbt",
        "population": 4,
        "trials": 8,
        "perturbation_epochs": 2,
        "space": {"training.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2,
                                             "log": True}},
    }  # fmt: skip
    config = write_study(tmp_path, training={"epochs": 8}, search=search)
    assert run_here("--config", config, "--local", "--out", tmp_path / "whole") == 0
    for minutes in (9, 10, 11, 12):
        out = tmp_path / f"run-{minutes}"
        budget = f"{minutes}m"
        assert run_here("--config", config, "--local", "--out", out, "--time-budget", budget) in (
            0,
            1,
        )
        moved = tmp_path / f"moved-{minutes}"
        shutil.move(out, moved)
        begun.clear()
        assert run_here("--resume", moved, "--local", "--time-budget", "none") == 0
        assert begun
        assert all(path is not None and path.is_relative_to(moved) for path in begun)
        assert outcome(moved) == outcome(tmp_path / "whole")


def test_recorded_scenes_may_move_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_study(
        tmp_path, training={"epochs": 40}, search={"scheduler": "none", "trials": 1}
    )
    study = load_study(config)
    array = PlanarArray(study.array.n_horizontal, study.array.n_vertical)
    for split, count, seed in (("train", 16, 1), ("val", 8, 2)):
        generator = torch.Generator().manual_seed(seed)
        scenes = simulate(count, study.scene, array, generator=generator)
        write_shards(tmp_path / "data", split, scenes, array, "spherical")
    out = tmp_path / "run"
    process = start("--config", config, "--data", tmp_path / "data", "--local", "--out", out)
    read_until(process, "trial 0000 epoch 2/40")
    kill(process)
    shutil.move(tmp_path / "data", tmp_path / "archive")
    assert run_here("--resume", out, "--local") == 2
    assert "data" in capsys.readouterr().err
    assert run_here("--resume", out, "--local", "--data", tmp_path / "archive") == 0
    said = capsys.readouterr().out
    assert re.search(r"trial 0000 goes on after epoch \d", said)
    assert "trial 0000 epoch 1/40" not in said
    (trial,) = trials_of(out)
    assert (trial.state, trial.epoch) == ("done", 40)
    # The winner is scored and drawn anew where its scenes are by now, and the report knows it.
    shutil.move(tmp_path / "archive", tmp_path / "attic")
    for name in ("evaluation.json", "scenes.json"):
        (out / name).unlink()
    assert run_here("--resume", out, "--local", "--data", tmp_path / "attic") == 0
    assert "was not written" not in capsys.readouterr().out
    assert f"of {tmp_path}/attic/val" in (out / "evaluation.json").read_text()
    shutil.move(tmp_path / "attic", tmp_path / "archive")
    for again in range(2):  # the second time all is there already
        assert run_here("--resume", out, "--local", "--data", tmp_path / "archive") == 0
        assert "another network than the winner" not in (out / "report.html").read_text(), again
    # What lies there now are other scenes.
    generator = torch.Generator().manual_seed(3)
    others = simulate(8, study.scene, array, generator=generator)
    shutil.copytree(tmp_path / "archive" / "train", tmp_path / "new" / "train")
    write_shards(tmp_path / "new", "val", others, array, "spherical")
    more = ("--trials", 2, "--local", "--data", tmp_path / "new")
    for dry in ((), ("--dry-run",)):
        assert run_here("--resume", out, *more, *dry) == 2
        assert "1 trial of this study began with other scenes in val" in capsys.readouterr().err
    # Scenes that are simulated are others than those on disk.
    simulated = write_study(tmp_path / "other", search={"trials": 1})
    assert run_here("--config", simulated, "--local", "--out", tmp_path / "sim") == 0
    capsys.readouterr()
    assert run_here("--resume", tmp_path / "sim", "--data", tmp_path / "archive", "--local") == 2
    assert "data.shards was null and is " in capsys.readouterr().err


def test_a_copy_has_a_place_of_its_own_in_a_shared_storage(tmp_path: Path) -> None:
    config = write_study(
        tmp_path,
        training={"epochs": 40},
        search={"scheduler": "none", "trials": 2},
        resources={"storage": str(tmp_path / "store")},
    )
    study = load_study(config)
    original = RunFolder.fresh(tmp_path / "a" / "run")
    first = Storage.of(original, study.resources)
    assert Storage.of(original, study.resources) == first
    for place in ("b/run", "a/other"):
        shutil.copytree(original.path, tmp_path / place)
        assert Storage.of(RunFolder(tmp_path / place), study.resources).name != first.name
    assert Storage.of(original, study.resources) == first
    with pytest.MonkeyPatch.context() as patch:  # another machine, or pod, that has the same mount
        patch.setattr("platform.node", lambda: "elsewhere")
        assert Storage.of(original, study.resources) == first
    assert Storage.of(original, study.resources) == first
    (tmp_path / "moved").mkdir()
    moved = original.path.rename(tmp_path / "moved" / "renamed")
    assert Storage.of(RunFolder(moved), study.resources) == first
    shutil.copytree(moved, original.path)  # a backup that is put back where the first one was
    assert Storage.of(RunFolder(original.path), study.resources).name != first.name
    assert Storage.of(RunFolder(moved), study.resources) == first


def test_a_checkpoint_of_the_folder_that_was_copied_is_not_deleted(tmp_path: Path) -> None:
    theirs = tmp_path / "store" / "run-1-trials" / "0000" / "checkpoint-00001"
    theirs.mkdir(parents=True)
    (tmp_path / "store" / "run-2-trials").mkdir()

    def save(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    kept = TrialCheckpoints(str(tmp_path / "store" / "run-2-trials" / "0000"))
    kept.follow(str(theirs))
    for epoch in (2, 3):
        kept.write(epoch, save)
        kept.forget()
    assert theirs.is_dir()
    own = sorted(path.name for path in (tmp_path / "store" / "run-2-trials" / "0000").iterdir())
    assert own == ["checkpoint-00003"]
