"""A database whose driver dies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from optuna.storages import InMemoryStorage

WRITES = (
    "create_new_trial",
    "set_trial_param",
    "set_trial_state_values",
    "set_trial_intermediate_value",
    "set_trial_user_attr",
)


class Death(BaseException):
    """kill -9, as far as the ledger can tell."""


class Mortal(InMemoryStorage):
    """A database whose driver dies before its so-manieth write, once."""

    left: int | None = None

    def passed(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                raise Death


def _counted(name: str) -> Any:
    def method(self: Mortal, *arguments: Any, **named: Any) -> Any:
        self.passed()
        return getattr(InMemoryStorage, name)(self, *arguments, **named)

    return method


for _name in WRITES:
    setattr(Mortal, _name, _counted(_name))


def dying_changes_nothing(session: Callable[[Mortal, str], list[Any]], stride: int) -> list[Any]:
    """Let a study's driver die before every so-manieth write, and go on: it ends as without.

    Args:
        session: runs a study in a database, under a name, to its end; all that its ledger says.
        stride: writes from one death to the next.

    Returns:
        What the ledger says of a driver that lives.
    """
    counting = Mortal()
    counting.left = 10**6
    whole = session(counting, "whole")
    for at in range(0, 10**6 - counting.left, stride):
        storage = Mortal()
        storage.left = at
        with pytest.raises(Death):
            session(storage, f"cut-{at}")
        assert session(storage, f"cut-{at}") == whole, at
    return whole
