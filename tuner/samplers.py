"""Optuna samplers by their configured names.

The ledger makes one for every proposal, with a seed of its own, so that a proposal depends on the
ledger alone. CMA-ES keeps its distribution in the trials' attributes, the others keep nothing.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Collection, Container, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.samplers._tpe.sampler import (
    _split_trials,
    default_gamma,
    default_gamma_multiobjective,
)
from optuna.trial import FrozenTrial, TrialState

from model.wording import counted
from tuner.config import SearchConfig, StudyConfig
from tuner.extrapolation import with_expected_ends
from tuner.records import HEIR
from tuner.refusals import MAX_GRID
from tuner.rungs import rungs_of
from tuner.space import SearchSpace, Value, n_points, suggest

_PATIENCE = 3  # proposals in a row that were tried before: then chance proposes
_SOURCES = 10  # trials of an earlier study of which CMA-ES takes the best tenth as its first cloud
_MANY = 300  # trials after which a Gaussian process thinks for a second (benchmarks.search)


def proposal_sampler(
    study: StudyConfig, number: int, prior: Sequence[FrozenTrial] = (), repeated: int = 0
) -> BaseSampler:
    """The sampler of one proposal, seeded by the study's seed and the proposal's number.

    Args:
        study: names it.
        number: of the proposal.
        prior: trials of an earlier study.
        repeated: how many proposals right before it repeated a trial.
    """
    sequence = np.random.SeedSequence(study.seed, spawn_key=(1, number))
    seed = int(sequence.generate_state(1)[0])
    if repeated >= _PATIENCE:  # a sampler that has found its best proposes it for ever
        sampler = make_stranger(study.search, seed)
    else:
        sampler = make_sampler(study.search, seed, prior)
    if study.search.scheduler == "pbt":
        return Viewing(sampler, without_heirs)
    if study.search.scheduler == "asha-pausing":
        rungs = rungs_of(study.search, study.training.epochs)
        return Viewing(sampler, partial(waiting_as_stopped, rungs=rungs))
    return sampler


def make_sampler(search: SearchConfig, seed: int, prior: Sequence[FrozenTrial]) -> BaseSampler:
    """The study's sampler, seeded.

    Args:
        search: names it and sets its start.
        seed: of this proposal.
        prior: trials of an earlier study. CMA-ES alone asks for them: the other samplers that
            learn take what the study holds.
    """
    n_startup = search.startup_trials
    if search.sampler == "random":
        return RandomSampler(seed=seed)
    if search.sampler == "grid":
        return GridSampler(search.space, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if search.sampler == "gp":
            # Of no trial there is nothing to model.
            modelled = SpaceGPSampler(search.space, seed=seed, n_startup_trials=max(1, n_startup))
            # With two objectives nobody is stopped, and a trial that runs has no cost yet.
            return Viewing(modelled, with_expected_ends) if search.cost is None else modelled
        if search.sampler == "cmaes":
            moved = search.moved_by_cmaes()
            known = [_restricted(trial, moved) for trial in prior]
            if known:  # of fewer there is no best tenth, and the best one serves
                known *= math.ceil(_SOURCES / len(known))
            return CmaEsSampler(
                seed=seed,
                n_startup_trials=n_startup,
                warn_independent_sampling=False,
                source_trials=known or None,
            )
        kind = UnivariateTPESampler if search.sampler == "tpe-univariate" else SpaceTPESampler
        return kind(search.space, seed=seed, n_startup_trials=n_startup)


def make_stranger(search: SearchConfig, seed: int) -> BaseSampler:
    """A sampler of points that are new, for a study whose own repeats what was tried.

    Which points of a finite space are left is counted; in a larger one chance finds new ones.
    """
    if n_points(search.space) <= MAX_GRID:
        return GridSampler(search.space, seed)
    return RandomSampler(seed=seed)


def sampler_note(search: SearchConfig) -> str | None:
    """What a user should know before this sampler's first proposal, in one line."""
    if search.sampler == "grid":
        points = int(n_points(search.space))
        run = min(points, search.trials)
        return f"sampler grid: {counted(points, 'point')}, of which {run} will run"
    if search.proposer != search.sampler:
        return (
            f"sampler {search.sampler}: proposes none of {counted(search.trials, 'trial')}, as the "
            f"first {search.startup_trials} are drawn at random (search.startup_trials)"
        )
    if search.sampler == "gp" and min(search.trials, n_points(search.space)) > _MANY:
        return (
            f"sampler gp: a proposal takes a second after {_MANY} trials and grows with their "
            "cube; for so many take tpe"
        )
    if search.sampler != "cmaes":
        return None
    moved = search.moved_by_cmaes()
    said = [f"moves {', '.join(moved)}"]
    random = [path for path, p in search.space.items() if path not in moved and p.size > 1]
    if random:
        said.append(f"leaves categorical parameters to chance: {', '.join(random)}")
    if search.who_stops is not None:
        said.append("learns from finished trials alone, not from those that are stopped")
    return f"sampler cmaes: {'; '.join(said)}"


def _restricted(trial: FrozenTrial, paths: Sequence[str]) -> FrozenTrial:
    """The trial with these parameters alone: CMA-ES wants no others in its start."""
    return optuna.trial.create_trial(
        value=trial.value,
        params={path: trial.params[path] for path in paths},
        distributions={path: trial.distributions[path] for path in paths},
    )


def _distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """All parameters in Optuna's words."""
    anywhere = optuna.trial.FixedTrial({path: p.probes()[0] for path, p in space.items()})
    suggest(space, anywhere)
    return anywhere.distributions


def _varied(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Parameters that have more than one value, by name as Optuna orders them."""
    return {path: d for path, d in sorted(_distributions(space).items()) if not d.single()}


class Viewing(BaseSampler):
    """A sampler that sees a study's trials through a view.

    Args:
        sampler: which proposes.
        view: of all trials, whatever their states; it changes none of them in place.
    """

    def __init__(
        self, sampler: BaseSampler, view: Callable[[Sequence[FrozenTrial]], list[FrozenTrial]]
    ) -> None:
        self._sampler = sampler
        self._view = view

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """That of the sampler."""
        return self._sampler.infer_relative_search_space(self._seen(study), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """What the sampler proposes."""
        return self._sampler.sample_relative(self._seen(study), trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """What the sampler proposes."""
        return self._sampler.sample_independent(
            self._seen(study), trial, param_name, param_distribution
        )

    def _seen(self, study: optuna.Study) -> optuna.Study:
        def trials(
            deepcopy: bool = True,
            states: Container[TrialState] | None = None,
            use_cache: bool = False,
        ) -> list[FrozenTrial]:
            found = self._view(study._get_trials(deepcopy, None, use_cache))
            return [trial for trial in found if states is None or trial.state in states]

        seen = copy.copy(study)
        vars(seen)["_get_trials"] = trials
        return seen


def without_heirs(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Trials with weights of their own alone: of others the objective is not that of parameters."""
    return [trial for trial in trials if HEIR not in trial.user_attrs]


def waiting_as_stopped(trials: Sequence[FrozenTrial], rungs: Collection[int]) -> list[FrozenTrial]:
    """The trials, with those that wait at a rung as stopped there.

    A sampler takes what runs for something that nothing is known of.

    Args:
        trials: whatever their states.
        rungs: epochs after which trials wait.

    Returns:
        The same trials in the same order; of those that wait, copies that are PRUNED.
    """
    found = []
    for trial in trials:
        if trial.state == TrialState.RUNNING and trial.last_step in rungs:
            trial = copy.copy(trial)
            trial.state = TrialState.PRUNED
        found.append(trial)
    return found


class SpaceGPSampler(GPSampler):
    """A Gaussian process over a space that is known."""

    def __init__(self, space: SearchSpace, *, seed: int, n_startup_trials: int) -> None:
        super().__init__(
            seed=seed, n_startup_trials=n_startup_trials, warn_independent_sampling=False
        )
        self._known = _varied(space)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All parameters that have more than one value."""
        return self._known


class SpaceTPESampler(TPESampler):
    """TPE over a space that is known.

    Optuna's finds out by comparing the parameters of all trials with each other, for a sampler that
    is made for one proposal all of them anew: with 10,000 trials half of the proposal's time. In a
    study of ours every trial has all parameters.
    """

    def __init__(
        self, space: SearchSpace, *, seed: int, n_startup_trials: int, multivariate: bool = True
    ) -> None:
        super().__init__(
            seed=seed,
            n_startup_trials=n_startup_trials,
            multivariate=multivariate,
            constant_liar=True,
        )
        self._known = _varied(space)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All parameters that have more than one value."""
        return self._known


class UnivariateTPESampler(SpaceTPESampler):
    """TPE over a space that is known, each parameter by itself: Optuna's ``multivariate=False``.

    What the good trials and the rest say of one parameter does not depend on the others, as TPE was
    published. Optuna sorts all trials once for each parameter; here they are sorted once.

    Source: Bergstra, Bardenet, Bengio and Kegl, "Algorithms for hyper-parameter optimization",
    NIPS 2011, section 4.
    """

    def __init__(self, space: SearchSpace, *, seed: int, n_startup_trials: int) -> None:
        super().__init__(space, seed=seed, n_startup_trials=n_startup_trials, multivariate=False)

    def _sample(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """What Optuna's method of the same name gives for one parameter after the other."""
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
        trials = [
            other
            for other in study._get_trials(deepcopy=False, states=states, use_cache=False)
            if other.number != trial.number
        ]
        gamma = default_gamma if len(study.directions) == 1 else default_gamma_multiobjective
        n_good = gamma(sum(other.state != TrialState.RUNNING for other in trials))
        good, rest = _split_trials(study, trials, n_good)
        found = {}
        for name, distribution in search_space.items():
            alone = {name: distribution}
            of_good = self._build_parzen_estimator(study, alone, good, handle_below=True)
            of_rest = self._build_parzen_estimator(study, alone, rest, handle_below=False)
            drawn = of_good.sample(self._rng.rng, self._n_ei_candidates)
            gain = self._compute_acquisition_func(drawn, of_good, of_rest)
            best = self._compare(drawn, gain)[name]
            found[name] = distribution.to_external_repr(best)
        return found


class GridSampler(BaseSampler):
    """Points of a finite space that no trial has had yet, in random order.

    Optuna's own ends the whole study from inside and repeats points that were enqueued.
    """

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self._space = space
        self._values = {path: parameter.values() for path, parameter in space.items()}
        self._random = np.random.default_rng(seed)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All parameters."""
        return _distributions(self._space)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A point that is new; nothing when all have been tried."""
        others = study.get_trials(deepcopy=False)
        tried = {
            tuple(self._space[path].index(t.params[path]) for path in self._space)
            for t in others
            if t.state != TrialState.WAITING
            and "prior" not in t.user_attrs  # of an earlier study: may be tried again
            and self._space.keys() <= t.params.keys()
        }
        every = product(*(range(len(values)) for values in self._values.values()))
        new = [point for point in every if point not in tried]
        if not new:
            return {}
        chosen = new[self._random.integers(len(new))]
        pairs = zip(self._values.items(), chosen, strict=True)
        return {path: values[index] for (path, values), index in pairs}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Value:
        """Any value of the grid: when no point is new, the ledger sees the repetition."""
        values = self._values[param_name]
        return values[self._random.integers(len(values))]
