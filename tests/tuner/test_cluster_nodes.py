"""Clusters of several nodes on this machine: one dies, one comes, and not all see the storage."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray._private.ray_constants import PROCESS_TYPE_RAYLET
from ray.cluster_utils import Cluster

from tests.tuner.clusters import STORE, free_port, kill_all
from tests.tuner.support import kill, read_until, run_here, start, write_study
from tuner.config import load_study
from tuner.records import TrialRecord
from tuner.study import Ledger

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

EPOCHS = 10
WORKER = {"num_cpus": 1, "num_gpus": 1}
# Proposals at random depend on nothing that happens, so that studies can be compared.
STUDY: dict[str, Any] = {
    "training": {"epochs": EPOCHS},
    "data": {"train_scenes": 128},
    "search": {"trials": 5, "scheduler": "none", "sampler": "random"},
}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without GPU and three nodes with one each, that no CUDA stands behind."""
    mark = f"ristune-test-{uuid.uuid4().hex}"
    folder = tempfile.mkdtemp(prefix="rt", dir="/tmp")  # short: sockets lie in it
    monkeypatch.setenv("RISTUNE_MARK", mark)
    monkeypatch.setenv("RAY_TMPDIR", folder)  # where others would find its address
    # A lost node is noticed by its silence too: the default waits for half a minute.
    monkeypatch.setenv("RAY_health_check_period_ms", "1000")
    head = {
        "num_cpus": 1,
        "gcs_server_port": free_port(),
        "include_dashboard": False,
        "temp_dir": f"{folder}/ray",
        "object_store_memory": STORE,
    }
    cluster = Cluster(shutdown_at_exit=False)
    try:
        cluster.add_node(**head)
        for _ in range(3):
            cluster.add_node(**WORKER, object_store_memory=STORE)
        yield cluster
    finally:
        cluster.shutdown()
        kill_all(mark)
        shutil.rmtree(folder, ignore_errors=True)


def trials_of(folder: Path) -> list[TrialRecord]:
    ledger = Ledger(folder / "study.db", load_study(folder / "config.yaml"))
    try:
        return ledger.trials()
    finally:
        ledger.close()


def outcomes(folder: Path) -> list[Any]:
    return [(t.number, t.state, t.seed, t.params, t.curve, t.objective) for t in trials_of(folder)]


def nodes_of(trial: TrialRecord) -> list[str]:
    """The node of every epoch."""
    return [metrics["node_id"] for _, metrics in sorted(trial.epochs.items())]


def kill_node(cluster: Cluster, node_id: str) -> None:
    """kill -9 to a node's raylet and to all that it started, as when a machine is switched off."""
    (node,) = [node for node in cluster.worker_nodes if node.node_id == node_id]
    raylet = node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid
    for victim in [*descendants(raylet), raylet]:
        os.kill(victim, signal.SIGKILL)


def descendants(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [pid for child in children for pid in [*descendants(int(child)), int(child)]]


def test_a_node_is_killed_another_comes_and_nothing_is_lost(tmp_path: Path, nodes: Cluster) -> None:
    config = write_study(tmp_path, **STUDY, resources={"device": "cpu"})
    out = tmp_path / "run"
    process = start("--config", config, "--address", nodes.address, "--out", out)
    said = read_until(process, "trial 0001 epoch 3/", timeout=300)
    dead = nodes_of(trials_of(out)[1])[0]
    kill_node(nodes, dead)
    nodes.add_node(**WORKER, object_store_memory=STORE)
    output, _ = process.communicate(timeout=600)
    output = "".join(said) + output
    assert process.returncode == 0, output
    assert "4 CPUs, 3 GPUs; 3 trials side by side, 1 GPU and 1 CPU each" in output
    assert "GPUs are held and stay idle" in output
    assert "trial 0001 lost its machine" in output
    trials = trials_of(out)
    assert [trial.number for trial in trials] == list(range(5))
    assert {trial.state for trial in trials} == {"done"}
    assert len({repr(trial.params) for trial in trials}) == 5
    homes = nodes_of(trials[1])
    moved = homes.index(next(node for node in homes if node != dead))
    assert len(homes) == EPOCHS
    assert moved >= 2, "it began anew in place of going on from its checkpoint"
    assert dead not in homes[moved:]
    assert run_here("--config", config, "--local", "--out", tmp_path / "calm") == 0
    assert outcomes(out) == outcomes(tmp_path / "calm"), "not bit for bit"


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_trial_moves_between_nodes_and_drivers_by_way_of_a_shared_storage(
    tmp_path: Path, nodes: Cluster, scheme: str
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    resources = {"device": "cpu", "storage": f"{scheme}{shared}"}
    config = write_study(tmp_path, **STUDY, resources=resources)
    out = tmp_path / "run"
    asked = ("--address", nodes.address)
    process = start("--config", config, *asked, "--trials", 3, "--out", out)
    read_until(process, "trial 0001 epoch 3/", timeout=300)
    kill_node(nodes, nodes_of(trials_of(out)[1])[0])
    read_until(process, "trial 0001 lost its machine", timeout=120)
    read_until(process, "trial 0001 epoch", timeout=120)
    kill(process)
    before = {trial.number: trial for trial in trials_of(out)}
    assert before[1].checkpoint is not None
    assert before[1].checkpoint.startswith(str(shared))
    assert not list(out.glob("trials/*/checkpoint*"))
    resumed = start("--resume", out, *asked)
    output, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, output
    for number, trial in before.items():
        assert (f"trial {number:04d} goes on after epoch" in output) == (trial.state == "running")
    assert {trial.state for trial in trials_of(out)} == {"done"}
    assert (out / "best" / "model.safetensors").exists()
    best = min(trials_of(out), key=lambda trial: trial.objective or 1e9)
    left = [str(path) for path in shared.glob("*/*/checkpoint*")]
    assert left == [best.checkpoint], "checkpoints of losers stay"
    calm = tmp_path / "calm"
    assert run_here("--config", config, "--local", "--trials", 3, "--out", calm) == 0
    assert outcomes(out) == outcomes(calm), "not bit for bit"
