"""The ledger of trials that run in turns: assigned up to an epoch and returned there."""

from __future__ import annotations

from typing import Any

from tuner.records import Assignment, End
from tuner.study import Ledger


class TurnsLedger(Ledger):
    """A ledger that tracks which trials are running and decides which one is next.

    The code that runs trials treats a returned trial like an interrupted one that resumes from its
    checkpoint, as it does a trial whose driver died.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._handed_out: set[int] = set()
        self._exhausted = False  # the space has no untried points left
        super().__init__(*args, **kwargs)

    def hand_back(self, number: int) -> None:
        """Take back a trial that has reached its assigned epoch or was interrupted."""
        self._handed_out.discard(number)

    def finish(self, number: int, state: End, **details: Any) -> End:
        """End a trial."""
        self._handed_out.discard(number)
        return super().finish(number, state, **details)

    def orphans(self) -> list[Assignment]:
        """Return an empty list, as no trial has to run first; complete an interrupted proposal."""
        super().orphans()
        return []
