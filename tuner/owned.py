"""An in-memory cache of a study's trials, for the process that writes them or for one reader.

Optuna reads all running trials from the database whenever trials are requested, which happens about
seven times per proposal: with 64 running trials, this cost the driver 0.6 s per proposal. Only the
driver writes its study (the run folder's lock or :mod:`tuner.claim` ensures this), so it reads the
trials once and updates them in memory. A reader of a study that another process runs also reads
once and sees the study at one moment; to see newer data, open the study again.
"""

from __future__ import annotations

import abc
import copy
import json
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from tuner.storage import PatientStorage


class OwnedStorage(BaseStorage):
    """A storage that reads the trials of a study once and updates them on every write.

    A write goes to the database first and is applied in memory after it has succeeded. Trials are
    never modified in place, so references returned earlier do not change.

    Args:
        storage: the underlying storage. No other process may write the studies that are read here,
            unless this object only reads them.
    """

    def __init__(self, storage: PatientStorage) -> None:
        self._backend = storage
        self._studies: dict[int, list[FrozenTrial]] = {}  # by number
        self._places: dict[int, tuple[int, int]] = {}  # study and number of each trial

    # Reading

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """Return all trials by number, or those in the given states."""
        trials = self._known(study_id)
        found = [t for t in trials if states is None or t.state in states]
        return copy.deepcopy(found) if deepcopy else found

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return the current state of one trial."""
        if trial_id not in self._places:
            return self._backend.get_trial(trial_id)
        study_id, number = self._places[trial_id]
        return self._studies[study_id][number]

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        """Return the id of a trial."""
        trials = self._known(study_id)
        if not 0 <= trial_number < len(trials):
            raise KeyError(f"no trial {trial_number} in study {study_id}")
        return trials[trial_number]._trial_id

    def _known(self, study_id: int) -> list[FrozenTrial]:
        if study_id not in self._studies:
            # No copy is needed: Optuna's storages do not modify trials in place either.
            trials = list(self._backend.get_all_trials(study_id, deepcopy=False))
            self._studies[study_id] = trials
            self._places |= {t._trial_id: (study_id, t.number) for t in trials}
        return self._studies[study_id]

    # Writing

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Create a trial."""
        trials = self._known(study_id)
        trial_id = self._backend.create_new_trial(study_id, template_trial)
        made = self._backend.get_trial(trial_id)
        if made.number != len(trials):
            raise RuntimeError(
                f"trial {made.number} was made where {len(trials)} was the next: somebody else "
                "writes this study"
            )
        trials.append(made)
        self._places[trial_id] = study_id, made.number
        return trial_id

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Start or end a trial."""
        done = self._backend.set_trial_state_values(trial_id, state, values)
        self._read_again(trial_id)
        return done

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        """Set a parameter."""
        self._backend.set_trial_param(trial_id, param_name, param_value_internal, distribution)
        self._read_again(trial_id)

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        """Set the value reported for a step."""
        self._backend.set_trial_intermediate_value(trial_id, step, intermediate_value)
        self._note(trial_id, "intermediate_values", step, intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set a user attribute."""
        self._backend.set_trial_user_attr(trial_id, key, value)
        self._note(trial_id, "user_attrs", key, json.loads(json.dumps(value)))

    def write_together(
        self, trial_id: int, values: Mapping[int, float], attrs: Mapping[str, Any]
    ) -> None:
        """Set intermediate values and user attributes atomically."""
        self.check_trial_is_updatable(trial_id, self.get_trial(trial_id).state)
        self._backend.write_together(trial_id, values, attrs)
        for step, value in values.items():
            self._note(trial_id, "intermediate_values", step, value)
        for key, attr in attrs.items():
            self._note(trial_id, "user_attrs", key, json.loads(json.dumps(attr)))

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set a system attribute."""
        self._backend.set_trial_system_attr(trial_id, key, value)
        self._note(trial_id, "system_attrs", key, json.loads(json.dumps(value)))

    def delete_study(self, study_id: int) -> None:
        """Delete a study with its trials."""
        self._backend.delete_study(study_id)
        for trial in self._studies.pop(study_id, ()):
            del self._places[trial._trial_id]

    def _note(self, trial_id: int, kind: str, key: Any, value: Any) -> None:
        """Add an entry to the trial in memory as the database would return it, without a query."""
        if trial_id in self._places:
            trial = copy.copy(self.get_trial(trial_id))
            setattr(trial, kind, {**getattr(trial, kind), key: value})
            self._put(trial)

    def _read_again(self, trial_id: int) -> None:
        """Reload a trial from the database, which sets times and value representations."""
        if trial_id in self._places:
            self._put(self._backend.get_trial(trial_id))

    def _put(self, trial: FrozenTrial) -> None:
        study_id, number = self._places[trial._trial_id]
        self._studies[study_id][number] = trial


def forward(kind: type[BaseStorage]) -> None:
    """Forward the abstract methods that a storage class does not implement to its ``_backend``.

    Methods that Optuna's base class implements are left unchanged.
    """

    def forwarded(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(self._backend, name)(*args, **kwargs)

        return method

    for name in sorted(BaseStorage.__abstractmethods__ - vars(kind).keys()):
        setattr(kind, name, forwarded(name))
    abc.update_abstractmethods(kind)


forward(OwnedStorage)  # type: ignore[type-abstract]
