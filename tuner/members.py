"""The ledger of population-based training: trials are members of populations.

Trials do not change. A member that is replaced ends, and its successor is a new trial that starts
from the weights of one of the best members, which its attribute `heir` records. Decisions follow
from the ledger (:mod:`tuner.population`) and are carried out in steps whose completion the ledger
shows, so that no step is repeated if the driver dies between two of them.

A trial is assigned for the epochs up to its next milestone, the least advanced trial first, and is
returned to the ledger there. The code that runs it treats it like an interrupted trial that resumes
from its checkpoint.

A successor's donor and its perturbed parameters are drawn from `SeedSequence(study seed,
spawn_key=(3, number of the replaced trial))`. Its own seed follows from its number, as for any
trial.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from model.config import Objective, score
from tuner.perturbation import perturbed
from tuner.population import Exploit, Member, Verdict, judge, perturbed_paths
from tuner.records import HEIR, Assignment, Heir, TrialRecord, heir_of, record_of, trial_seed
from tuner.space import n_points
from tuner.turns import TurnsLedger

_MILESTONE = "milestone/{:05d}"  # attribute: location of the checkpoint of that epoch


class PopulationLedger(TurnsLedger):
    """A ledger of consecutive populations, as many complete ones as `search.trials` allows.

    The sampler proposes the initial members of each population and learns only from these.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        study = self.config
        self._milestones = study.search.milestones(study.training.epochs)
        self._whole = study.search.population_trials(study.training.epochs)

    # Handing out

    def ask(self) -> Assignment | None:
        """Return the least advanced trial that may train now; None if all wait or none is left."""
        free = [t for t in self._verdict().turns if t.number not in self._handed_out]
        if not free:
            return None
        turn = min(free, key=lambda turn: (turn.reached, turn.number))
        self._handed_out.add(turn.number)
        return replace(self.going_on(turn.number), until=turn.until, bequeaths=True)

    def going_on(self, number: int) -> Assignment:
        """Return the assignment that resumes a trial from its last checkpoint or its donor's."""
        found = super().going_on(number)
        heir = heir_of(self._storage.get_trial(self._id(number)).user_attrs)
        if heir is None:
            return found
        return replace(found, epoch=found.epoch or heir.epoch, donor=self._placed(heir.location))

    def _origin(self, attrs: Mapping[str, Any]) -> str | None:
        heir = heir_of(attrs)
        return heir.words if heir else None

    def _checkpoint_attrs(self, epoch: int, location: str) -> dict[str, Any]:
        """Return the attributes of a checkpoint; at a milestone successors may start from it."""
        attrs = super()._checkpoint_attrs(epoch, location)
        if epoch in self._milestones:  # first: an in-memory storage writes them one by one
            attrs = {_MILESTONE.format(epoch): self._kept(location)} | attrs
        return attrs

    # Deciding

    def settle(self) -> list[TrialRecord]:
        """Start populations and replace members that lost a comparison by successors.

        Returns:
            The replaced trials that were running until now.
        """
        ended: list[TrialRecord] = []
        while True:
            verdict = self._verdict()
            if self._wants_founders(verdict):
                self._exhausted = super().ask() is None
            elif verdict.exploits:
                ended += self._carry_out(verdict.exploits[0])
            else:
                return ended

    @property
    def has_work(self) -> bool:
        """Whether a trial has to continue, or a successor or a population may still start."""
        verdict = self._verdict()
        return not verdict.over or self._wants_founders(verdict)

    @property
    def n_new(self) -> int:
        """The number of trials that may still start."""
        current, verdict = self._current(), self._verdict()
        left = int(self._n_left(self._started(self._frozen())))
        rest = 0 if verdict.over else self._whole - len(current)
        if current and not self._is_founded(current):
            left -= self.config.search.population - len(current)
        return max(0, rest) + max(0, left) // self.config.search.population * self._whole

    def _wants_founders(self, verdict: Verdict) -> bool:
        """Return whether initial members are missing, or a further population may start."""
        if self._exhausted or not self._n_left(self._started(self._frozen())):
            return False
        return verdict.over or not self._is_founded(self._current())

    def _n_left(self, started: Sequence[FrozenTrial]) -> float:
        """Return how many initial members may still be proposed."""
        search = self.config.search
        most = search.trials // self._whole * search.population
        n_founders = sum(HEIR not in trial.user_attrs for trial in started)
        return max(0, min(most, n_points(search.space)) - n_founders)

    def _verdict(self) -> Verdict:
        """Return the decisions for the current population."""
        current, study = self._current(), self.config
        return judge(
            current,
            self._milestones,
            epochs=study.training.epochs,
            replaced=study.search.replaced,
            founded=self._is_founded(current),
        )

    def _is_founded(self, members: Sequence[Member]) -> bool:
        """Return whether all initial members exist, as they do once any of them has trained."""
        founders = [m for m in members if m.replaces is None]
        begun = any(m.reached or m.objectives or m.state != "running" for m in founders)
        return begun or self._exhausted or len(founders) >= self.config.search.population

    def _current(self) -> list[Member]:
        """Return the members of the last population."""
        populations = self._populations()
        objective = self.config.objective
        return [_member(trial, objective) for trial in populations[-1]] if populations else []

    def _populations(self) -> list[list[FrozenTrial]]:
        """Return the members of every population, including successors."""
        size = self.config.search.population
        founders: list[FrozenTrial] = []
        heirs: list[FrozenTrial] = []
        for trial in self._started(self._frozen()):
            (heirs if HEIR in trial.user_attrs else founders).append(trial)
        found = [founders[first : first + size] for first in range(0, len(founders), size)]
        home = {trial.number: members for members in found for trial in members}
        for trial in heirs:
            home[trial.number] = home[trial.user_attrs[HEIR]["replaces"]]
            home[trial.number].append(trial)
        return found

    def _carry_out(self, exploit: Exploit) -> list[TrialRecord]:
        """End the losing trial if it still runs, and create its successor."""
        study, epoch = self.config, exploit.epoch
        sequence = np.random.SeedSequence(study.seed, spawn_key=(3, exploit.loser))
        random = np.random.default_rng(sequence)
        chosen = exploit.donors[int(random.integers(len(exploit.donors)))]
        donor = self._storage.get_trial(self._id(chosen))
        ended = []
        if self.trial(exploit.loser).state == "running":
            reason = f"gave way after epoch {epoch} to a successor of trial {chosen:04d}"
            self.finish(exploit.loser, "pruned", reason=reason)
            ended.append(self.trial(exploit.loser))
        params = perturbed(donor.params, study.search.space, perturbed_paths(study), random)
        heir = Heir(
            donor=chosen,
            epoch=epoch,
            location=donor.user_attrs[_MILESTONE.format(epoch)],
            replaces=exploit.loser,
            changed={
                path: [donor.params[path], value]
                for path, value in params.items()
                if value != donor.params[path]
            },
        )
        frozen = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=params,
            distributions=donor.distributions,
            user_attrs={
                HEIR: asdict(heir),
                "seed": trial_seed(study.seed, len(self._frozen())),  # its number
                "budget": study.training.epochs,
            },
        )
        self._storage.create_new_trial(self._study._study_id, frozen)
        return ended

    # Keeping

    def unneeded(self, checkpoints: Iterable[tuple[int, str]]) -> list[str]:
        """Return the locations among these (trial, location) pairs that no trial needs.

        Checkpoints are kept if a trial resumes from them, if a successor without a checkpoint of
        its own starts from them, or if they belong to an open milestone at which a member may still
        get a successor.
        """
        settled = self._verdict().settled
        current = {member.number for member in self._current()}
        kept: set[str] = set()
        for trial in self._started(self._frozen()):
            attrs = trial.user_attrs
            if trial.number in current:
                marks = {
                    e: attrs.get(_MILESTONE.format(e)) for e in self._milestones if e > settled
                }
                kept |= {place for place in marks.values() if place}
            heir = heir_of(attrs)
            if trial.state == TrialState.RUNNING and heir and "checkpoint" not in attrs:
                kept.add(heir.location)
        placed = {self._placed(place) for place in kept}
        return [place for place in super().unneeded(checkpoints) if place not in placed]


def _own_score(objective: Objective, metrics: Mapping[str, Any], reported: float) -> float:
    try:
        return score(objective, metrics)
    except KeyError:  # an epoch that reports only the best so far
        return reported


def _member(frozen: FrozenTrial, objective: Objective) -> Member:
    trial = record_of(frozen)
    own = frozen.user_attrs.get("checkpoint")
    begun = trial.heir.epoch if trial.heir else 0
    return Member(
        trial.number,
        trial.state,
        reached=own["epoch"] if own else begun,
        # The score of the weights that a successor would get; the reported objective is that of the
        # best epoch so far.
        objectives={
            epoch: _own_score(objective, trial.epochs.get(epoch, {}), reported)
            for epoch, reported in frozen.intermediate_values.items()
        },
        replaces=trial.heir.replaces if trial.heir else None,
    )
