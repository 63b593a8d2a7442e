from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import Localizer
from model.training import Trainer
from tests.tuner.support import (
    ROOT,
    environment,
    read_until,
    run,
    run_here,
    start,
    write_study,
)
from tuner.command import execute
from tuner.files import FileLock
from tuner.train import app

LIMITED = """
import resource, sys
from tuner.command import execute
from tuner.train import app
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(execute(app, sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study."""
    folder = tmp_path_factory.mktemp("searched")
    config = write_study(folder, search={"full_epochs": 3})
    assert run_here("--config", config, "--local", "--out", folder / "run") == 0
    return folder / "run"


def train(*arguments: object) -> int:
    return execute(app, [str(argument) for argument in arguments])


def test_trap_the_tuned_configuration_retrains_to_its_score_bit_for_bit(
    searched: Path, tmp_path: Path
) -> None:
    finished = run(
        "--from", searched, "--epochs", 2, "--out", tmp_path / "final", "--device", "cpu",
        module="tuner.train",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    best = json.loads((searched / "best.json").read_text())
    result = json.loads((tmp_path / "final" / "result.json").read_text())
    assert result["objective"] == best["objective"] == result["searched_objective"]
    assert "the same, bit for bit" in finished.stdout
    again = (tmp_path / "final" / "best" / "model.safetensors").read_bytes()
    assert again == (searched / "best" / "model.safetensors").read_bytes()
    Localizer.load(tmp_path / "final" / "best")


def test_best_json_alone_is_enough_and_the_budget_is_the_studys(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "best.json"
    alone.write_bytes((searched / "best.json").read_bytes())
    assert train("--from", alone, "--device", "cpu") == 0
    assert "epoch 3/3" in capsys.readouterr().out
    lines = (tmp_path / "final" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]


def test_another_seed_or_field_is_another_training(searched: Path, tmp_path: Path) -> None:
    best = json.loads((searched / "best.json").read_text())["objective"]
    common = ["--from", searched, "--epochs", 2, "--device", "cpu"]
    assert train(*common, "--seed", 1, "--out", tmp_path / "seed") == 0
    assert train(*common, "--set", "loss.position=0.5", "--out", tmp_path / "field") == 0
    for name in ("seed", "field"):
        assert json.loads((tmp_path / name / "result.json").read_text())["objective"] != best


def test_an_interrupted_training_goes_on_to_the_same_end(searched: Path, tmp_path: Path) -> None:
    common = ["--from", searched, "--epochs", 60, "--device", "cpu"]
    assert train(*common, "--out", tmp_path / "whole") == 0
    process = start(*common, "--out", tmp_path / "cut", module="tuner.train")
    read_until(process, "epoch 3/60")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert train(*common, "--out", tmp_path / "cut") == 2, "it began anew without being asked"
    assert train(*common, "--out", tmp_path / "cut", "--resume") == 0
    results = [json.loads((tmp_path / n / "result.json").read_text()) for n in ("whole", "cut")]
    assert results[0]["objective"] == results[1]["objective"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from", "{tmp}"], "no such file; has a trial of the study finished?"),
        (["--from", "{tmp}/nope"], "no such folder; expected a study's run folder"),
        (["--from", "{tmp}/broken.json"], "cannot be read"),
        (["--from", "{tmp}/foreign.json"], "has no 'study'"),
        (["--from", "{run}", "--epochs", "0"], "training.epochs: got 0"),
        (["--from", "{run}", "--set", "network.widht=8"], "did you mean width"),
        (["--from", "{run}", "--data", "{tmp}/absent", "--out", "{tmp}/o"], "absent"),
        (["--from", "{run}", "--out", "{tmp}/broken.json/x"], "--out: cannot write"),
        (["--from", "{run}", "--out", "{tmp}/new", "--resume"], "--resume: no checkpoint"),
        (["--from", "{run}", "--out", "{tmp}/new", "--device", "foo"], "no device 'foo'; expected"),
        (["--from", "{run}", "--out", "{tmp}/new", "--device", "meta"], "no device 'meta'"),
        (["--from", "{run}", "--out", "{tmp}/new", "--device", "cuda:77"], "this machine has "),
        (["--from", "{run}", "--out", "{tmp}/new", "--set", "precision.amp=fp16"],
         "precision.amp: got 'fp16'; "),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_said_in_one_line(
    searched: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "foreign.json").write_text("{}")
    filled = [text.format(tmp=tmp_path, run=searched) for text in arguments]
    if "--device" not in filled:
        filled += ["--device", "cpu"]
    assert train(*filled) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]
    assert not (tmp_path / "new").exists()


def test_a_full_disk_ends_a_training_with_the_line_that_goes_on(
    searched: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ["--from", searched, "--out", tmp_path / "out", "--device", "cpu"]
    room = (searched / "best" / "model.safetensors").stat().st_size // 2
    full = subprocess.run(
        [sys.executable, "-c", LIMITED, str(room), *map(str, common)],
        capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=100, check=False,
    )  # fmt: skip
    assert full.returncode == 2, full.stdout + full.stderr
    (line,) = full.stderr.splitlines()
    assert line.startswith("error: the disk cannot be written (")
    assert line.endswith("make room and go on with the same command"), "no checkpoint is there"

    save = Trainer.save

    def once(trainer: Trainer, folder: Path) -> None:
        if trainer.epoch > 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        save(trainer, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", once)
        for given, added in (([], " and --resume"), (["--resume"], "")):
            assert train(*common, *given) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.endswith(f"make room and go on with the same command{added}")
    assert train(*common, "--resume") == 0


def test_memory_that_is_not_enough_is_said_in_one_line(
    searched: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def exhausted(trainer: Trainer) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n20.00 MiB")

    monkeypatch.setattr(Trainer, "run_epoch", exhausted)
    assert train("--from", searched, "--out", tmp_path / "out", "--device", "cpu") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "out of memory on cpu (CUDA out of memory. Tried to allocate 20.00 MiB)" in line
    assert "with --set training.accumulation=2 batches are taken in 2 parts: try the same" in line


def test_a_training_that_has_ended_keeps_its_result(searched: Path, tmp_path: Path) -> None:
    common = ["--from", searched, "--out", tmp_path, "--device", "cpu"]
    assert train(*common) == 0
    before = (tmp_path / "result.json").read_text()
    assert json.loads(before)["metrics"].keys() > {"epoch", "objective", "epoch_seconds"}
    assert train(*common, "--resume") == 0
    assert (tmp_path / "result.json").read_text() == before
    (tmp_path / "result.json").unlink()
    assert train(*common, "--resume") == 0
    assert json.loads((tmp_path / "result.json").read_text())["objective"] > 0


def test_one_training_at_a_time_writes_a_folder(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--from", searched, "--out", tmp_path / "out", "--device", "cpu"]
    (tmp_path / "out").mkdir()
    lock = FileLock(tmp_path / "out" / ".lock")
    lock.acquire()
    assert train(*common) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"another training (process {os.getpid()} on " in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    lock.release()
    assert train(*common) == 0


def test_a_training_that_diverges_ends_with_1(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hot = ["training.learning_rate=1e30", "training.gradient_clip=1e30",
           "training.max_skipped_steps=1"]  # fmt: skip
    changes = [word for change in hot for word in ("--set", change)]
    common = ["--from", searched, "--out", tmp_path / "out", "--device", "cpu"]
    assert train(*common, *changes) == 1
    assert "diverged" in capsys.readouterr().err
