"""Ray clusters of our own, on ports and folders of their own, ended by their own processes."""

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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tests.tuner.support import environment, processes_with, read_until

STORE = 80 * 2**20  # bytes for objects: Ray takes no less than 75 MiB


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


def ray_start(*arguments: str) -> list[str]:
    """The command line of a node that lasts as long as its process."""
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
        *("--node-ip-address=127.0.0.1", "--disable-usage-stats", *arguments),
    ]


@contextmanager
def started(command: list[str], wanted: str, **extra: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has said something, for as long as the block lasts."""
    process = subprocess.Popen(
        command,
        env=environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        read_until(process, wanted)
        yield process
    finally:
        process.terminate()
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


@contextmanager
def ray_head(*arguments: str, port: int | None = None, **extra: str) -> Iterator[Head]:
    """`ray start --head` with its own ports and folder.

    Ray gives up where a node does not come up within half a minute, as on a machine that is busy
    with something else; it is started once more then.

    Args:
        arguments: more of `ray start`.
        port: of the cluster, where it has to be known before.
        extra: environment variables.
    """
    with ExitStack() as stack:
        try:
            head = stack.enter_context(_started_head(arguments, port, extra))
        except AssertionError as error:
            if "timed out during startup" not in str(error):
                raise
            head = stack.enter_context(_started_head(arguments, port, extra))
        yield head


@contextmanager
def _started_head(
    arguments: tuple[str, ...], port: int | None, extra: dict[str, str]
) -> Iterator[Head]:
    mark = f"ristune-test-{uuid.uuid4().hex}"
    folder = tempfile.mkdtemp(prefix="rt", dir="/tmp")  # short: sockets lie in it
    port, metrics_port = port or free_port(), free_port()
    command = ray_start(
        *("--head", f"--port={port}", f"--temp-dir={folder}", "--num-gpus=0"),
        *(f"--ray-client-server-port={free_port()}", "--include-dashboard=false"),
        *(f"--object-store-memory={STORE}", f"--metrics-export-port={metrics_port}"),
        *arguments,
    )
    try:
        with started(command, "Ray runtime started", RISTUNE_MARK=mark, **extra):
            yield Head(f"127.0.0.1:{port}", mark, metrics_port)
    finally:
        kill_all(mark)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def started_head(**extra: str) -> Iterator[Head]:
    """A cluster of one node with two CPUs, which measures every second."""
    extra["RAY_metrics_report_interval_ms"] = "1000"
    with ray_head("--num-cpus=2", port=None, **extra) as head:
        yield head


def actors(head: Head) -> list[int]:
    """The processes of its trials."""
    # Idle, the process bears the actor's repr; at work, the class that Ray Tune wrapped it in.
    titles = ("ray::TrialActor", "ray::ResourceTrainable")
    return [pid for title in titles for pid in processes_with(head.mark, title)]


def kill_all(mark: str) -> None:
    """kill -9 to what a cluster left behind."""
    for left in processes_with(mark, ""):
        os.kill(left, signal.SIGKILL)
