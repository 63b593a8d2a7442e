"""A Ray head of a test's own, and the processes that belong to it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.tuner.support import environment, processes_with, read_until


@dataclass(frozen=True)
class Head:
    """A cluster of our own: its address, and the mark that all its processes carry."""

    address: str
    mark: str
    metrics_port: int


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started_head(**extra: str) -> Iterator[Head]:
    """`ray start --head` with its own ports and folder, ended by its own process.

    Args:
        **extra: of its environment.
    """
    mark = f"ristune-test-{uuid.uuid4().hex}"
    folder = tempfile.mkdtemp(prefix="rt", dir="/tmp")  # short: sockets lie in it
    port, metrics_port = free_port(), free_port()
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *(f"--port={port}", f"--temp-dir={folder}", "--num-cpus=2", "--num-gpus=0"),
        *(f"--ray-client-server-port={free_port()}", "--include-dashboard=false"),
        *("--node-ip-address=127.0.0.1", "--disable-usage-stats"),
        f"--object-store-memory={100 * 2**20}",
        f"--metrics-export-port={metrics_port}",
    ]
    process = subprocess.Popen(
        command,
        env=environment(RISTUNE_MARK=mark, RAY_metrics_report_interval_ms="1000", **extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        read_until(process, "Ray runtime started")
        yield Head(f"127.0.0.1:{port}", mark, metrics_port)
    finally:
        process.terminate()
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        for left in processes_with(mark, ""):
            os.kill(left, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def actors(head: Head) -> list[int]:
    # Idle, the process bears the actor's repr; at work, the class that Ray Tune wrapped it in.
    titles = ("ray::TrialActor", "ray::ResourceTrainable")
    return [pid for title in titles for pid in processes_with(head.mark, title)]
