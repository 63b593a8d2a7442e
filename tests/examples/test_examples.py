"""The examples run, from a shell, as their first lines say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tuner.clusters import ray_head
from tests.tuner.support import ROOT


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray of our own."""
    with ray_head("--num-cpus=2") as head:
        yield head.address


QUICK = [
    *("--set", "data.train_scenes=64", "--set", "data.val_scenes=64"),
    *("--set", "training.epochs=2", "--set", "search.scheduler=none"),
]


def run(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "XDG_CACHE_HOME": str(cwd / "cache"),
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "disabled",
    }
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


def succeeded(found: subprocess.CompletedProcess[str]) -> str:
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_a_scene_is_simulated_and_localised(tmp_path: Path) -> None:
    lines = succeeded(run("simulate_and_localise.py", "--snr-db", "25", cwd=tmp_path)).splitlines()
    heads = [line for line in lines if line.endswith(":")]
    assert heads == ["true:", "network:", "NOMP:"]
    true = lines[1 : lines.index("network:")]
    found = lines[lines.index("network:") + 1 : lines.index("NOMP:")]
    assert true
    assert found

    def azimuths(rows: list[str]) -> list[float]:
        return [float(row.split("°")[0]) for row in rows]

    # At 25 dB the strongest source is found to within its tolerance.
    assert min(abs(azimuths(found)[0] - a) for a in azimuths(true)) < 5


@pytest.mark.slow
def test_one_network_is_trained_and_scored(tmp_path: Path) -> None:
    arguments = ["--epochs", "1", "--scenes", "64", "--out", "one"]
    text = succeeded(run("train_one_network.py", *arguments, cwd=tmp_path))
    assert "epoch 1: GOSPA" in text
    assert "nomp: F1" in text
    assert (tmp_path / "one" / "best" / "config.json").exists()
    again = succeeded(run("train_one_network.py", *arguments, cwd=tmp_path))
    assert "epoch 1" not in again  # finished already


@pytest.mark.slow
def test_a_study_is_run_from_python_and_read(tmp_path: Path) -> None:
    text = succeeded(run("tune_here.py", "--trials", "2", "--out", "here", *QUICK, cwd=tmp_path))
    assert "trial 0: objective" in text
    assert "trial 1: objective" in text
    best = json.loads((tmp_path / "here" / "best.json").read_text())
    assert f"{best['objective']:.4f}" in text


@pytest.mark.slow
def test_a_study_runs_on_a_cluster_and_goes_on(tmp_path: Path, cluster: str) -> None:
    def study(trials: int) -> str:
        arguments = ["--address", cluster, "--out", "there", "--trials", str(trials), *QUICK]
        return succeeded(run("tune_on_a_cluster.py", *arguments, cwd=tmp_path))

    assert "trials: 1 done" in study(1)
    assert "trials: 2 done" in study(2)


@pytest.mark.slow
def test_a_study_with_code_of_its_own_runs_here_and_on_a_cluster(
    tmp_path: Path, cluster: str
) -> None:
    config = str(ROOT / "examples" / "extension.yaml")
    for name, place in (("local", ["--local"]), ("ray", ["--address", cluster])):
        command = [sys.executable, "-m", "tuner.run", "--config", config, "--trials", "2"]
        command += ["--out", str(tmp_path / name), *place, *QUICK]
        environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
        found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        text = succeeded(found)
        assert "trials: 2 done" in text
        assert "simulated scenes (examples.extension:nearby)" in text


def test_a_plug_in_that_cannot_be_had_ends_the_command_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tuner.run", "--local", "--out", str(tmp_path / "run")]
    command += ["--config", str(ROOT / "examples" / "extension.yaml")]
    command += ["--set", "network.builder=examples.extension:SpectrumNet"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.startswith("error: examples.extension:SpectrumNet: ")
    assert "did you mean SpectrumNetwork" in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
