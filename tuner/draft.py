"""Drafts a new trial in memory and writes it to the database in one commit.

Optuna's study writes a new trial piece by piece: the trial, every parameter and every attribute,
each with a commit that waits for the disk. A drafted proposal takes one commit, and a driver that
dies during the proposal leaves no partial trial.
"""

from __future__ import annotations

import copy
from collections.abc import Container
from datetime import datetime
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from tuner.owned import forward

_DRAFT = -1  # the trial's id until the database assigns one


class Draft(BaseStorage):
    """A storage that holds back one new trial until :meth:`write`.

    All other trials, including enqueued ones, are those of the wrapped storage. Use one draft per
    proposal.

    Args:
        storage: the storage to which the trial is written.
    """

    def __init__(self, storage: BaseStorage) -> None:
        self._backend = storage
        self._study_id = 0
        self._trial: FrozenTrial | None = None

    @classmethod
    def of(cls, study: optuna.Study) -> tuple[Draft, optuna.Study]:
        """Return a draft, and a copy of the study whose next trial it holds back."""
        draft = cls(study._storage)
        twin = copy.copy(study)
        twin._storage = draft
        return draft, twin

    def write(self) -> None:
        """Write the trial to the database in one commit; do nothing if none was held back."""
        if self._trial is not None:
            self._backend.create_new_trial(self._study_id, self._trial)
            self._trial = None

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Create the trial that is held back."""
        if template_trial is not None or self._trial is not None:
            raise RuntimeError("a draft is of one trial that a sampler proposes")
        self._study_id = study_id
        self._trial = FrozenTrial(
            number=self._backend.get_n_trials(study_id),
            trial_id=_DRAFT,
            state=TrialState.RUNNING,
            value=None,
            datetime_start=datetime.now(),  # noqa: DTZ005 - Optuna's times have no zone
            datetime_complete=None,
            params={},
            distributions={},
            user_attrs={},
            system_attrs={},
            intermediate_values={},
        )
        return _DRAFT

    def _draft(self, trial_id: int) -> FrozenTrial | None:
        return self._trial if trial_id == _DRAFT else None

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return the draft, or a trial of the storage."""
        draft = self._draft(trial_id)
        return self._backend.get_trial(trial_id) if draft is None else copy.deepcopy(draft)

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """Return the storage's trials with the draft as the last one."""
        trials = self._backend.get_all_trials(study_id, deepcopy, states)
        if self._trial is None or (states is not None and self._trial.state not in states):
            return trials
        return [*trials, copy.deepcopy(self._trial) if deepcopy else self._trial]

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        """Set a parameter."""
        draft = self._draft(trial_id)
        if draft is None:
            self._backend.set_trial_param(trial_id, param_name, param_value_internal, distribution)
            return
        value = distribution.to_external_repr(param_value_internal)
        draft.params = {**draft.params, param_name: value}
        draft.distributions = {**draft.distributions, param_name: distribution}

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set a user attribute."""
        draft = self._draft(trial_id)
        if draft is None:
            self._backend.set_trial_user_attr(trial_id, key, value)
        else:
            draft.user_attrs = {**draft.user_attrs, key: value}

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set a system attribute."""
        draft = self._draft(trial_id)
        if draft is None:
            self._backend.set_trial_system_attr(trial_id, key, value)
        else:
            draft.system_attrs = {**draft.system_attrs, key: value}


# Abstract methods that are missing above are never called for a draft.
forward(Draft)  # type: ignore[type-abstract]
