"""Who is told what happens to the trials, whoever runs them."""

from __future__ import annotations

from typing import Any

from tuner.records import Assignment, State


class Watcher:
    """Is told of trials, and does nothing; who derives from it does what concerns them."""

    def proposed(self, assignment: Assignment) -> None:
        """A trial is to begin, or to go on, as soon as a machine has room for it."""

    def started(self, assignment: Assignment) -> None:
        """A trial begins, or goes on."""

    def reported(self, number: int, metrics: dict[str, Any]) -> None:
        """A trial finished an epoch, which is in the ledger."""

    def handed_back(self, number: int) -> None:
        """A trial has trained as far as it was to, and waits to be run on."""

    def lost(self, number: int, reason: str) -> None:
        """A machine died under a trial, which will be run on."""

    def halved(self, number: int, parts: int, message: str) -> None:
        """Memory was not enough for a trial, which will be run on with its batches in parts."""

    def finished(self, number: int, state: State, reason: str | None) -> None:
        """A trial ended."""


class Watchers(Watcher):
    """Several as one, told in order."""

    def __init__(self, *watchers: Watcher) -> None:
        self._watchers = watchers

    def proposed(self, assignment: Assignment) -> None:
        for watcher in self._watchers:
            watcher.proposed(assignment)

    def started(self, assignment: Assignment) -> None:
        for watcher in self._watchers:
            watcher.started(assignment)

    def reported(self, number: int, metrics: dict[str, Any]) -> None:
        for watcher in self._watchers:
            watcher.reported(number, metrics)

    def handed_back(self, number: int) -> None:
        for watcher in self._watchers:
            watcher.handed_back(number)

    def lost(self, number: int, reason: str) -> None:
        for watcher in self._watchers:
            watcher.lost(number, reason)

    def halved(self, number: int, parts: int, message: str) -> None:
        for watcher in self._watchers:
            watcher.halved(number, parts, message)

    def finished(self, number: int, state: State, reason: str | None) -> None:
        for watcher in self._watchers:
            watcher.finished(number, state, reason)
