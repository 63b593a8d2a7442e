"""The ledger of trials that take turns: handed out up to an epoch, and handed back there."""

from __future__ import annotations

from typing import Any

from tuner.records import Assignment, End
from tuner.study import Ledger


class TurnsLedger(Ledger):
    """A ledger that knows who is at work, and decides from its trials who is next.

    To whoever runs it, a trial that was handed back is one that was cut and goes on from its
    checkpoint; so is one whose driver died.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._handed_out: set[int] = set()
        self._exhausted = False  # the space holds no more that has not been tried
        super().__init__(*args, **kwargs)

    def hand_back(self, number: int) -> None:
        """Take back a trial that has come as far as it was to, or was cut."""
        self._handed_out.discard(number)

    def finish(self, number: int, state: End, **details: Any) -> End:
        """End a trial."""
        self._handed_out.discard(number)
        return super().finish(number, state, **details)

    def orphans(self) -> list[Assignment]:
        """None that would have to run first; a proposal that was cut is made whole."""
        super().orphans()
        return []
