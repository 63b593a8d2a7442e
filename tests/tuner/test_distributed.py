"""Real studies on a real Ray: stopped, killed, interrupted and gone on with."""

from __future__ import annotations

import csv
import json
import os
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.tuner.clusters import Head, actors, started_head
from tests.tuner.events import assert_mirrors_the_ledger
from tests.tuner.support import (
    Clock,
    kill,
    processes_with,
    read_until,
    run,
    run_here,
    start,
    wait_for,
    write_study,
)
from tuner.config import load_study
from tuner.gauges import GAUGES, PREFIX
from tuner.promotion import Promotion
from tuner.records import TrialRecord
from tuner.study import Ledger


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A cluster of one node with two CPUs."""
    with started_head() as found:
        yield found


def trials_of(folder: Path) -> list[TrialRecord]:
    ledger = Ledger(folder / "study.db", load_study(folder / "config.yaml"))
    try:
        return ledger.trials()
    finally:
        ledger.close()


def assert_whole(trial: TrialRecord, epochs: int) -> None:
    """Every epoch is there once, and the last is the score."""
    assert [epoch for epoch, _ in trial.curve] == list(range(1, epochs + 1))
    assert trial.state == "done"
    assert trial.objective == trial.curve[-1][1]


def test_a_study_runs_on_a_cluster_prunes_and_survives_bad_trials(
    tmp_path: Path, head: Head
) -> None:
    rate: dict[str, Any] = {"type": "float", "low": 1e-6, "high": 1e31, "log": True}
    config = write_study(
        tmp_path,
        training={"epochs": 4, "gradient_clip": 1e30, "max_skipped_steps": 1},
        search={
            "trials": 6,
            "reduction_factor": 2,
            "space": {"training.learning_rate": rate},
            # the last of these is behind all others and starts when two of them have reported,
            # whichever worker comes up first: it is stopped on a slow machine too
            "enqueue": [{"training.learning_rate": value} for value in (1e30, 2e-3, 1e-6, 2e-6)],
        },
    )
    out = tmp_path / "run"
    finished = run("--config", config, "--address", head.address, "--out", out)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"the Ray cluster at {head.address}: 2 CPUs, 0 GPUs" in finished.stdout
    assert "no GPU is used (there is none): trials run on the CPU" in finished.stdout
    trials = trials_of(out)
    assert [trial.number for trial in trials] == list(range(6))
    assert trials[1].state == "failed"
    assert str(trials[1].reason).startswith("diverged")
    assert trials[4].state == "pruned"
    for trial in trials:
        if trial.state == "pruned":
            assert trial.epoch < 4
            assert len(trial.curve) == trial.epoch
        elif trial.state == "done":
            assert_whole(trial, 4)
    best = json.loads((out / "best.json").read_text())
    done = {t.number: t.objective for t in trials if t.state == "done"}
    assert best["objective"] == min(value for value in done.values() if value is not None)
    with (out / "trials.csv").open() as stream:
        assert [row["state"] for row in csv.DictReader(stream)] == [t.state for t in trials]
    assert sorted(path.name for path in (out / "best").iterdir()) == [
        "config.json",
        "decision.json",
        "model.safetensors",
    ]
    assert "\x1b" not in finished.stdout


@pytest.mark.slow
def test_a_trial_whose_actor_is_killed_goes_on_from_its_checkpoint(
    tmp_path: Path, head: Head
) -> None:
    changes: dict[str, Any] = {
        "training": {"epochs": 16},
        "search": {"trials": 1, "scheduler": "none"},
        "data": {"train_scenes": 128},
    }
    config = write_study(tmp_path, **changes)
    out = tmp_path / "run"
    wait_for(lambda: not actors(head))
    process = start("--config", config, "--address", head.address, "--out", out)
    read_until(process, "trial 0000 epoch 3/16")
    for victim in actors(head):
        os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "trial 0000 lost its machine" in output
    (trial,) = trials_of(out)
    assert_whole(trial, 16)
    assert run_here("--config", config, "--local", "--out", tmp_path / "calm") == 0
    assert trials_of(tmp_path / "calm")[0].curve == trial.curve, "not bit for bit"


@pytest.mark.slow
def test_a_killed_driver_loses_nothing_and_repeats_nothing(tmp_path: Path, head: Head) -> None:
    config = write_study(
        tmp_path,
        training={"epochs": 12},
        search={"trials": 4, "scheduler": "none"},
        data={"train_scenes": 128},
    )
    out = tmp_path / "run"
    process = start("--config", config, "--address", head.address, "--out", out)
    read_until(process, "trial 0002 epoch 2/12")
    kill(process)  # at once: the trials are short
    before = {trial.number: trial for trial in trials_of(out)}
    wait_for(lambda: not actors(head))
    resumed = run("--resume", out, "--address", head.address)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "trial 0002 goes on after epoch" in resumed.stdout
    after = {trial.number: trial for trial in trials_of(out)}
    assert list(after) == [0, 1, 2, 3]
    for number, trial in after.items():
        assert_whole(trial, 12)
        if number in before:
            assert (trial.params, trial.seed) == (before[number].params, before[number].seed)
            known = before[number].curve
            assert trial.curve[: len(known)] == known
        if number in before and before[number].state == "done":
            assert f"trial {number:04d} goes on" not in resumed.stdout
            assert f"trial {number:04d} starts" not in resumed.stdout
    assert_mirrors_the_ledger(out)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_interrupted_run_ends_with_130_and_goes_on(
    tmp_path: Path, head: Head, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    config = write_study(
        tmp_path,
        training={"epochs": 40},  # many: what is read here may have happened long ago
        search={"trials": 2, "scheduler": "none"},
        data={"train_scenes": 128},
    )
    out = tmp_path / "run"
    process = start("--config", config, "--address", head.address, "--out", out)
    read_until(process, "epoch 3/40")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert f"python -m tuner.run --resume {out}" in output
    assert "Traceback" not in output
    assert "running" in {trial.state for trial in trials_of(out)}
    # Either mode goes on where the other stopped.
    assert run_here("--resume", out, "--local") == 0
    assert "goes on after epoch" in capsys.readouterr().out
    for trial in trials_of(out):
        assert_whole(trial, 40)


def scraped(head: Head, trial: str) -> dict[str, float]:
    """What the head's metrics port says of a trial of the study "measured", by metric."""
    with urlopen(f"http://127.0.0.1:{head.metrics_port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    labels = {"study": "measured", "trial": trial}  # counters of others' trials stay
    return {
        sample.name: sample.value
        for family in families
        for sample in family.samples
        if labels.items() <= sample.labels.items()
    }


@pytest.mark.slow
def test_what_a_trial_last_reported_is_found_on_the_metrics_port(
    tmp_path: Path, head: Head
) -> None:
    # The configuration's own trial diverges, then its actor takes one with a better rate.
    rate = {"type": "float", "low": 1e-4, "high": 1e30, "log": True}
    config = write_study(
        tmp_path,
        name="measured",
        training={
            "epochs": 400,
            "learning_rate": 1e30,
            "gradient_clip": 1e30,
            "max_skipped_steps": 1,
        },
        tikhonov={"solver": "gram", "regularization": 0.0},  # falls back: too few antennas
        search={
            "trials": 2,
            "scheduler": "none",
            "space": {"training.learning_rate": rate},
            "enqueue": [{"training.learning_rate": 1e-3}],
        },
        resources={"concurrent": 1},
    )
    out = tmp_path / "run"
    process = start("--config", config, "--address", head.address, "--out", out)
    read_until(process, "trial 0001 epoch 3/400")
    process.send_signal(signal.SIGSTOP)  # the actor ends its epoch and then waits for orders
    seen: list[dict[str, float]] = [{}, {}]

    def settled() -> bool:
        time.sleep(1.2)  # a report interval
        seen.append(scraped(head, "trial-0001"))
        return "ray_ristune_objective" in seen[-1] and seen[-1] == seen[-2] == seen[-3]

    try:
        wait_for(settled)
        failed = scraped(head, "trial-0000")
    finally:
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    shown = seen[-1]
    trial = trials_of(out)[1]
    epoch = int(shown["ray_ristune_epoch"])
    metrics = trial.epochs[epoch]
    gauges = {f"ray_{PREFIX}{name}": metrics[name] for name in GAUGES if name in metrics}
    assert set(GAUGES) - set(metrics) == {"gpu_memory_bytes"}  # there is no GPU here
    fallbacks = sum(m["solver_fallbacks"] for e, m in trial.epochs.items() if e <= epoch)
    assert fallbacks > 0
    assert shown == gauges | {"ray_ristune_solver_fallbacks_total": fallbacks}
    assert failed["ray_ristune_skipped_steps_total"] == 1
    assert not any(f"ray_{PREFIX}{name}" in failed for name in GAUGES)


def test_a_gpu_that_can_never_be_given_is_refused_at_once(tmp_path: Path, head: Head) -> None:
    config = write_study(tmp_path)
    asked = ["--config", config, "--address", head.address, "--out", tmp_path / "run"]
    finished = run(*asked, "--gpus-per-trial", 1)
    assert finished.returncode == 2
    assert "resources.gpus_per_trial: 1 GPU a trial asked, but" in finished.stderr
    assert len(finished.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    many = run(*asked, "--cpus-per-trial", 3)
    assert many.returncode == 2
    assert "resources.cpus_per_trial: 3 CPUs a trial asked" in many.stderr


@pytest.mark.slow
def test_ray_is_started_here_where_there_is_no_cluster(tmp_path: Path) -> None:
    mark = f"ristune-test-{uuid.uuid4().hex}"
    out = tmp_path / "run"
    config = write_study(tmp_path, search={"scheduler": "none"})  # so that both are done
    finished = run(
        *("--config", config, "--address", "local", "--out", out, "--trials", 2),
        RISTUNE_MARK=mark,
        RAY_TMPDIR=tempfile.gettempdir(),
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "Ray started on this machine" in finished.stdout
    assert "Ray dashboard: http://127.0.0.1:" in finished.stdout
    assert finished.stderr == ""
    wait_for(lambda: not processes_with(mark, "raylet"))
    assert [trial.state for trial in trials_of(out)] == ["done", "done"]


@pytest.mark.slow
def test_a_time_budget_on_a_cluster_leaves_trials_that_go_on_and_the_study_can_grow(
    tmp_path: Path,
    head: Head,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tuner.conclusion._score_winner", lambda folder, study, progress: None)
    clock = Clock(monkeypatch)
    config = write_study(
        tmp_path, training={"epochs": 6}, search={"trials": 2, "scheduler": "none"}
    )
    out = tmp_path / "run"
    asked = ("--address", head.address, "--concurrent", 1)
    assert run_here("--config", config, *asked, "--time-budget", "7m", "--out", out) == 0
    assert "ended early: the time budget of 7m is used up" in capsys.readouterr().out
    first, second = trials_of(out)
    assert_whole(first, 6)
    assert second.state == "running"
    assert second.epoch < 6
    clock.now = 1e6  # between sessions no time counts
    assert run_here("--resume", out, *asked, "--time-budget", "2h", "--trials", 3) == 0
    trials = trials_of(out)
    assert trials[0] == first
    for trial in trials:
        assert_whole(trial, 6)
    assert len({repr(trial.params) for trial in trials}) == 3
    assert (trials[1].params, trials[1].seed) == (second.params, second.seed)
    assert load_study(out / "config.yaml").search.trials == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.long
def test_a_promotion_on_a_cluster_survives_a_killed_driver_and_a_killed_actor(
    tmp_path: Path, head: Head
) -> None:
    config = write_study(
        tmp_path,
        search={
            "trials": 3,
            "sampler": "random",  # learns nothing from the order in which trials end
            "scheduler": "none",
            "full_epochs": 12,
            "promote_seeds": 2,
        },
        data={"train_scenes": 128},
    )
    asked = ("--config", config, "--promote", 2)
    out, calm = tmp_path / "run", tmp_path / "calm"
    process = start(*asked, "--address", head.address, "--out", out)
    read_until(process, "run 0001 epoch 3/12", timeout=300)
    kill(process)
    wait_for(lambda: not actors(head))
    process = start("--resume", out, "--address", head.address)
    read_until(process, "run 0002 epoch 2/12", timeout=300)
    for victim in actors(head):
        os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "lost its machine" in output
    assert "trial 0000 starts" not in output
    assert run_here(*asked, "--local", "--out", calm) == 0
    results = []
    for folder in (out, calm):
        search = Ledger(folder / "study.db", load_study(folder / "config.yaml"))
        promotion = Promotion(search)
        for promoted in promotion.configurations():
            for trial in promoted.runs:
                assert trial.state == "done", trial.reason
                assert_whole(trial, 12)
        results.append(
            [(p.trial.number, p.mean, p.std, [run.seed for run in p.runs])
             for p in promotion.configurations()]
        )  # fmt: skip
        promotion.close()
        search.close()
    assert results[0] == results[1], "not bit for bit"
    best = [json.loads((folder / "best.json").read_text()) for folder in (out, calm)]
    assert best[0]["seed"] == best[1]["seed"]
    weights = [folder / "best" / "model.safetensors" for folder in (out, calm)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.long
def test_two_objectives_have_the_same_front_on_a_cluster_as_locally(
    tmp_path: Path, head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.conclusion._score_winner", lambda folder, study, progress: None)
    config = write_study(
        tmp_path,
        search={
            "trials": 4,
            "cost": "flops",
            "scheduler": "none",
            "sampler": "random",  # learns nothing from the order in which trials end
            "space": {"network.width": {"type": "categorical", "choices": [8, 16, 24, 32]}},
        },
    )
    fronts = []
    for name, where in (("ray", ("--address", head.address)), ("here", ("--local",))):
        assert run_here("--config", config, *where, "--out", tmp_path / name) == 0
        assert [trial.state for trial in trials_of(tmp_path / name)] == ["done"] * 4
        fronts.append(json.loads((tmp_path / name / "best.json").read_text())["pareto"])
    assert fronts[0] == fronts[1]
    assert fronts[0][0]["params"] == {"network.width": 8}, "the cheapest is always on the front"


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["median", "hyperband"])
def test_another_scheduler_stops_what_is_worse_on_a_cluster(
    tmp_path: Path, head: Head, monkeypatch: pytest.MonkeyPatch, scheduler: str
) -> None:
    monkeypatch.setattr("tuner.conclusion._score_winner", lambda folder, study, progress: None)
    rates = [1e-2, 2e-2, 3e-2, 1e-6, 2e-6, 3e-6, 4e-6]
    config = write_study(
        tmp_path,
        training={"epochs": 6},
        search={
            "trials": len(rates),
            "scheduler": scheduler,
            "sampler": "cmaes",
            "include_base": False,
            "enqueue": [{"training.learning_rate": rate} for rate in rates],
            "space": {
                "training.learning_rate": {"type": "float", "low": 1e-6, "high": 1e-1, "log": True},
                "training.weight_decay": {"type": "float", "low": 1e-5, "high": 1e-4, "log": True},
            },
        },
    )
    out = tmp_path / "run"
    asked = ("--address", head.address, "--concurrent", 1)
    assert run_here("--config", config, *asked, "--trials", 5, "--out", out) == 0
    before = trials_of(out)
    assert run_here("--resume", out, *asked, "--trials", 7) == 0
    trials = trials_of(out)
    assert trials[:5] == before
    if scheduler == "median":  # in hyperband a trial's bracket decides
        assert "pruned" in {trial.state for trial in trials[5:]}, "earlier trials were forgotten"
    for trial in trials:
        if trial.state == "pruned":
            assert trial.epoch < 6
        else:
            assert_whole(trial, 6)
    pruned = {trial.number for trial in trials if trial.state == "pruned"}
    assert json.loads((out / "best.json").read_text())["trial"] not in pruned


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["none", "asha"])
def test_what_cannot_win_is_stopped_on_a_cluster_as_it_is_locally(
    tmp_path: Path, head: Head, monkeypatch: pytest.MonkeyPatch, scheduler: str
) -> None:
    monkeypatch.setattr("tuner.conclusion._score_winner", lambda folder, study, progress: None)
    rates = [2e-3, 8e-3, 2e-2, 4e-3, 3e-7, 1e-7, 1e-2, 2e-7]
    config = write_study(
        tmp_path,
        training={"epochs": 6},
        search={
            "trials": len(rates),
            "scheduler": scheduler,
            "grace_epochs": 5,  # a rung that few come to
            "least_chance": 0.2,
            "include_base": False,
            "enqueue": [{"training.learning_rate": rate} for rate in rates],
            "space": {
                "training.learning_rate": {"type": "float", "low": 1e-7, "high": 1e-1, "log": True}
            },
        },
    )
    local, out = tmp_path / "local", tmp_path / "run"
    assert run_here("--config", config, "--local", "--out", local) == 0
    wanted = trials_of(local)
    assert "pruned" in {trial.state for trial in wanted}
    asked = ("--address", head.address, "--concurrent", 1)
    assert run_here("--config", config, *asked, "--trials", 5, "--out", out) == 0
    assert run_here("--resume", out, *asked, "--trials", len(rates)) == 0
    found = trials_of(out)
    if scheduler == "none":  # of rungs Ray's and Optuna's judge a little differently
        assert [t.curve for t in found] == [t.curve for t in wanted]
        assert [(t.state, t.reason) for t in found] == [(t.state, t.reason) for t in wanted]
    reasons = [str(trial.reason) for trial in found if trial.state == "pruned"]
    hopeless = [reason for reason in reasons if "its chance to end below" in reason]
    assert hopeless
    assert set(reasons) - set(hopeless) <= (
        {"stopped after epoch 5"} if scheduler == "asha" else set()
    )
    for trial in found:
        if trial.state != "pruned":
            assert_whole(trial, 6)


def test_a_dry_run_asks_a_cluster_for_its_resources_and_leaves_it_alone(
    tmp_path: Path, head: Head
) -> None:
    config = write_study(tmp_path)
    out = tmp_path / "run"
    seen = run("--config", config, "--address", head.address, "--out", out, "--dry-run")
    assert seen.returncode == 0, seen.stderr
    assert (
        f"the Ray cluster at {head.address}: 2 CPUs, 0 GPUs; 2 trials side by side" in seen.stdout
    )
    assert "time: not known: trials run on other machines" in seen.stdout
    assert f"the run folder would be {out}" in seen.stdout
    assert not out.exists()
    assert not actors(head), "something was started"
