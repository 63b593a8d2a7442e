"""A disk that is full: the kernel really refuses to write."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model.files import PART, write_text
from tests.tuner.support import ROOT, run, run_here, tiny_study, write_study
from tuner.config import load_study
from tuner.disk import full_disk, full_disk_said
from tuner.errors import LedgerLost, StudyError
from tuner.files import replace_folder, sweep
from tuner.folder import RunFolder
from tuner.study import Ledger

pytestmark = pytest.mark.long


def outcomes(folder: Path) -> list[tuple[Any, ...]]:
    ledger = Ledger(folder / "study.db", load_study(folder / "config.yaml"))
    try:
        return [(t.number, t.state, t.seed, t.params, t.curve) for t in ledger.trials()]
    finally:
        ledger.close()


# The ledger of some 150 kB does not fit, or a checkpoint of some MB.
@pytest.mark.slow
@pytest.mark.parametrize(("file_kb", "width"), [(16, 8), (1000, 64)])
def test_a_study_on_a_full_disk_ends_with_a_line_and_goes_on_bit_for_bit(
    tmp_path: Path, file_kb: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.conclusion._score_winner", lambda folder, study, progress: None)
    config = write_study(
        tmp_path, training={"epochs": 2}, search={"scheduler": "none"}, network={"width": width}
    )
    assert run_here("--config", config, "--local", "--out", tmp_path / "calm") == 0
    out = tmp_path / "run"
    command = ("--file-kb", file_kb, "--", "--config", config, "--local", "--out", out)
    full = run(*command, module="benchmarks._confined", timeout=280)
    assert full.returncode == 2, full.stdout + full.stderr
    assert (out / "study.db").exists()
    assert full.stderr.startswith("error: the disk cannot be written (")
    assert f"go on with: python -m tuner.run --resume {out}" in full.stderr
    assert len(full.stderr.splitlines()) == 1, full.stderr
    assert run_here("--resume", out, "--local") == 0
    assert outcomes(out) == outcomes(tmp_path / "calm")


GROWING = """
import resource, sys, time
from pathlib import Path
from tuner.config import load_study
from tuner.disk import full_disk
from tuner.errors import LedgerLost
from tuner.study import Ledger
path = Path(sys.argv[1])
ledger = Ledger(path, load_study(Path(sys.argv[2])))
number = ledger.ask().number
ledger.report(number, {"epoch": 1, "objective": 1.0})
size = path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
begun = time.monotonic()
try:
    for epoch in range(2, 1000):
        ledger.report(number, {"epoch": epoch, "objective": 1.0, "padding": "x" * 500})
except LedgerLost as lost:
    print(epoch - 1, time.monotonic() - begun < 30, full_disk(lost) is not None)
"""


def test_a_ledger_that_fills_its_disk_amid_a_study_is_no_outage_to_be_waited_for(
    tmp_path: Path,
) -> None:
    config = write_study(tmp_path)
    database = tmp_path / "study.db"
    found = subprocess.run(
        [sys.executable, "-c", GROWING, str(database), str(config)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=100,
    )
    assert found.returncode == 0, found.stderr
    written, at_once, said = found.stdout.split()
    assert (at_once, said) == ("True", "True")
    ledger = Ledger(database, load_study(config))
    assert ledger.trial(0).epoch == int(written), "what was said to be written is there"
    ledger.close()


def test_a_full_disk_is_found_behind_other_errors() -> None:
    behind = RuntimeError("storage")
    behind.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "study.db")
    assert full_disk(behind) == "No space left on device: study.db"
    assert full_disk(sqlite3.OperationalError("database or disk is full"))
    assert full_disk(OSError(errno.EACCES, "Permission denied")) is None
    assert full_disk(ValueError("no space")) is None


def test_of_many_lines_the_one_is_told_that_speaks_of_the_disk() -> None:
    error = RuntimeError("the backend failed:\nOSError: [Errno 28] No space left on device\nhint")
    assert full_disk(error) == "OSError: [Errno 28] No space left on device"


def test_a_database_server_without_room_is_an_outage_of_the_server(tmp_path: Path) -> None:
    said = "the ledger at db was out for 5m: could not extend file: No space left on device"
    lost = LedgerLost(said)
    lost.__cause__ = RuntimeError("could not extend file: No space left on device")
    with pytest.raises(LedgerLost) as caught, full_disk_said(tmp_path, ""):
        raise lost
    assert caught.value.code == 130
    assert str(caught.value) == said
    with pytest.raises(StudyError, match="make room") as refused, full_disk_said(tmp_path, ""):
        raise LedgerLost("the disk is this machine's: database or disk is full", no_room=True)
    assert refused.value.code == 2


def test_another_error_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), full_disk_said(tmp_path, ""):
        _ = 1 / 0
    with (
        pytest.raises(StudyError, match=r"--resume .* --local"),
        full_disk_said(tmp_path, " --local"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_a_killed_writer_left_is_removed_when_the_study_goes_on(tmp_path: Path) -> None:
    folder = RunFolder.fresh(tmp_path / "run")
    folder.config.write_text(tiny_study(tmp_path).to_yaml())
    folder.release()
    kept = folder.trial(0) / "checkpoint-00001" / "checkpoint.safetensors"
    write_text(kept, "whole")
    (kept.parent / f".checkpoint.safetensors.abc{PART}").write_text("half")
    (folder.path / f".best.abc{PART}").mkdir()
    (folder.path / f".best.abc{PART}" / "model.safetensors").write_text("half")
    RunFolder.existing(folder.path, lock=False)
    assert list(folder.path.rglob(f".*{PART}")), "who only looks removes nothing"
    RunFolder.existing(folder.path).release()
    assert not list(folder.path.rglob(f".*{PART}"))
    assert kept.read_text() == "whole"


def test_writers_leave_the_names_that_are_swept(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "file").write_text("whole")
        assert [p.name for p in tmp_path.iterdir() if p.name.endswith(PART)] == [folder.name]
        sweep(tmp_path)
        folder.mkdir()

    replace_folder(tmp_path / "best", fill)
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
