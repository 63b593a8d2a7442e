"""Searches whose Ray head dies, beside them or with them."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from tests.tuner.clusters import Head, kill_all, started_head
from tests.tuner.support import (
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
def test_a_signal_to_all_processes_at_once_ends_the_search_with_the_way_to_go_on(
    tmp_path: Path,
) -> None:
    """As GNU timeout, Slurm and systemd send it: Ray's own processes end by it."""
    mark, out = f"ristune-test-{uuid.uuid4().hex}", tmp_path / "run"
    arguments = ("--config", study_in(tmp_path), "--address", "local", "--out", out)
    process = start(*arguments, RISTUNE_MARK=mark)
    try:
        read_until(process, "epoch 2/")
        for pid in processes_with(mark, ""):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        began = time.monotonic()
        said, _ = process.communicate(timeout=50)
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
        assert re.search(rf"Ray's head at \S+:{head.address[-5:]} has not answered for 1\d s", said)
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


def listening(port: int = 0) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(("wished", "least", "most"), [(True, 0.4, 1.4), (False, 1.5, 5.0)])
def test_a_head_that_is_gone_is_told_once_and_sooner_where_the_search_is_to_end(
    wished: bool, least: float, most: float
) -> None:
    server, told = listening(), list[str]()
    address = f"127.0.0.1:{server.getsockname()[1]}"
    with watched_head(address, lambda: wished, told.append):
        time.sleep(0.5)
        assert not told, "it answers"
        server.close()
        gone = time.monotonic()
        wait_for(lambda: bool(told), timeout=10)
        assert least - 0.1 <= time.monotonic() - gone <= most
        time.sleep(0.3)
    assert len(told) == 1
    assert told[0].startswith(f"Ray's head at {address} has not answered for ")


@pytest.mark.usefixtures("hasty")
def test_a_head_that_comes_back_was_never_gone() -> None:
    server, told = listening(), list[str]()
    port = server.getsockname()[1]
    with watched_head(f"127.0.0.1:{port}", lambda: False, told.append):
        for _ in range(4):
            server.close()
            time.sleep(0.6)
            server = listening(port)
            time.sleep(0.3)
    server.close()
    assert not told


def test_a_watch_that_is_over_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "_BETWEEN", 0.05)
    monkeypatch.setattr(head_module, "_LEAVING", 0.2)
    told: list[str] = []
    with listening() as server:
        port = server.getsockname()[1]
    with watched_head(f"127.0.0.1:{port}", lambda: True, told.append):
        pass
    time.sleep(0.6)
    assert not told


def test_rays_own_patience_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_gcs_rpc_server_reconnect_timeout_s", raising=False)
    assert patience() == 50.0
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "600")
    assert patience() == 590.0
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "6")
    assert patience() == 5.0
