"""Observers of trial events, independent of how the trials are run."""

from __future__ import annotations

from typing import Any

from tuner.records import Assignment, State


class Watcher:
    """Receives trial events and ignores them; subclasses override the events they need."""

    def proposed(self, assignment: Assignment) -> None:
        """A trial will start or resume as soon as a machine has room for it."""

    def started(self, assignment: Assignment) -> None:
        """A trial starts or resumes."""

    def reported(self, number: int, metrics: dict[str, Any]) -> None:
        """A trial finished an epoch, which has been recorded in the ledger."""

    def handed_back(self, number: int) -> None:
        """A trial has reached its assigned epoch and waits to be resumed."""

    def lost(self, number: int, reason: str) -> None:
        """A trial lost its machine and will be resumed."""

    def halved(self, number: int, parts: int, message: str) -> None:
        """A trial ran out of memory and will be resumed with its batches split into parts."""

    def finished(self, number: int, state: State, reason: str | None) -> None:
        """A trial ended."""


class Watchers(Watcher):
    """Forwards events to several watchers in order."""

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
