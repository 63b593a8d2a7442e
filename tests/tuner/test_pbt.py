"""Population-based training with networks that really train."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.training import Trainer
from tests.tuner.clusters import Head, actors, started_head
from tests.tuner.support import (
    kill,
    merged,
    read_until,
    run,
    run_here,
    start,
    wait_for,
    write_study,
)
from tuner.command import execute
from tuner.config import load_study
from tuner.folder import RunFolder
from tuner.ledger import read_ledger
from tuner.records import TrialRecord
from tuner.results import lineage
from tuner.train import app
from tuner.trial import MemoryExhausted, TrialRun

PBT: dict[str, Any] = {
    "seed": 4,  # whose winner is a successor's successor
    "training": {"epochs": 4},
    "search": {
        "scheduler": "pbt",
        "population": 4,
        "quantile": 0.5,
        "perturbation_epochs": 1,
        "trials": 10,
        "sampler": "random",
    },
}


def trials_of(folder: Path) -> list[TrialRecord]:
    ledger = read_ledger(RunFolder(folder), load_study(folder / "config.yaml"))
    try:
        return ledger.trials()
    finally:
        ledger.close()


def story(folder: Path) -> list[Any]:
    """All that the ledger says, but times and places."""
    return [
        (t.number, t.state, t.params, t.seed, t.curve, t.reason)
        + ((t.heir.donor, t.heir.epoch, t.heir.replaces, t.heir.changed) if t.heir else ())
        for t in trials_of(folder)
    ]


def train(*arguments: object) -> int:
    return execute(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of one population."""
    folder = tmp_path_factory.mktemp("pbt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tuner.conclusion._score_winner", lambda folder, study, progress: None)
        patch.setattr("tuner.conclusion.ensure_scenes", lambda folder, study: None)
        assert (
            run_here("--config", write_study(folder, **PBT), "--local", "--out", folder / "run")
            == 0
        )
    return folder / "run"


def test_a_winner_retrains_to_its_score_bit_for_bit_with_its_ancestors(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = json.loads((searched / "best.json").read_text())
    assert len(best["lineage"]) > 1
    assert train("--from", searched, "--out", tmp_path / "final", "--device", "cpu") == 0
    result = json.loads((tmp_path / "final" / "result.json").read_text())
    assert result["objective"] == best["objective"]
    shown = capsys.readouterr().out
    assert "the same, bit for bit" in shown
    ancestors = [
        f"up to epoch {one['epochs']} as trial {one['trial']:04d}" for one in best["lineage"]
    ]
    assert [line for line in shown.splitlines() if line.startswith("up to epoch")] == [
        *ancestors,
        f"up to epoch 4 as trial {best['trial']:04d}",
    ]
    again = (tmp_path / "final" / "best" / "model.safetensors").read_bytes()
    assert again == (searched / "best" / "model.safetensors").read_bytes()
    kept = sorted(path.name for path in (tmp_path / "final").iterdir())
    assert kept == [".lock", "best", "checkpoint", "config.json", "metrics.jsonl", "result.json"]


def test_a_successor_trains_on_from_its_donors_weights(searched: Path, tmp_path: Path) -> None:
    ledger = read_ledger(RunFolder(searched), load_study(searched / "config.yaml"))
    heirs = [trial for trial in ledger.trials() if trial.heir is not None]
    assert heirs
    for heir in heirs[:2]:
        assert heir.heir is not None
        trainer: Trainer | None = None
        for index, (trial, until) in enumerate(
            [*lineage(ledger, heir), (heir, heir.heir.epoch + 1)]
        ):
            begun = trainer
            trainer = Trainer(ledger.trial_config(trial))
            if begun is not None:
                begun.save(tmp_path / f"{heir.number}-{index}")
                trainer.inherit(tmp_path / f"{heir.number}-{index}")
            while trainer.epoch < until:
                metrics = trainer.run_epoch()
        assert heir.curve[0] == (metrics["epoch"], metrics["objective"])
    ledger.close()


def test_a_longer_training_gives_each_ancestor_its_share(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lasts = [one["epochs"] for one in json.loads((searched / "best.json").read_text())["lineage"]]
    common = ["--from", searched, "--device", "cpu", "--out"]
    assert train(*common, tmp_path / "long", "--epochs", 8) == 0
    shown = capsys.readouterr().out
    for last in lasts:
        assert f"up to epoch {2 * last} as trial" in shown
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "long/metrics.jsonl").open()]
    assert epochs == list(range(1, 9))
    assert train(*common, tmp_path / "short", "--epochs", 1) == 0
    assert "as trial" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_cut_training_goes_on_in_the_stage_where_it_was(searched: Path, tmp_path: Path) -> None:
    best = json.loads((searched / "best.json").read_text())
    common = ["--from", searched, "--device", "cpu", "--out", tmp_path / "cut", "--epochs", 80]
    process = start(*common, module="tuner.train")
    read_until(process, f"up to epoch {20 * best['lineage'][1]['epochs']} as")
    kill(process)
    assert train(*common) == 2, "it began anew without being asked"
    assert train(*common, "--resume") == 0
    assert (
        train("--from", searched, "--device", "cpu", "--out", tmp_path / "w", "--epochs", 80) == 0
    )
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("cut", "w")]
    assert results[0]["objective"] == results[1]["objective"]


def test_files_and_report_say_where_a_successor_comes_from(searched: Path) -> None:
    heir = next(trial for trial in trials_of(searched) if trial.heir is not None)
    assert heir.heir is not None
    words = f"from trial {heir.heir.donor:04d} after epoch {heir.heir.epoch}"
    with (searched / "trials.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert rows[heir.number]["note"] == words
    page = (searched / "report.html").read_text()
    assert words in page
    assert "population-based training" in page
    assert f"after epoch {heir.heir.epoch} 2 of 4 stopped" in page
    assert "could not be drawn" not in page


@pytest.mark.slow
def test_a_killed_population_goes_on_to_the_same_end(searched: Path, tmp_path: Path) -> None:
    config = write_study(tmp_path, **PBT)
    for word in ("trial 0001 epoch 1/4", "trial 0004 epoch 2/4", "trial 0006 epoch 3/4"):
        out = tmp_path / word.split()[1]
        process = start("--config", config, "--local", "--out", out)
        read_until(process, word, timeout=300)
        kill(process)
        resumed = run("--resume", out, "--local", timeout=300)
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr
        assert story(out) == story(searched)


def test_a_donor_that_begins_anew_leaves_its_heirs_what_they_begin_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.conclusion._score_winner", lambda folder, study, progress: None)
    config = write_study(
        tmp_path, **merged(PBT, {"search": {"perturbation_epochs": 2, "trials": 6}})
    )
    out = tmp_path / "run"
    spoilt: list[int] = []

    class Exhausted(TrialRun):
        """One that meets the end of its memory once, beside a checkpoint that cannot be read."""

        def step(self) -> dict[str, Any]:
            heirs = [trial for trial in trials_of(out) if trial.heir is not None]
            donors = {trial.heir.donor for trial in heirs if trial.heir and not trial.curve}
            for trial in trials_of(out):
                last = out / "trials" / f"{trial.number:04d}" / "checkpoint-00003"
                if trial.number in donors and last.is_dir() and not spoilt:
                    spoilt.append(trial.number)
                    for path in last.iterdir():
                        path.write_bytes(b"cut off")
                    raise MemoryExhausted("no more of it")
            return super().step()

    monkeypatch.setattr("tuner.local.TrialRun", Exhausted)
    assert run_here("--config", config, "--local", "--out", out) == 0
    trials = trials_of(out)
    assert [trial.state for trial in trials if trial.heir] == ["done", "done"]
    assert [epoch for epoch, _ in trials[spoilt[0]].curve] == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A cluster of one node with two CPUs."""
    with started_head() as found:
        yield found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_population_on_a_cluster_decides_as_the_local_mode_whoever_is_killed(
    searched: Path, tmp_path: Path, head: Head
) -> None:
    config, out = write_study(tmp_path, **PBT), tmp_path / "run"
    process = start("--config", config, "--address", head.address, "--out", out)
    read_until(process, "trial 0004 epoch 2/4", timeout=300)
    kill(process)
    wait_for(lambda: not actors(head))
    process = start("--resume", out, "--address", head.address)
    read_until(process, "epoch 3/4", timeout=300)
    for victim in actors(head):
        os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert story(out) == story(searched)
