"""Monitors in a separate thread whether Ray's head still answers.

A driver whose head is gone cannot shut down in an orderly way. Its calls to Ray block in Ray's
native code, which no signal interrupts, and after a minute Ray ends the process without a message
on how to resume.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayError

_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"  # Ray's setting
_RAYS = 60.0  # seconds: its default
_BETWEEN = 1.0  # seconds between two checks
_ANSWER_TIMEOUT = 3.0  # seconds
_BEFORE_RAY = 10.0  # seconds before Ray ends the process
_LEAVING = 5.0  # seconds to wait if the search is to end anyway
_FEWEST = 3  # failed checks in a row: a process that was suspended has made none meanwhile


def patience() -> float:
    """Return the seconds to wait for a lost head, slightly less than Ray itself waits."""
    try:
        wanted = float(os.environ.get(_PATIENCE, _RAYS))
    except ValueError:
        wanted = _RAYS
    return max(_LEAVING, wanted - _BEFORE_RAY)


@contextmanager
def watched_head(
    answers: Callable[[], bool], wished: Callable[[], bool], gone: Callable[[str], object]
) -> Iterator[None]:
    """Check the head from another thread while the block runs, and report when it is lost.

    Args:
        answers: checks once, in bounded time.
        wished: returns whether the search is to end, in which case the wait is short.
        gone: called once from that thread with one line on what happened.
    """
    over, longest = threading.Event(), patience()

    def watch() -> None:
        since, count = 0.0, 0  # of the failed checks in a row
        while not over.wait(_BETWEEN):
            asked = time.monotonic()
            if answers():
                count = 0
                continue
            since = since if count else asked
            count += 1
            silent = time.monotonic() - since
            enough = _LEAVING if wished() else longest
            if silent >= enough and count >= _FEWEST and not over.is_set():
                gone(f"Ray's head has not answered for {silent:.0f} s")
                return

    thread = threading.Thread(target=watch, name="head", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(3 * _ANSWER_TIMEOUT)  # it may be in a check


class Head:
    """The head of the cluster that this process is connected to."""

    def __init__(self) -> None:
        context = ray.get_runtime_context()
        host, _, port = context.gcs_address.rpartition(":")
        self._address = host.strip("[]"), int(port)
        self._client = context.worker.gcs_client

    def answers(self) -> bool:
        """Return whether it accepts a new connection or answers on the existing one.

        Either can fail although the head is alive: new connections without a free file descriptor
        or behind a proxy, the existing one while the head is too busy to answer.
        """
        try:
            with socket.create_connection(self._address, timeout=_ANSWER_TIMEOUT):
                return True
        except OSError:
            pass
        try:
            self._client.internal_kv_keys(b"ristune", None, timeout=_ANSWER_TIMEOUT)
        except RayError:
            return False
        return True
