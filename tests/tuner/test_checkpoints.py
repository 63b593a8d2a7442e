"""Checkpoints on paths, URIs and an S3 store: found again from anywhere, dropped when lost."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from pyarrow.fs import FileInfo, FileSelector, FileSystem

from tests.tuner.clusters import ray_head
from tests.tuner.support import kill, read_until, run, run_here, start, write_study
from tuner.checkpoints import (
    Storage,
    StorageOut,
    TrialCheckpoints,
    drop,
    fetched,
    open_location,
    reachable,
    starting_points,
)
from tuner.config import ResourcesConfig, load_study
from tuner.folder import RunFolder
from tuner.records import TrialRecord
from tuner.study import Ledger


@dataclass(frozen=True)
class Store:
    """An S3 store on loopback, and the environment in which its bucket can be opened."""

    uri: str
    keys: dict[str, str]

    def listed(self) -> list[str]:
        filesystem, path = FileSystem.from_uri(self.uri)
        return [info.path for info in filesystem.get_file_info(FileSelector(path, recursive=True))]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    keys = {"AWS_ACCESS_KEY_ID": "anyone", "AWS_SECRET_ACCESS_KEY": "anything"}
    for key, value in keys.items():
        monkeypatch.setenv(key, value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = f"endpoint_override=http://{host}:{port}&region=us-east-1"
        made, _ = FileSystem.from_uri(f"s3://bucket/?{options}&allow_bucket_creation=true")
        made.create_dir("bucket")
        yield Store(f"s3://bucket/runs?{options}", keys)
    finally:
        server.stop()


def trials_of(folder: Path) -> list[TrialRecord]:
    ledger = Ledger(folder / "study.db", load_study(folder / "config.yaml"))
    try:
        return ledger.trials()
    finally:
        ledger.close()


def checkpoint_at(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "checkpoint.safetensors").write_bytes(b"weights")
    return folder


def test_a_path_and_its_uri_are_the_same_checkpoint(tmp_path: Path) -> None:
    made = checkpoint_at(tmp_path / "a b" / "0003" / "checkpoint_000001")
    for location in (str(made), f"file://{tmp_path}/a%20b/0003/checkpoint_000001"):
        with fetched(location) as folder:
            assert folder == made
    assert made.exists(), "what lies here is not copied and not deleted"


def test_a_checkpoint_that_is_no_more_means_a_start_from_the_beginning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with reachable("/nowhere/checkpoint") as folder:
        assert folder is None
    assert "starting from the beginning" in caplog.text
    assert "no such checkpoint" in caplog.text
    with reachable(None) as folder:
        assert folder is None
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("gopher://there/checkpoint", "Unrecognized filesystem type"),
        ("checkpoint", "URI has empty scheme"),
        ("s3://bucket/checkpoint?endpoint_override=http://127.0.0.1:9&region=a", "cannot be used"),
    ],
)
def test_epochs_are_not_given_up_because_a_storage_cannot_be_asked(
    monkeypatch: pytest.MonkeyPatch, location: str, why: str
) -> None:
    monkeypatch.setattr("tuner.checkpoints.PATIENCE", 0.0)
    with pytest.raises(StorageOut, match=why), reachable(location):
        pass
    with pytest.raises(StorageOut, match=why), starting_points(None, location):
        pass


class Slow:
    """A storage on this machine that fails the first few times."""

    type_name = "store"

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.own, _ = FileSystem.from_uri("/")

    def get_file_info(self, path: str) -> FileInfo:
        self.failures -= 1
        if self.failures >= 0:
            raise OSError("When reading information: AWS Error NETWORK_CONNECTION")
        return self.own.get_file_info(path)


def test_a_storage_that_fails_for_a_while_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = checkpoint_at(tmp_path / "made")
    slow = Slow(3)
    monkeypatch.setattr("tuner.checkpoints.open_location", lambda location: (slow, location))
    monkeypatch.setattr("tuner.checkpoints.copy_files", lambda source, to, **_: copytree(
        source, to, dirs_exist_ok=True))  # fmt: skip
    pauses: list[float] = []
    monkeypatch.setattr("tuner.checkpoints.time.sleep", pauses.append)
    with starting_points(None, str(made)) as (_, donor):
        assert donor is not None
        assert (donor / "checkpoint.safetensors").read_bytes() == b"weights"
    assert pauses == [1.0, 2.0, 4.0]
    assert "NETWORK_CONNECTION" in caplog.text


def with_a_trial_out_of_reach(folder: Path, **changes: Any) -> Path:
    """A run folder of three ended trials and a fourth whose checkpoint lies nobody knows where."""
    config, out = write_study(folder, **changes), folder / "run"
    assert run_here("--config", config, "--local", "--out", out) == 0
    study = load_study(out / "config.yaml")
    ledger = Ledger(out / "study.db", study.replaced({"search.trials": 4}))
    cut = ledger.ask()
    assert cut is not None
    ledger.report(cut.number, {"epoch": 1, "objective": 1.0}, "gopher://there/checkpoint")
    ledger.close()
    return out


def test_locally_a_storage_that_stays_silent_ends_the_run_which_can_be_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = with_a_trial_out_of_reach(tmp_path)
    assert run_here("--resume", out, "--local", "--trials", 4) == 2
    said = capsys.readouterr().err
    assert "gopher://there/checkpoint: Unrecognized filesystem type" in said
    assert f"--resume {out}" in said
    assert trials_of(out)[3].state == "running"


def test_an_error_of_the_trial_itself_is_not_taken_for_one_of_reach(tmp_path: Path) -> None:
    made = checkpoint_at(tmp_path / "checkpoint")
    with pytest.raises(OSError, match="disk is full"), reachable(str(made)):
        raise OSError("disk is full")


def test_two_runs_of_one_name_keep_apart_in_one_storage(tmp_path: Path) -> None:
    resources = ResourcesConfig(storage=f"file://{tmp_path}/shared")
    folders = [RunFolder.fresh(tmp_path / place / "run") for place in "ab"]
    first, second = (Storage.of(folder, resources) for folder in folders)
    assert first.name != second.name
    assert Storage.of(RunFolder(tmp_path / "a" / "run"), resources) == first
    mine = checkpoint_at(tmp_path / "shared" / first.name / "0003" / "checkpoint_000001")
    again = checkpoint_at(tmp_path / "shared" / first.name / "12345-after-epoch-2" / "checkpoint_0")
    checkpoint_at(tmp_path / "shared" / second.name / "0003" / "checkpoint_000001")
    assert sorted(first.checkpoints()) == [(3, str(mine)), (12345, str(again))]
    drop(str(mine))
    assert [number for number, _ in first.checkpoints()] == [12345]
    assert [number for number, _ in second.checkpoints()] == [3]
    drop(str(mine))  # gone already: a line in the log
    for folder in folders:
        folder.release()


def saving(text: str) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoint.safetensors").write_text(text)

    return save


@pytest.fixture(params=["path?with#marks", "store"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a trial's checkpoints go."""
    if request.param == "store":  # whose content outlives a test: in a place of its own
        root = request.getfixturevalue("store").uri.replace("/runs?", "/alone?")
    else:
        root = str(tmp_path / request.param)
    storage = Storage(root, "trials")
    storage.make()
    return storage.trial(7)


@pytest.mark.slow
def test_a_checkpoint_stays_until_the_next_is_known(home: str) -> None:
    kept = TrialCheckpoints(home)
    first = kept.write(1, saving("one"))
    kept.forget()
    second = kept.write(2, saving("two"))
    for location, wanted in ((first, "one"), (second, "two")):
        with fetched(location) as folder:
            assert (folder / "checkpoint.safetensors").read_text() == wanted
    kept.forget()
    with pytest.raises(FileNotFoundError), fetched(first):
        pass
    again = TrialCheckpoints(home)
    again.follow(second)  # another process goes on from there
    third = again.write(3, saving("three"))
    again.forget()
    with pytest.raises(FileNotFoundError), fetched(second):
        pass
    with fetched(again.write(3, saving("once more"))) as folder:
        assert (folder / "checkpoint.safetensors").read_text() == "once more"
    again.forget()
    with fetched(third):
        pass
    member = TrialCheckpoints(home)
    member.spare()
    written = [member.write(epoch, saving("anew")) for epoch in (2, 3, 4, 5)]
    member.forget()
    for location in (third, written[-1]):
        with fetched(location):
            pass
    for location in (written[0], written[2]):
        with pytest.raises(FileNotFoundError), fetched(location):
            pass


def test_a_folder_that_cannot_be_written_for_a_while_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("tuner.checkpoints.time.sleep", pauses.append)
    errors = [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error")]

    def failing(folder: Path) -> None:
        if errors:
            raise errors.pop()
        saving("whole")(folder)

    kept = TrialCheckpoints(str(tmp_path / "0007"))
    with fetched(kept.write(1, failing)) as folder:
        assert (folder / "checkpoint.safetensors").read_text() == "whole"
    assert pauses == [1.0, 2.0]
    for error, wanted in (
        (OSError(errno.ENOSPC, "No space left on device"), OSError),
        (PermissionError(errno.EACCES, "Permission denied"), StorageOut),
    ):
        errors.append(error)
        with pytest.raises(wanted, match=str(error.strerror)):
            kept.write(2, failing)
    assert pauses == [1.0, 2.0], "nobody waits for these"


def test_a_machine_that_does_not_see_the_storage_writes_nothing_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.checkpoints.PATIENCE", 0.0)
    storage = Storage(str(tmp_path / "mount" / "run"), "trials")
    blind = TrialCheckpoints(storage.trial(7))
    with pytest.raises(StorageOut, match="trials is not here"):
        blind.reach()
    with pytest.raises(StorageOut, match="trials is not here"):
        blind.write(1, saving("lost"))
    assert list(tmp_path.iterdir()) == []
    storage.make()
    blind.reach()
    assert Path(blind.write(1, saving("kept"))).is_dir()


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(folder: Path) -> None:
        saving("half")(folder)
        raise OSError("disk is broken")

    monkeypatch.setattr("tuner.checkpoints.PATIENCE", 0.0)
    kept = TrialCheckpoints(str(tmp_path / "0007"))
    first = kept.write(1, saving("one"))
    with pytest.raises(StorageOut, match="disk is broken"):
        kept.write(2, torn)
    kept.forget()
    with fetched(first) as folder:
        assert (folder / "checkpoint.safetensors").read_text() == "one"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_on_ray_a_storage_that_cannot_be_used_ends_the_run_which_can_be_gone_on_with(
    tmp_path: Path,
) -> None:
    out = with_a_trial_out_of_reach(tmp_path, resources={"max_failures": 1})
    with ray_head("--num-cpus=1") as head:
        ended = run("--resume", out, "--trials", 4, "--address", head.address, timeout=200)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "gopher://there/checkpoint: Unrecognized filesystem type" in ended.stderr
    assert f"--resume {out}" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert trials_of(out)[3].state == "running"


@pytest.mark.slow
def test_a_location_in_a_store_keeps_what_opens_it(store: Store) -> None:
    storage = Storage(store.uri, "run-12345678")
    filesystem, root = open_location(store.uri)
    path = f"{root}/run-12345678/0007/checkpoint_000002"
    filesystem.create_dir(path, recursive=True)
    with filesystem.open_output_stream(f"{path}/checkpoint.safetensors") as stream:
        stream.write(b"weights")
    ((number, location),) = storage.checkpoints()
    assert number == 7
    assert location == store.uri.replace("?", "/run-12345678/0007/checkpoint_000002?")
    with fetched(location) as folder:
        assert (folder / "checkpoint.safetensors").read_bytes() == b"weights"
    assert not folder.exists(), "a copy goes when it was used"
    drop(location)
    assert list(storage.checkpoints()) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_study_keeps_its_checkpoints_in_an_s3_store(tmp_path: Path, store: Store) -> None:
    config = write_study(
        tmp_path,
        training={"epochs": 24},  # many: what is read here may have happened long ago
        data={"train_scenes": 128},
        search={"trials": 3, "scheduler": "none", "sampler": "random"},
        resources={"storage": store.uri},
    )
    out = tmp_path / "run"
    with ray_head("--num-cpus=2", **store.keys) as head:
        # One trial at a time: of two, either may have ended before the other has begun.
        asked = ("--address", head.address, "--concurrent", 1)
        process = start("--config", config, *asked, "--out", out, **store.keys)
        read_until(process, "trial 0000 epoch 3/", timeout=300)
        kill(process)
        (before,) = trials_of(out)
        options = store.uri.partition("?")[2]
        assert str(before.checkpoint).startswith("s3://bucket/runs/run-")
        assert str(before.checkpoint).endswith(options)
        # One epoch on Ray, where an actor fetches the checkpoint; the rest in a plain process.
        process = start("--resume", out, *asked, **store.keys)
        said = read_until(process, "trial 0000 epoch", timeout=300)
        kill(process)
    assert any("trial 0000 goes on after epoch" in line for line in said)
    resumed = run("--resume", out, "--local", timeout=300, **store.keys)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "from the beginning" not in (out / "tuner.log").read_text()
    assert "trial 0000 goes on after epoch" in resumed.stdout
    assert (out / "best" / "model.safetensors").exists()
    trials = trials_of(out)
    assert [(trial.number, trial.state, trial.epoch) for trial in trials] == [
        (number, "done", 24) for number in range(3)
    ]
    best = min(trials, key=lambda trial: trial.objective or 1e9)
    kept = [path for path in store.listed() if "checkpoint" in Path(path).name]
    log = (out / "tuner.log").read_text()
    assert all(f"/{best.number:04d}" in path for path in kept), f"losers' stay: {kept}\n{log}"
    calm = run("--config", config, "--local", "--out", tmp_path / "calm", timeout=300, **store.keys)
    assert calm.returncode == 0, calm.stderr
    wanted = [(t.params, t.curve) for t in trials_of(tmp_path / "calm")]
    assert [(t.params, t.curve) for t in trials] == wanted, "not bit for bit"


def test_a_donors_checkpoint_is_brought_only_to_whoever_has_none(tmp_path: Path) -> None:
    own, donor = tmp_path / "own", tmp_path / "donor"
    for folder in (own, donor):
        folder.mkdir()
    with starting_points(None, str(donor)) as points:
        assert points == (None, donor)
    with starting_points(None, donor.as_uri()) as points:
        assert points == (None, donor)
    with starting_points(str(own), str(donor)) as points:
        assert points == (own, donor)
    with starting_points(None, None) as points:
        assert points == (None, None)
    donor.rmdir()
    with starting_points(None, str(donor)) as (checkpoint, begun):
        assert checkpoint is None
        assert begun is not None, "it would begin with new weights"
        assert not begun.exists()
