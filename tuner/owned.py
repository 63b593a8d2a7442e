"""A study's trials in memory, for the one process that writes them, or for one look at them.

Optuna reads all trials that run from the database whenever it is asked for trials, which a single
proposal does some seven times: with 64 of them 0.6 s of the driver went into each proposal. The
driver alone writes its study (the run folder's lock or :mod:`tuner.claim` sees to that), so it
reads once and then knows. Who looks at a study that another process runs reads once as well, and
what is said of it is all of one moment; to look again is to open it again.
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
    """A storage that reads the trials of a study once and keeps them as they are written.

    A write goes to the database first, and into memory when it has arrived there. A trial is
    never changed in place: whoever has one keeps it as it was.

    Args:
        storage: whose studies, as far as they are asked for here, nobody else writes, or are not
            written through this.
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
        """All trials by number, or those in some states."""
        trials = self._known(study_id)
        found = [t for t in trials if states is None or t.state in states]
        return copy.deepcopy(found) if deepcopy else found

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """One trial, as it is now."""
        if trial_id not in self._places:
            return self._backend.get_trial(trial_id)
        study_id, number = self._places[trial_id]
        return self._studies[study_id][number]

    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        """The id of a trial."""
        trials = self._known(study_id)
        if not 0 <= trial_number < len(trials):
            raise KeyError(f"no trial {trial_number} in study {study_id}")
        return trials[trial_number]._trial_id

    def _known(self, study_id: int) -> list[FrozenTrial]:
        if study_id not in self._studies:
            # Not copied: Optuna's storages do not change a trial in place either.
            trials = list(self._backend.get_all_trials(study_id, deepcopy=False))
            self._studies[study_id] = trials
            self._places |= {t._trial_id: (study_id, t.number) for t in trials}
        return self._studies[study_id]

    # Writing

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Make a trial."""
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
        """Begin or end a trial."""
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
        """Set what is reported after a step."""
        self._backend.set_trial_intermediate_value(trial_id, step, intermediate_value)
        self._note(trial_id, "intermediate_values", step, intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set an attribute of the user's."""
        self._backend.set_trial_user_attr(trial_id, key, value)
        self._note(trial_id, "user_attrs", key, json.loads(json.dumps(value)))

    def write_together(
        self, trial_id: int, values: Mapping[int, float], attrs: Mapping[str, Any]
    ) -> None:
        """Set values by step and attributes of the user's, all or none of them."""
        self.check_trial_is_updatable(trial_id, self.get_trial(trial_id).state)
        self._backend.write_together(trial_id, values, attrs)
        for step, value in values.items():
            self._note(trial_id, "intermediate_values", step, value)
        for key, attr in attrs.items():
            self._note(trial_id, "user_attrs", key, json.loads(json.dumps(attr)))

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set an attribute of the sampler's."""
        self._backend.set_trial_system_attr(trial_id, key, value)
        self._note(trial_id, "system_attrs", key, json.loads(json.dumps(value)))

    def delete_study(self, study_id: int) -> None:
        """Delete a study with its trials."""
        self._backend.delete_study(study_id)
        for trial in self._studies.pop(study_id, ()):
            del self._places[trial._trial_id]

    def _note(self, trial_id: int, kind: str, key: Any, value: Any) -> None:
        """One more entry of a trial: as the database would give it, without asking."""
        if trial_id in self._places:
            trial = copy.copy(self.get_trial(trial_id))
            setattr(trial, kind, {**getattr(trial, kind), key: value})
            self._put(trial)

    def _read_again(self, trial_id: int) -> None:
        """Take what the database itself has made of a trial: times, values, representations."""
        if trial_id in self._places:
            self._put(self._backend.get_trial(trial_id))

    def _put(self, trial: FrozenTrial) -> None:
        study_id, number = self._places[trial._trial_id]
        self._studies[study_id][number] = trial


def forward(kind: type[BaseStorage]) -> None:
    """Let what a storage does not answer itself be answered by its ``_backend``.

    What Optuna's base class makes of other methods stays.
    """

    def forwarded(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return getattr(self._backend, name)(*args, **kwargs)

        return method

    for name in sorted(BaseStorage.__abstractmethods__ - vars(kind).keys()):
        setattr(kind, name, forwarded(name))
    abc.update_abstractmethods(kind)


forward(OwnedStorage)  # type: ignore[type-abstract]
