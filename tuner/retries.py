"""Records of a trial's retries after lost machines and exhausted memory.

Both are stored in attributes of the Optuna trial, so that they outlive the driver: splitting the
batch is tried once over all sessions.
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
    """Return the record of lost machines, increased by one."""
    times = attrs.get(_LOST, {}).get("times", 0) + 1
    return _LOST, {"times": times, "last": reason}


def halved(epoch: int, parts: int, message: str) -> Record:
    """Return the record of exhausted memory in an epoch and of the number of parts tried next."""
    return _OUT_OF_MEMORY, {"epoch": epoch, "accumulation": parts, "message": message}


def accumulation(attrs: Mapping[str, Any]) -> int | None:
    """Return the parts of the trial's batches if it has run out of memory; else None."""
    found = attrs.get(_OUT_OF_MEMORY)
    return int(found["accumulation"]) if found else None


def note(attrs: Mapping[str, Any]) -> str:
    """Return one line on failures that the trial recovered from; empty if there were none."""
    said = []
    if (memory := attrs.get(_OUT_OF_MEMORY)) is not None:
        said.append(halved_note(memory["epoch"], memory["accumulation"]))
    if (lost := attrs.get(_LOST)) is not None:
        times = "once" if lost["times"] == 1 else f"{lost['times']} times"
        said.append(f"machine lost {times} (last: {lost['last']})")
    return "; ".join(said)


def halved_note(epoch: int, parts: int) -> str:
    """Return a note that a trial resumes with smaller batch parts."""
    return f"out of memory in epoch {epoch}, goes on with its batches in {parts} parts"


def exhausted_reason(message: str) -> str:
    """Return the failure reason of a trial that ran out of memory again after a retry."""
    return f"out of memory with half the batch too ({message}); {MEMORY_ADVICE}"
