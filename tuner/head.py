"""Asks Ray's head beside the search whether it is still there.

A driver whose head is gone cannot end in good order. Its calls to Ray wait in Ray's own code, which
no signal interrupts, and after a minute Ray ends the process, without a word on how to go on.
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

_PATIENCE = "RAY_gcs_rpc_server_reconnect_timeout_s"  # Ray's own setting
_RAYS = 60.0  # seconds: its default
_BETWEEN = 1.0  # seconds from one question to the next
_ANSWER_TIMEOUT = 3.0  # seconds
_BEFORE_RAY = 10.0  # seconds before Ray ends the process
_LEAVING = 5.0  # seconds that are enough where the search is to end anyway
_FEWEST = 3  # questions without an answer: a process that stood still has asked none


def patience() -> float:
    """Seconds for which a head that is away may come back: as long as Ray waits, nearly."""
    try:
        wanted = float(os.environ.get(_PATIENCE, _RAYS))
    except ValueError:
        wanted = _RAYS
    return max(_LEAVING, wanted - _BEFORE_RAY)


@contextmanager
def watched_head(
    answers: Callable[[], bool], wished: Callable[[], bool], gone: Callable[[str], object]
) -> Iterator[None]:
    """Ask from another thread whether the head is there, and say so when it is gone for good.

    Args:
        answers: asks once, in bounded time.
        wished: whether the search is to end, for which a head is not waited for.
        gone: called once, in that thread, with one line on what happened.
    """
    over, longest = threading.Event(), patience()

    def watch() -> None:
        since, count = 0.0, 0  # of the questions without an answer
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
        thread.join(3 * _ANSWER_TIMEOUT)  # it may be asking


class Head:
    """The head of the cluster that this process is connected to."""

    def __init__(self) -> None:
        context = ray.get_runtime_context()
        host, _, port = context.gcs_address.rpartition(":")
        self._address = host.strip("[]"), int(port)
        self._client = context.worker.gcs_client

    def answers(self) -> bool:
        """Whether it takes a new connection, or answers on the one that there is.

        Either may fail where nothing is wrong: new ones for want of a name server or of file
        handles, the old one while the head is too busy to answer.
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
