from __future__ import annotations

import ast
import errno
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace

import pytest
import torch
from pyarrow.fs import FileSystem
from ray.tune import PlacementGroupFactory

from model.training import Trainer
from tests.tuner.support import ROOT, environment, order
from tuner import checkpoints
from tuner.checkpoints import StorageOut
from tuner.trainable import (
    BEQUEATHS,
    CHECKPOINT,
    CONFIG,
    DONOR,
    HOME,
    RESUME,
    UNTIL,
    TrialActor,
    allocated_gpus,
)

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def _results_in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.tune.trainable.trainable.DEFAULT_STORAGE_PATH", str(tmp_path / "ray"))


def test_an_actor_saves_and_restores_between_epochs(tmp_path: Path) -> None:
    whole = TrialActor(order(tmp_path, 1))
    wanted = [whole.train()["objective"] for _ in range(2)]
    cut = order(tmp_path, 1) | {HOME: str(tmp_path / "trials" / "0007")}
    kept = TrialActor(cut).train()[CHECKPOINT]
    assert Path(kept).parent == tmp_path / "trials" / "0007"
    result = TrialActor(cut | {RESUME: kept}).train()
    assert (result["epoch"], result["objective"]) == (2, wanted[1])
    assert result["done"]


def test_an_epochs_checkpoint_stays_until_the_driver_asks_for_the_epoch_after_the_next(
    tmp_path: Path,
) -> None:
    actor = TrialActor(order(tmp_path, 1, training={"epochs": 4}))
    kept = []
    for count in (1, 2, 3):
        kept.append(Path(actor.train()[CHECKPOINT]))
        # The driver may be killed before it has heard of the newest.
        assert [path.exists() for path in kept] == [False] * (count - 2) + [True] * min(count, 2)
    again = TrialActor(order(tmp_path, 1, training={"epochs": 4}) | {RESUME: str(kept[1])})
    assert again.train()["epoch"] == 3
    again.train()
    assert not kept[1].exists(), "nobody goes on from there any more"


def test_a_reused_actor_leaves_nothing_of_the_last_trial_behind(tmp_path: Path) -> None:
    fresh = TrialActor(order(tmp_path, 2))
    wanted = [fresh.train()["objective"] for _ in range(2)]
    reused = TrialActor(order(tmp_path, 1, network={"width": 16}))
    reused.train()
    assert reused.reset(order(tmp_path, 2))
    results = [reused.train() for _ in range(2)]
    assert [result["objective"] for result in results] == wanted
    assert [result["epoch"] for result in results] == [1, 2]
    assert [result["training_iteration"] for result in results] == [1, 2]


def test_a_failed_trial_is_done_keeps_no_checkpoint_and_frees_the_actor(tmp_path: Path) -> None:
    (tmp_path / "empty" / "train").mkdir(parents=True)
    actor = TrialActor(order(tmp_path, 1, data={"shards": str(tmp_path / "empty")}))
    result = actor.train()
    assert result["done"]
    assert result["failed"]
    assert CHECKPOINT not in result
    assert actor.reset(order(tmp_path, 2))
    assert not actor.train()["failed"]


def test_an_epoch_says_where_it_ran_and_what_it_took_of_the_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = PlacementGroupFactory([{"CPU": 1, "GPU": 0.25}])
    monkeypatch.setattr(TrialActor, "trial_resources", given)
    result = TrialActor(order(tmp_path, 1)).train()
    assert result["gpu_seconds"] == 0.25 * result["epoch_seconds"] > 0
    assert (result["node"], result["device"]) == (platform.node(), "cpu")


def test_a_name_never_tells_of_a_trial_that_is_over(tmp_path: Path) -> None:
    actor = TrialActor(order(tmp_path, 1))
    name = repr(actor)
    actor.reset(order(tmp_path, 2))
    assert repr(actor) == name
    assert "tiny" in name


def test_an_actor_begins_with_its_donors_weights_and_makes_room_at_its_milestone(
    tmp_path: Path,
) -> None:
    long = {"training": {"epochs": 4}}
    donor = TrialActor(order(tmp_path, 1, **long) | {UNTIL: 2, BEQUEATHS: True})
    results = [donor.train() for _ in range(2)]
    assert [result["paused"] for result in results] == [False, True]
    heir = order(tmp_path, 2, **long) | {DONOR: results[-1][CHECKPOINT], UNTIL: 3, BEQUEATHS: True}
    result = TrialActor(heir).train()
    assert (result["epoch"], result["paused"], result["done"]) == (3, True, True)
    restarted = TrialActor(heir | {RESUME: result[CHECKPOINT], UNTIL: 4, BEQUEATHS: True})
    last = restarted.train()
    assert (last["epoch"], last["paused"], last["finished"]) == (4, False, True)
    assert Path(result[CHECKPOINT]).exists(), "heirs may begin where a stretch does"


def test_a_member_that_begins_anew_leaves_what_heirs_may_begin_with(tmp_path: Path) -> None:
    member = order(tmp_path, 1, training={"epochs": 6})
    actor = TrialActor(member | {UNTIL: 3, BEQUEATHS: True})
    kept = [Path(actor.train()[CHECKPOINT]) for _ in range(3)]
    before = {path.name for path in kept[-1].parent.iterdir()}
    assert kept[-1].name in before
    for path in kept[-1].iterdir():
        path.write_bytes(b"cut off")
    again = TrialActor(member | {RESUME: str(kept[-1]), UNTIL: 6, BEQUEATHS: True})
    results = [again.train() for _ in range(6)]
    assert [result["epoch"] for result in results] == [1, 2, 3, 4, 5, 6]
    there = {path.name for path in kept[-1].parent.iterdir()}
    last = {Path(result[CHECKPOINT]).name for result in results[-2:]}
    assert there == before | last, "the milestone, and what the ledger may know last"


def stale(*arguments: object, **more: object) -> None:
    raise OSError(errno.ESTALE, "Stale file handle")


def test_what_cannot_be_brought_here_is_said_by_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.checkpoints.PATIENCE", 0.0)
    actor = TrialActor(order(tmp_path, 1))
    assert actor.reset(order(tmp_path, 2) | {RESUME: "gopher://there/checkpoint"})
    with pytest.raises(StorageOut, match="gopher"):
        actor.step()
    assert actor.reset(order(tmp_path, 3) | {HOME: str(tmp_path / "unmounted" / "0003")})
    with pytest.raises(StorageOut, match="unmounted is not here"):
        actor.step()
    no_data = order(tmp_path, 4)
    no_data[CONFIG]["data"]["shards"] = str(tmp_path / "nowhere")
    assert actor.reset(no_data)
    with pytest.raises(StorageOut, match=rf"nowhere: no such data folder on {platform.node()}"):
        actor.step()
    # An empty place of a mount that is missing is none either, and one that cannot be asked.
    (tmp_path / "nowhere").mkdir()
    assert actor.reset(no_data)
    with pytest.raises(StorageOut, match="no such data folder"):
        actor.step()
    (tmp_path / "nowhere" / "train").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.os, "stat", stale)
        with pytest.raises(StorageOut, match="no such data folder"):
            checkpoints.see_data(tmp_path / "nowhere")
    checkpoints.see_data(tmp_path / "nowhere")
    assert actor.reset(order(tmp_path, 5))
    assert actor.train()["epoch"] == 1


def test_memory_that_is_short_for_a_moment_costs_no_epochs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = order(tmp_path, 1, training={"epochs": 3})
    kept = TrialActor(long).train()[CHECKPOINT]
    own, _ = FileSystem.from_uri("/")
    store = SimpleNamespace(type_name="store", get_file_info=own.get_file_info)
    # What is read lies elsewhere; what is written does not.
    opened = {f"{kept}?": (store, kept)}
    real = checkpoints.open_location
    monkeypatch.setattr(checkpoints, "open_location", lambda at: opened.get(at) or real(at))
    monkeypatch.setattr(checkpoints, "copy_files", lambda at, to, **_: copytree(
        at, to, dirs_exist_ok=True))  # fmt: skip
    failures = [torch.OutOfMemoryError("a process that dies still holds it")]
    load = Trainer.load

    def short(self: Trainer, folder: Path) -> None:
        if failures:
            raise failures.pop()
        load(self, folder)

    monkeypatch.setattr(Trainer, "load", short)
    actor = TrialActor(long | {RESUME: f"{kept}?"})
    assert not failures
    assert actor.train()["epoch"] == 2


def test_without_ray_no_gpu_is_known(tmp_path: Path) -> None:
    assert allocated_gpus() == ""
    assert "gpu" not in TrialActor(order(tmp_path, 1)).train()


@pytest.mark.slow
def test_an_actor_knows_which_gpus_ray_gave_it(tmp_path: Path) -> None:
    program = (
        "import ray, sys\n"
        "from tuner.trainable import allocated_gpus\n"
        "ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, _temp_dir=sys.argv[1])\n"
        "@ray.remote(num_cpus=0)\n"
        "class Holder:\n"
        "    def gpus(self): return allocated_gpus()\n"
        "held = [Holder.options(num_gpus=n).remote() for n in (1, 0.5, 0.5, 0)]\n"
        "print(ray.get([one.gpus.remote() for one in held]))\n"
    )
    # A path of its own: sockets' names may not be long.
    with tempfile.TemporaryDirectory(prefix="ray-") as home:
        finished = subprocess.run(
            [sys.executable, "-c", program, home], cwd=ROOT, env=environment(),
            capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    found = ast.literal_eval(finished.stdout.splitlines()[-1])
    assert sorted(found) == ["", "0", "1", "1"]
