"""Searches whose Ray head dies, beside them or with them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.tuner.clusters import Head, free_port, kill_all, ray_head, started_head
from tests.tuner.support import (
    ROOT,
    environment,
    processes_with,
    read_until,
    run_here,
    start,
    trials_of,
    wait_for,
    write_study,
)
from tuner import head as head_module
from tuner.head import patience, watched_head

LONG = {"epochs": 30}


def study_in(folder: Path) -> Path:
    return write_study(
        folder,
        training=LONG,
        search={"trials": 1, "scheduler": "none"},
        data={"train_scenes": 64},
    )


def goes_on(out: Path, said: str, process_code: int | None) -> None:
    assert process_code == 130, said
    assert f"; go on with: python -m tuner.run --resume {out}" in said
    assert "Traceback" not in said
    assert [trial.state for trial in trials_of(out)] == ["running"]
    assert run_here("--resume", out, "--local") == 0
    assert [(t.state, [e for e, _ in t.curve]) for t in trials_of(out)] == [
        ("done", list(range(1, LONG["epochs"] + 1)))
    ]


@pytest.fixture
def unscored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.conclusion._score_winner", lambda folder, study, progress: None)


@pytest.mark.slow
@pytest.mark.usefixtures("unscored")
@pytest.mark.parametrize("is_read", [True, False])
def test_a_signal_to_all_processes_at_once_ends_the_search_with_the_way_to_go_on(
    tmp_path: Path, is_read: bool
) -> None:
    """As GNU timeout, Slurm and systemd send it: Ray's own processes end by it."""
    mark, out = f"ristune-test-{uuid.uuid4().hex}", tmp_path / "run"
    arguments = ("--config", study_in(tmp_path), "--address", "local", "--out", out)
    process = start(*arguments, RISTUNE_MARK=mark)
    try:
        read_until(process, "epoch 2/")
        if not is_read:  # as in a pipeline whose other commands get the signal too
            assert process.stdout is not None
            process.stdout.close()
        for pid in processes_with(mark, ""):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        began = time.monotonic()
        process.wait(timeout=50)
        said = (out / "tuner.log").read_text()
        if is_read:
            assert process.stdout is not None
            assert process.stdout.read().strip().endswith(said.splitlines()[-1].split(": ", 1)[1])
        assert time.monotonic() - began < 40.0, "Ray's own minute"
        wait_for(lambda: not processes_with(mark, ""))
    finally:
        kill_all(mark)
    goes_on(out, said, process.returncode)


@pytest.mark.slow
@pytest.mark.usefixtures("unscored")
def test_a_head_that_is_killed_ends_the_search_with_the_way_to_go_on(tmp_path: Path) -> None:
    seconds = {"RAY_gcs_rpc_server_reconnect_timeout_s": "20"}
    with started_head(**seconds) as head:
        out = tmp_path / "run"
        arguments = ("--config", study_in(tmp_path), "--address", head.address, "--out", out)
        process = start(*arguments, **seconds)
        read_until(process, "epoch 2/")
        kill_gcs(head)
        said, _ = process.communicate(timeout=60)
        assert re.search(r"Ray's head has not answered for 1\d s; go on with: ", said)
    goes_on(out, said, process.returncode)


@pytest.mark.slow
@pytest.mark.usefixtures("unscored")
def test_a_head_that_comes_back_without_its_state_ends_the_search(tmp_path: Path) -> None:
    port, out = free_port(), tmp_path / "run"
    with ray_head("--num-cpus=1", port=port) as head:
        arguments = ("--config", study_in(tmp_path), "--address", head.address, "--out", out)
        process = start(*arguments)
        read_until(process, "epoch 2/")
        kill_gcs(head)
        with ray_head("--num-cpus=1", port=port):
            said, _ = process.communicate(timeout=100)
    assert "error: Ray's head has restarted and no longer knows this run" in said
    goes_on(out, said, process.returncode)


def kill_gcs(head: Head) -> None:
    (gcs,) = processes_with(head.mark, "gcs_server")
    os.kill(gcs, signal.SIGKILL)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "_BETWEEN", 0.05)
    monkeypatch.setattr(head_module, "_LEAVING", 0.4)
    monkeypatch.setattr(head_module, "_BEFORE_RAY", 0.0)
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "1.5")


def accepts(port: int) -> Callable[[], bool]:
    """A question to a server of ours."""

    def asked() -> bool:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1.0):
                return True
        except OSError:
            return False

    return asked


def listening(port: int = 0) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(("wished", "least"), [(True, 0.4), (False, 1.5)])
def test_a_head_that_is_gone_is_told_once_and_sooner_where_the_search_is_to_end(
    wished: bool, least: float
) -> None:
    server, told = listening(), list[str]()
    with watched_head(accepts(server.getsockname()[1]), lambda: wished, told.append):
        time.sleep(0.5)
        assert not told, "it answers"
        server.close()
        gone = time.monotonic()
        wait_for(lambda: bool(told), timeout=30)
        assert time.monotonic() - gone >= least - 0.1
        time.sleep(0.3)
    assert len(told) == 1
    assert told[0].startswith("Ray's head has not answered for ")


@pytest.mark.usefixtures("hasty")
def test_a_head_that_comes_back_was_never_gone() -> None:
    server, told = listening(), list[str]()
    port = server.getsockname()[1]
    with watched_head(accepts(port), lambda: False, told.append):
        for _ in range(4):
            server.close()
            time.sleep(0.6)
            server = listening(port)
            time.sleep(0.3)
    server.close()
    assert not told


@pytest.mark.usefixtures("hasty")
def test_a_process_that_stood_still_asks_again_before_it_gives_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after Ctrl-Z and fg: between two questions minutes go by, and the second one fails."""
    told: list[str] = []
    asked = iter([True, False, False, True, False, False, *[True] * 1000])
    clock = iter(range(0, 10**6, 600))
    monkeypatch.setattr("tuner.head.time.monotonic", lambda: float(next(clock)))
    with watched_head(lambda: next(asked), lambda: True, told.append):
        time.sleep(1.0)
    assert next(clock) > 600 * 6
    assert not told


def test_a_watch_that_is_over_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "_BETWEEN", 0.02)
    monkeypatch.setattr(head_module, "_LEAVING", 0.0)
    told: list[str] = []
    over = threading.Event()

    def asked() -> bool:
        over.wait()  # the last of its questions is answered when it is over
        return False

    monkeypatch.setattr(head_module, "_FEWEST", 1)
    with watched_head(asked, lambda: True, told.append):
        time.sleep(0.2)
        threading.Timer(0.5, over.set).start()
    assert not told


def test_rays_own_patience_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_gcs_rpc_server_reconnect_timeout_s", raising=False)
    assert patience() == 50.0
    for wanted, found in (("600", 590.0), ("6", 5.0), ("", 50.0), ("a minute", 50.0)):
        monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", wanted)
        assert patience() == found


@pytest.mark.slow
def test_a_head_is_gone_when_neither_way_leads_to_it_and_not_before() -> None:
    code = """
import os, signal, socket, sys
import ray
from tests.tuner.support import processes_with
from tuner.head import Head
ray.init(address="local", include_dashboard=False, log_to_driver=False)
head = Head()
print(head.answers())
new, socket.create_connection = socket.create_connection, None
def refused(*arguments, **options):
    raise OSError("no file handles, no name server")
socket.create_connection = refused
print(head.answers(), "on the old connection")
socket.create_connection = new
found = processes_with(os.environ["RISTUNE_MARK"], "gcs_server")
(gcs,) = set(found) - {os.getpid()}  # whose own command line holds this
os.kill(gcs, signal.SIGSTOP)
print(head.answers(), "by a new one, as it stands still")
os.kill(gcs, signal.SIGKILL)
os.waitpid(gcs, 0)
print(head.answers())
os._exit(0)
"""
    mark = f"ristune-test-{uuid.uuid4().hex}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment(RISTUNE_MARK=mark),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    finally:
        kill_all(mark)
    said = [line for line in done.stdout.splitlines() if line.startswith(("True", "False"))]
    assert said == [
        "True",
        "True on the old connection",
        "True by a new one, as it stands still",
        "False",
    ], done.stdout + done.stderr
