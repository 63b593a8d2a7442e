"""Optuna samplers by configured name.

The ledger creates a new sampler with its own seed for every proposal, so that a proposal depends
only on the ledger. CMA-ES stores its distribution in the trials' attributes; the other samplers
keep no state.
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

_PATIENCE = 3  # consecutive repetitions after which another sampler proposes
_SOURCES = 10  # trials of an earlier study; CMA-ES starts from the best tenth of them
_MANY = 300  # trials from which on a Gaussian process takes a second (benchmarks.search)


def proposal_sampler(
    study: StudyConfig, number: int, prior: Sequence[FrozenTrial] = (), repeated: int = 0
) -> BaseSampler:
    """Return the sampler for one proposal, seeded by the study's seed and the proposal's number.

    Args:
        study: the study, which names the sampler.
        number: number of the proposal.
        prior: trials of an earlier study.
        repeated: number of proposals directly before it that repeated a trial.
    """
    sequence = np.random.SeedSequence(study.seed, spawn_key=(1, number))
    seed = int(sequence.generate_state(1)[0])
    if repeated >= _PATIENCE:  # a converged sampler keeps proposing the same point
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
    """Return the study's sampler with a seed.

    Args:
        search: names the sampler and sets its startup trials.
        seed: seed of this proposal.
        prior: trials of an earlier study. Only CMA-ES needs them here: the other samplers that
            learn read them from the study.
    """
    n_startup = search.startup_trials
    if search.sampler == "random":
        return RandomSampler(seed=seed)
    if search.sampler == "grid":
        return GridSampler(search.space, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if search.sampler == "gp":
            # The model needs at least one trial.
            modelled = SpaceGPSampler(search.space, seed=seed, n_startup_trials=max(1, n_startup))
            # With two objectives no trial is stopped, and a running trial has no cost yet.
            return Viewing(modelled, with_expected_ends) if search.cost is None else modelled
        if search.sampler == "cmaes":
            moved = search.moved_by_cmaes()
            known = [_restricted(trial, moved) for trial in prior]
            if known:  # repeated, so that the best tenth holds at least one trial
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
    """Return a sampler that finds new points when the study's own sampler repeats trials.

    In a small finite space the remaining points are enumerated; otherwise points are random.
    """
    if n_points(search.space) <= MAX_GRID:
        return GridSampler(search.space, seed)
    return RandomSampler(seed=seed)


def sampler_note(search: SearchConfig) -> str | None:
    """Return one line on what a user should know about the configured sampler, or None."""
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
    """Return the trial with these parameters only, as CMA-ES accepts no others as a source."""
    return optuna.trial.create_trial(
        value=trial.value,
        params={path: trial.params[path] for path in paths},
        distributions={path: trial.distributions[path] for path in paths},
    )


def _distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Return the Optuna distributions of all parameters."""
    anywhere = optuna.trial.FixedTrial({path: p.probes()[0] for path, p in space.items()})
    suggest(space, anywhere)
    return anywhere.distributions


def _varied(space: SearchSpace) -> dict[str, BaseDistribution]:
    """Return the distributions of parameters with several values, sorted as in Optuna."""
    return {path: d for path, d in sorted(_distributions(space).items()) if not d.single()}


class Viewing(BaseSampler):
    """A sampler wrapper that presents a modified view of a study's trials.

    Args:
        sampler: the wrapped sampler.
        view: maps the trials of all states to those the sampler sees, without in-place changes.
    """

    def __init__(
        self, sampler: BaseSampler, view: Callable[[Sequence[FrozenTrial]], list[FrozenTrial]]
    ) -> None:
        self._sampler = sampler
        self._view = view

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the search space of the sampler."""
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
    """Return trials without inherited weights, which would affect the objective too."""
    return [trial for trial in trials if HEIR not in trial.user_attrs]


def waiting_as_stopped(trials: Sequence[FrozenTrial], rungs: Collection[int]) -> list[FrozenTrial]:
    """Return the trials, with those that wait at a rung marked as stopped there.

    Samplers would treat them as running trials without results.

    Args:
        trials: trials of all states.
        rungs: epochs after which trials wait.

    Returns:
        The same trials in the same order; waiting ones are replaced by PRUNED copies.
    """
    found = []
    for trial in trials:
        if trial.state == TrialState.RUNNING and trial.last_step in rungs:
            trial = copy.copy(trial)
            trial.state = TrialState.PRUNED
        found.append(trial)
    return found


class SpaceGPSampler(GPSampler):
    """A Gaussian process sampler over a fixed search space."""

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
    """TPE over a fixed search space.

    Optuna's sampler infers the space by comparing the parameters of all trials, which has to be
    repeated for a sampler that is created for each proposal: with 10,000 trials this takes half of
    the proposal's time. In our studies every trial has all parameters.
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
    """Univariate TPE over a fixed search space: Optuna's ``multivariate=False``.

    The densities of the good trials and of the rest are estimated for each parameter independently,
    as TPE was published. Optuna sorts all trials once per parameter; here they are sorted once.

    Source: Bergstra, Bardenet, Bengio and Kegl, "Algorithms for hyper-parameter optimization",
    NIPS 2011, section 4.
    """

    def __init__(self, space: SearchSpace, *, seed: int, n_startup_trials: int) -> None:
        super().__init__(space, seed=seed, n_startup_trials=n_startup_trials, multivariate=False)

    def _sample(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return what Optuna's method of the same name returns for each parameter separately."""
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
    """Proposes untried points of a finite space in random order.

    Optuna's GridSampler stops the study itself and repeats enqueued points.
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
        """Return an untried point; empty if all have been tried."""
        others = study.get_trials(deepcopy=False)
        tried = {
            tuple(self._space[path].index(t.params[path]) for path in self._space)
            for t in others
            if t.state != TrialState.WAITING
            and "prior" not in t.user_attrs  # trials of an earlier study may be tried again
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
        """Return any grid value: if no point is new, the ledger detects the repetition."""
        values = self._values[param_name]
        return values[self._random.integers(len(values))]
