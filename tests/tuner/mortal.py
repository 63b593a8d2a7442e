"""A database whose driver dies."""

from __future__ import annotations

from typing import Any

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
