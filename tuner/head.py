"""Whether Ray's head still answers, asked beside the search.

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

_RAYS = "RAY_gcs_rpc_server_reconnect_timeout_s"  # Ray's setting
_BETWEEN = 1.0  # seconds from one question to the next
_ANSWER_TIMEOUT = 3.0  # seconds
_BEFORE_RAY = 10.0  # seconds before Ray ends the process
_LEAVING = 5.0  # seconds that are enough where the search is to end anyway


def patience() -> float:
    """Seconds for which a head that is away may come back: as long as Ray waits, nearly."""
    return max(_LEAVING, float(os.environ.get(_RAYS, "60")) - _BEFORE_RAY)


@contextmanager
def watched_head(
    address: str, wished: Callable[[], bool], gone: Callable[[str], object]
) -> Iterator[None]:
    """Have another thread ask the head, and be told when it is gone for good.

    Args:
        address: of the head, ``host:port``.
        wished: whether the search is to end, for which nobody waits for a head.
        gone: called once, in that thread, with one line on what happened.
    """
    over = threading.Event()

    def watch() -> None:
        answered = time.monotonic()
        while not over.wait(_BETWEEN):
            if _answers(address):
                answered = time.monotonic()
            silent = time.monotonic() - answered
            if silent >= (_LEAVING if wished() else patience()) and not over.is_set():
                gone(f"Ray's head at {address} has not answered for {silent:.0f} s")
                return

    thread = threading.Thread(target=watch, name="head", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_TIMEOUT):
            return True
    except OSError:
        return False
