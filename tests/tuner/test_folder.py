from __future__ import annotations

from pathlib import Path

import pytest

from model.files import write_text
from tests.tuner.support import tiny_study
from tuner.errors import StudyError
from tuner.folder import RunFolder


def test_a_folder_that_holds_a_study_is_refused(tmp_path: Path) -> None:
    folder = RunFolder.fresh(tmp_path / "run")
    folder.config.write_text(tiny_study(tmp_path).to_yaml())
    folder.release()
    with pytest.raises(StudyError, match=r"already holds a study; go on with --resume"):
        RunFolder.fresh(tmp_path / "run")


def test_a_second_driver_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    import os

    folder = RunFolder.fresh(tmp_path / "run")
    folder.config.write_text(tiny_study(tmp_path).to_yaml())
    with pytest.raises(
        StudyError, match=rf"another run \(process {os.getpid()} on .+\) is at work"
    ):
        RunFolder.existing(tmp_path / "run")
    folder.release()
    RunFolder.existing(tmp_path / "run").release()


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match=r"--out: cannot write to .*: Not a directory"):
        RunFolder.fresh(tmp_path / "file" / "run")


def test_a_folder_without_a_study_cannot_go_on(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no such folder"):
        RunFolder.existing(tmp_path / "absent")
    with pytest.raises(StudyError, match="holds no study"):
        RunFolder.existing(tmp_path)


@pytest.mark.parametrize("left", ["gone", "empty"])
def test_results_whose_ledger_is_gone_are_not_begun_anew(tmp_path: Path, left: str) -> None:
    folder = RunFolder(tmp_path)
    folder.config.write_text(tiny_study(tmp_path).to_yaml())
    folder.trials.mkdir()
    folder.refuse_lost_ledger()  # a session that was cut before it began has left no more
    folder.best_json.write_text("{}")
    if left == "empty":
        folder.database.touch()
    with pytest.raises(StudyError, match=f"study.db is {left}, and best.json are of the study"):
        folder.refuse_lost_ledger()
    folder.database.write_bytes(b"SQLite format 3")
    folder.refuse_lost_ledger()


def test_halves_of_files_go_where_the_driver_alone_writes_and_stay_where_others_do(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path)
    own = [tmp_path, folder.trial(1) / "checkpoint-00001", folder.promotion().trial(0)]
    others = [tmp_path / "final" / "checkpoint", tmp_path / "src"]
    for place in (*own, *others):
        place.mkdir(parents=True, exist_ok=True)
        (place / ".file.abc.part").write_text("half")
    folder.config.write_text(tiny_study(tmp_path).to_yaml())
    RunFolder.existing(tmp_path).release()
    assert sorted(tmp_path.rglob(".*.part")) == [place / ".file.abc.part" for place in others]


def test_default_folders_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = RunFolder.default_path("name")
    first.mkdir(parents=True)
    assert RunFolder.default_path("name") != first


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "best.json"
    write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["best.json"]


def test_a_driver_that_ends_in_order_leaves_no_word_of_itself(tmp_path: Path) -> None:
    folder = RunFolder.fresh(tmp_path / "run")
    held = folder.driver
    assert held is not None
    assert held.locked
    assert held.is_here
    folder.release()
    assert folder.driver is None
    assert RunFolder(tmp_path / "absent").driver is None
