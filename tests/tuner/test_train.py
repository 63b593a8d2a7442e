from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from model import Localizer
from tests.tuner.support import read_until, run, run_here, start, write_study
from tuner.command import execute
from tuner.train import app


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
        (["--from", "{tmp}/broken.json"], "cannot be read"),
        (["--from", "{tmp}/foreign.json"], "has no 'study'"),
        (["--from", "{run}", "--epochs", "0"], "training.epochs: got 0"),
        (["--from", "{run}", "--set", "network.widht=8"], "did you mean width"),
        (["--from", "{run}", "--data", "{tmp}/absent", "--out", "{tmp}/o"], "absent"),
        (["--from", "{run}", "--out", "{tmp}/broken.json/x"], "--out: cannot write"),
        (["--from", "{run}", "--out", "{tmp}/new", "--resume"], "--resume: no checkpoint"),
    ],
)
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
    assert train(*filled, "--device", "cpu") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert words in lines[0]


def test_a_training_that_diverges_ends_with_1(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hot = ["training.learning_rate=1e30", "training.gradient_clip=1e30",
           "training.max_skipped_steps=1"]  # fmt: skip
    changes = [word for change in hot for word in ("--set", change)]
    common = ["--from", searched, "--out", tmp_path / "out", "--device", "cpu"]
    assert train(*common, *changes) == 1
    assert "diverged" in capsys.readouterr().err
