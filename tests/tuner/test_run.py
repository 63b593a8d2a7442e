from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tuner.support import ROOT, environment, run, run_here, write_study
from tuner.command import execute
from tuner.run import app


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_help_is_complete_and_imports_nothing_heavy() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = run("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the processor, so that a busy machine does not count: seconds of libraries would.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert finished.returncode == 0
    for flag in ("--config", "--set", "--trials", "--time-budget", "--target", "--warm-start",
                 "--epochs", "--out", "--data", "--local", "--resume", "--address",
                 "--gpus-per-trial", "--cpus-per-trial", "--concurrent", "--seed",
                 "--dry-run", "--quiet", "--verbose"):  # fmt: skip
        assert flag in finished.stdout
    code = (
        "import sys, tuner.run, tuner.train, tuner.report\n"
        "print([m for m in ('torch', 'ray', 'optuna', 'plotly') if m in sys.modules])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert loaded.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "training.epochs=many"], "training.epochs: got 'many'"),
        (["--set", "traning.epochs=3"], "traning: unknown field (did you mean training?)"),
        (["--set", "search.space.network.width={type: int, low: 9, high: 9}"], "network.width=9"),
        (["--trials", "0"], "search.trials: got 0"),
        (["--trials", "few"], "--trials"),
        (["--time-budget", "90x"], "search.time_budget: got '90x'; expected seconds, or numbers"),
        (["--time-budget", "0m"], "search.time_budget: got 0"),
        (["--target", "low"], "search.target: got 'low'"),
        (["--gpus-per-trial", "1"], "resources.gpus_per_trial: 1 GPU a trial asked"),
        (["--data", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--address", "auto"], "--local: uses no Ray"),
        (["--resume", "/nowhere/at/all"], "/nowhere/at/all: no such folder"),
        (["--frobnicate"], "--frobnicate"),
        (["--quiet", "--verbose"], "--quiet: excludes --verbose"),
        (["--set", "precision.amp=fp16"], "precision.amp: got 'fp16'"),
    ],
)
def test_bad_input_ends_with_2_and_one_line_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    if "precision" in arguments[-1] or arguments[0] == "--gpus-per-trial":
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("about machines without a GPU")
    config = [] if "--resume" in arguments else ["--config", str(write_study(tmp_path))]
    out = [] if "--resume" in arguments else ["--out", str(tmp_path / "run")]
    assert execute(app, [*config, *out, "--local", *arguments]) == 2
    line = said(capsys)
    assert line.startswith("error: ")
    assert words in line
    assert not (tmp_path / "run").exists(), "something was started"


def test_a_missing_configuration_and_an_unwritable_folder_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(app, ["--config", str(tmp_path / "absent.yaml"), "--local"]) == 2
    assert "absent.yaml: no such file" in said(capsys)
    (tmp_path / "file").write_text("")
    config = str(write_study(tmp_path))
    out = str(tmp_path / "file" / "run")
    assert execute(app, ["--config", config, "--local", "--out", out]) == 2
    assert f"--out: cannot write to {out}" in said(capsys)


def test_a_study_that_goes_on_may_not_be_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(app, ["--resume", str(tmp_path), "--epochs", "5"]) == 2
    assert "--epochs: cannot change with --resume" in said(capsys)


def test_an_address_without_a_cluster_ends_in_bounded_time(tmp_path: Path) -> None:
    config = write_study(tmp_path)
    begun = time.monotonic()
    finished = run("--config", config, "--address", "127.0.0.1:1", "--out", tmp_path / "run")
    assert time.monotonic() - begun < 60
    assert finished.returncode == 2
    assert finished.stderr.splitlines() == [
        "error: --address: no Ray cluster at 127.0.0.1:1: Connection refused"
    ]
    ray_client = run("--config", config, "--address", "ray://head:10001")
    assert ray_client.returncode == 2
    assert "Ray client address" in ray_client.stderr


def test_a_study_of_which_no_trial_finishes_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_study(
        tmp_path,
        training={"learning_rate": 1e30, "gradient_clip": 1e30, "max_skipped_steps": 1},
        search={
            "trials": 2,
            "space": {"training.learning_rate": {"type": "float", "low": 1e29, "high": 1e31}},
        },
    )
    assert run_here("--config", config, "--local", "--out", tmp_path / "run") == 1
    assert "no trial finished; for example: diverged" in capsys.readouterr().out
    assert not (tmp_path / "run" / "best.json").exists()
    rows = (tmp_path / "run" / "trials.csv").read_text().splitlines()
    assert [row.split(",")[1] for row in rows[1:]] == ["failed", "failed"]
    assert "failed" in (tmp_path / "run" / "report.html").read_text()


def test_output_to_a_pipe_is_plain_lines(tmp_path: Path) -> None:
    config = write_study(tmp_path)
    finished = run("--config", config, "--local", "--out", tmp_path / "run")
    assert finished.returncode == 0
    assert "\x1b" not in finished.stdout
    assert "trial 0000 epoch 1/2: " in finished.stdout
    assert finished.stderr == ""
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert best["objective"] == best["metrics"]["objective"]
