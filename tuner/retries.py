"""What the ledger keeps of a trial's second chances: lost machines, and memory that was not enough.

Both lie in attributes of the Optuna trial, so that they outlive the driver: half the batch is
tried once in all sessions together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LOST, _OUT_OF_MEMORY = "lost", "out_of_memory"
MEMORY_ADVICE = (
    "lower training.batch_size or raise training.accumulation, or give the trial more memory "
    "(fewer trials side by side, a larger GPU)"
)

Record = tuple[str, dict[str, Any]]  # name and value of an attribute


def one_more_loss(attrs: Mapping[str, Any], reason: str) -> Record:
    """The record of lost machines with one more."""
    times = attrs.get(_LOST, {}).get("times", 0) + 1
    return _LOST, {"times": times, "last": reason}


def halved(epoch: int, parts: int, message: str) -> Record:
    """The record that memory was not enough in an epoch, and of what is tried then."""
    return _OUT_OF_MEMORY, {"epoch": epoch, "accumulation": parts, "message": message}


def accumulation(attrs: Mapping[str, Any]) -> int | None:
    """Parts of the trial's batches, if it once ran out of memory."""
    found = attrs.get(_OUT_OF_MEMORY)
    return int(found["accumulation"]) if found else None


def note(attrs: Mapping[str, Any]) -> str:
    """What the trial survived, in a line; empty where nothing happened."""
    said = []
    if (memory := attrs.get(_OUT_OF_MEMORY)) is not None:
        said.append(halved_note(memory["epoch"], memory["accumulation"]))
    if (lost := attrs.get(_LOST)) is not None:
        times = "once" if lost["times"] == 1 else f"{lost['times']} times"
        said.append(f"machine lost {times} (last: {lost['last']})")
    return "; ".join(said)


def halved_note(epoch: int, parts: int) -> str:
    """That a trial goes on with less memory, in words."""
    return f"out of memory in epoch {epoch}, goes on with its batches in {parts} parts"


def exhausted_reason(message: str) -> str:
    """Why a trial failed that ran out of memory and has had its second chance."""
    return f"out of memory with half the batch too ({message}); {MEMORY_ADVICE}"
