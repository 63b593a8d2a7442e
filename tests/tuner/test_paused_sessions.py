"""ASHA with pauses for real: trials that are trained, killed and go on, here and on a cluster."""

from __future__ import annotations

import math
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.tuner.clusters import actors, started_head
from tests.tuner.pausing import story
from tests.tuner.support import (
    kill,
    read_until,
    run,
    run_here,
    start,
    trials_of,
    wait_for,
    write_study,
)

REAL: dict[str, Any] = {
    "training": {"epochs": 8},
    "data": {"train_scenes": 64},
    "search": {
        "scheduler": "asha-pausing",
        "trials": 8,
        "sampler": "random",
        "grace_epochs": 1,
        "reduction_factor": 2,
    },
}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was run without a break."""
    folder = tmp_path_factory.mktemp("pausing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tuner.conclusion._score_winner", lambda folder, study, progress: None)
        patch.setattr("tuner.conclusion.ensure_scenes", lambda folder, study: None)
        asked = ("--config", write_study(folder, **REAL), "--local", "--out", folder / "run")
        assert run_here(*asked) == 0
    return folder / "run"


def test_a_trial_that_waited_is_trained_as_one_that_did_not(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.conclusion._score_winner", lambda folder, study, progress: None)
    monkeypatch.setattr("tuner.conclusion.ensure_scenes", lambda folder, study: None)
    found = trials_of(searched)
    assert sorted(t.epoch for t in found) == [1, 1, 1, 1, 2, 2, 4, 8]
    config = write_study(tmp_path, **REAL | {"search": REAL["search"] | {"scheduler": "none"}})
    assert run_here("--config", config, "--local", "--out", tmp_path / "run") == 0
    for trial, whole in zip(found, trials_of(tmp_path / "run"), strict=True):
        assert trial.params == whole.params
        assert trial.curve == whole.curve[: trial.epoch], "not bit for bit"


@pytest.mark.slow
def test_a_killed_study_goes_on_to_the_same_end(searched: Path, tmp_path: Path) -> None:
    config = write_study(tmp_path, **REAL)
    for word in ("trial 0001 epoch 1/8", "epoch 3/8", "epoch 6/8"):
        out = tmp_path / word.replace(" ", "-").replace("/", "-")
        process = start("--config", config, "--local", "--out", out)
        read_until(process, word, timeout=300)
        kill(process)
        resumed = run("--resume", out, "--local", timeout=300)
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr
        assert story(trials_of(out)) == story(trials_of(searched))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trials_wait_and_go_on_on_a_cluster_whoever_is_killed(tmp_path: Path) -> None:
    config, out = write_study(tmp_path, **REAL), tmp_path / "run"
    with started_head() as head:
        process = start("--config", config, "--address", head.address, "--out", out)
        read_until(process, "goes on after epoch", timeout=300)
        kill(process)
        wait_for(lambda: not actors(head))
        process = start("--resume", out, "--address", head.address)
        read_until(process, "epoch 3/8", timeout=300)
        killed = 0
        for victim in actors(head):
            with suppress(ProcessLookupError):  # one that has just ended by itself
                os.kill(victim, signal.SIGKILL)
                killed += 1
        assert killed
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    found = trials_of(out)
    assert {trial.state for trial in found} == {"done", "pruned"}
    assert len(found) == 8
    for rung in (1, 2, 4):
        values = sorted(dict(t.curve)[rung] for t in found if t.epoch >= rung)
        on = [dict(t.curve)[rung] for t in found if t.epoch > rung]
        assert max(1, len(values) // 2) <= len(on) < max(2, len(values))
    best = min(t.objective or math.inf for t in found if t.state == "done")
    assert all(t.objective is None or t.objective >= best for t in found)
    for trial in found:
        assert [epoch for epoch, _ in trial.curve] == list(range(1, trial.epoch + 1))
