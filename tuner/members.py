"""The ledger of a study whose trials are populations: members, and successors of the best.

Trials do not change. A member that gives way ends, and its successor is a trial of its own, which
begins with the weights of one of the best: its attribute `heir` names them. What is decided follows
from the ledger (:mod:`tuner.population`), and is carried out in steps of which each can be told
done or not: a driver that dies between two of them does none twice.

A trial is handed out for the epochs up to its next milestone, the least advanced one first, and
handed back there. To whoever runs it, it is one that was cut and goes on from its checkpoint.

What a successor's parameters are drawn with, and of whom of the best it is, comes from
`SeedSequence(study seed, spawn_key=(3, number of the trial that gave way))`. Its own seed is that
of its number, like any trial's.
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

_MILESTONE = "milestone/{:05d}"  # attribute: where the checkpoint of that epoch lies


class PopulationLedger(TurnsLedger):
    """A ledger of populations, one after the other, as many as `search.trials` holds whole ones.

    The sampler proposes what a population begins with, and learns from such trials alone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        study = self.config
        self._milestones = study.search.milestones(study.training.epochs)
        self._whole = study.search.population_trials(study.training.epochs)

    # Handing out

    def ask(self) -> Assignment | None:
        """The least advanced trial that may train now; None where all wait, or none is left."""
        free = [t for t in self._verdict().turns if t.number not in self._handed_out]
        if not free:
            return None
        turn = min(free, key=lambda turn: (turn.reached, turn.number))
        self._handed_out.add(turn.number)
        return replace(self.going_on(turn.number), until=turn.until, bequeaths=True)

    def going_on(self, number: int) -> Assignment:
        """A trial, to be run on from its last checkpoint, or from its donor's."""
        found = super().going_on(number)
        heir = heir_of(self._storage.get_trial(self._id(number)).user_attrs)
        if heir is None:
            return found
        return replace(found, epoch=found.epoch or heir.epoch, donor=self._placed(heir.location))

    def _origin(self, attrs: Mapping[str, Any]) -> str | None:
        heir = heir_of(attrs)
        return heir.words if heir else None

    def _checkpoint_attrs(self, epoch: int, location: str) -> dict[str, Any]:
        """From a checkpoint the trial goes on, and at a milestone its heirs too."""
        attrs = super()._checkpoint_attrs(epoch, location)
        if epoch in self._milestones:  # first: a storage in memory takes them one by one
            attrs = {_MILESTONE.format(epoch): self._kept(location)} | attrs
        return attrs

    # Deciding

    def settle(self) -> list[TrialRecord]:
        """Found populations and let successors take the place of those who give way.

        Returns:
            The trials that gave way and ran until now.
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
        """Whether a trial is to be run on, or a successor or a population may still begin."""
        verdict = self._verdict()
        return not verdict.over or self._wants_founders(verdict)

    @property
    def n_new(self) -> int:
        """Trials that may still begin."""
        current, verdict = self._current(), self._verdict()
        left = int(self._n_left(self._started(self._frozen())))
        rest = 0 if verdict.over else self._whole - len(current)
        if current and not self._is_founded(current):
            left -= self.config.search.population - len(current)
        return max(0, rest) + max(0, left) // self.config.search.population * self._whole

    def _wants_founders(self, verdict: Verdict) -> bool:
        """Whether the present population is not whole, or over and another may begin."""
        if self._exhausted or not self._n_left(self._started(self._frozen())):
            return False
        return verdict.over or not self._is_founded(self._current())

    def _n_left(self, started: Sequence[FrozenTrial]) -> float:
        """Members that may still be proposed for populations to begin with."""
        search = self.config.search
        most = search.trials // self._whole * search.population
        n_founders = sum(HEIR not in trial.user_attrs for trial in started)
        return max(0, min(most, n_points(search.space)) - n_founders)

    def _verdict(self) -> Verdict:
        """Of the present population."""
        current, study = self._current(), self.config
        return judge(
            current,
            self._milestones,
            epochs=study.training.epochs,
            replaced=study.search.replaced,
            founded=self._is_founded(current),
        )

    def _is_founded(self, members: Sequence[Member]) -> bool:
        """Whether nobody joins any more but successors; who has trained began after the last."""
        founders = [m for m in members if m.replaces is None]
        begun = any(m.reached or m.objectives or m.state != "running" for m in founders)
        return begun or self._exhausted or len(founders) >= self.config.search.population

    def _current(self) -> list[Member]:
        """The members of the last population."""
        populations = self._populations()
        objective = self.config.objective
        return [_member(trial, objective) for trial in populations[-1]] if populations else []

    def _populations(self) -> list[list[FrozenTrial]]:
        """Each one's members with their successors."""
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
        """End a trial that gives way, if it still runs, and begin its successor."""
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
        """Locations among these, each with its trial, from which no trial will go on.

        Kept is what a trial goes on from, what an heir without a checkpoint of its own begins with,
        and what those have left at a milestone who may yet get one.
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
    except KeyError:  # an epoch that says no more than the best so far
        return reported


def _member(frozen: FrozenTrial, objective: Objective) -> Member:
    trial = record_of(frozen)
    own = frozen.user_attrs.get("checkpoint")
    begun = trial.heir.epoch if trial.heir else 0
    return Member(
        trial.number,
        trial.state,
        reached=own["epoch"] if own else begun,
        # Of the weights that a successor would get: what is reported is the best epoch so far.
        objectives={
            epoch: _own_score(objective, trial.epochs.get(epoch, {}), reported)
            for epoch, reported in frozen.intermediate_values.items()
        },
        replaces=trial.heir.replaces if trial.heir else None,
    )
