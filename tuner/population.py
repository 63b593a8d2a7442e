"""Population-based training: decides which members continue and which ones are replaced.

A population of trials trains in parallel. At every milestone its members are compared by the score
of their weights at that epoch: the worst are replaced, each by a successor that starts from the
weights of one of the best. The result depends only on the objectives, not on the number of machines
or the order of arrival, so that a study with one slot, a study with many slots and an interrupted
study make the same decisions.

A member waits only while its outcome is open: it continues as soon as enough other members are
worse. Only the worst members at a milestone, as many as are replaced, wait for the slowest member.

Source: Jaderberg et al., "Population based training of neural networks", 2017; truncation
selection at fixed epochs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from model.adjustment import adjustable_paths
from model.wording import counted
from tuner.space import n_points

if TYPE_CHECKING:
    from tuner.config import StudyConfig
    from tuner.records import State


@dataclass(frozen=True)
class Member:
    """The part of a trial's state on which decisions about a population depend.

    Args:
        number: number of the trial.
        state: state of the trial.
        reached: the last epoch that need not be trained again, as its weights are on disk.
        objectives: its own objectives by epoch.
        replaces: the member that it replaced; None for the initial members.
    """

    number: int
    state: State
    reached: int
    objectives: dict[int, float] = field(repr=False)
    replaces: int | None = None

    def has_arrived(self, milestone: int) -> bool:
        """Return whether the member can be compared: it will not train that epoch again."""
        return self.reached >= milestone and milestone in self.objectives

    def standing(self, milestone: int, successors: Mapping[int, Member]) -> tuple[bool, float, int]:
        """Return the sort key among the members that have reached a milestone, best first.

        Members that were replaced stay last, even if the epoch was trained again on another GPU
        with a slightly different result.
        """
        return self.number in successors, self.objectives[milestone], self.number


@dataclass(frozen=True)
class Turn:
    """A trial that may train, and the epoch after which it is evaluated again."""

    number: int
    reached: int
    until: int


@dataclass(frozen=True)
class Exploit:
    """A member to be replaced at a milestone, and the candidate donors for its successor."""

    epoch: int
    loser: int
    donors: tuple[int, ...]


@dataclass(frozen=True)
class Verdict:
    """The decisions that can be made now.

    Args:
        turns: the trials that may train.
        exploits: replacements to carry out, in order.
        settled: the last milestone at which all replacements are carried out; 0 before the first.
    """

    turns: tuple[Turn, ...]
    exploits: tuple[Exploit, ...]
    settled: int

    @property
    def over(self) -> bool:
        """Whether the population has finished."""
        return not self.turns and not self.exploits


def judge(
    members: Sequence[Member],
    milestones: Sequence[int],
    *,
    epochs: int,
    replaced: int,
    founded: bool = True,
) -> Verdict:
    """Make all decisions that follow from the objectives reported so far.

    Args:
        members: the members of one population, including successors.
        milestones: epochs after which members are compared, in ascending order.
        epochs: the budget of a trial.
        replaced: number of members replaced at a milestone; at most half of those compared.
        founded: whether all initial members of the population exist.
    """
    successors = {m.replaces: m for m in members if m.replaces is not None}
    compared = [m for m in members if m.replaces is None]
    turns: list[Turn] = []
    exploits: list[Exploit] = []
    settled, certain = 0, founded
    for milestone in milestones:
        arrived = [m for m in compared if m.has_arrived(milestone)]
        dead = [m for m in compared if m not in arrived and m.state == "failed"]
        away = [m for m in compared if m not in arrived and m not in dead]
        turns += [Turn(m.number, m.reached, milestone) for m in away if m.state == "running"]
        arrived.sort(key=lambda m: m.standing(milestone, successors))
        order = arrived + sorted(dead, key=lambda m: m.number)
        if not certain or away:
            certain = False
            compared = arrived[: max(0, len(order) - replaced)]  # enough others are worse
            continue
        n_losers = min(replaced, len(order) // 2)
        donors = tuple(m.number for m in order[:n_losers] if m in arrived)
        losers = order[len(order) - n_losers :] if donors else []
        due = [m for m in losers if m.number not in successors]
        exploits += [Exploit(milestone, m.number, donors) for m in due]
        staying = [m for m in arrived if m not in losers]
        compared = staying + [successors[m.number] for m in losers if m.number in successors]
        certain = not due
        settled = settled if due else milestone
    turns += [Turn(m.number, m.reached, epochs) for m in compared if m.state == "running"]
    return Verdict(tuple(turns), tuple(exploits), settled)


def refusal(study: StudyConfig) -> str | None:
    """Return why PBT cannot search a study, with the field; None if it can or is not requested."""
    search, epochs = study.search, study.training.epochs
    if search.scheduler != "pbt":
        return None
    milestones = search.milestones(epochs)
    if not milestones:
        every = search.perturbation_epochs or 1
        return (
            f"search.scheduler: pbt compares its population every {every} epochs, and "
            f"training.epochs is {epochs}; take more epochs or another scheduler"
        )
    needed = search.population_trials(epochs)
    if needed > search.trials:
        return (
            f"search.trials: {counted(search.trials, 'trial')} make no whole population; "
            f"{search.population} members, and {search.replaced} successors after each of the "
            f"epochs {', '.join(map(str, milestones))}, are {needed}"
        )
    if search.sampler in ("cmaes", "grid"):
        return (
            f"search.sampler: {search.sampler} takes every trial for one of its own points, "
            "and pbt's successors are none; take tpe, gp or random"
        )
    if search.least_chance:
        return (
            "search.least_chance: in a population the worst give way, and all others train to "
            "the end; take least_chance=0"
        )
    if search.promote:
        return (
            "search.promote: a winner of pbt has changed its parameters as it went, and "
            "promotion trains with fixed ones; take promote=0 (tuner.train --from repeats "
            "the winner, changes and all)"
        )
    if study.training.patience is not None:
        return (
            "training.patience: pbt compares trials at the same epoch, and none may stop "
            "between two of them; take patience=null"
        )
    if not perturbed_paths(study):
        return (
            "search.space: holds nothing that may change while a network keeps its weights "
            "(as training.learning_rate, network.dropout, blend.beta or a weight in loss may); "
            "pbt needs such a parameter"
        )
    points = n_points(search.space)
    if points < search.population:
        return (
            f"search.population: {search.population} members, and search.space has "
            f"{points:.0f} points; widen the space or take fewer members"
        )
    return None


def perturbed_paths(study: StudyConfig) -> list[str]:
    """Return the searched parameters that may change while the weights are kept."""
    free = set(adjustable_paths(study))
    space = study.search.space
    return [path for path, parameter in space.items() if path in free and parameter.size > 1]


def population_note(study: StudyConfig) -> str | None:
    """Describe a PBT search in one line; None for other schedulers."""
    search, epochs = study.search, study.training.epochs
    if search.scheduler != "pbt":
        return None
    needed = search.population_trials(epochs)
    n_populations, left = divmod(search.trials, needed)
    after = ", ".join(map(str, search.milestones(epochs)))
    many = "1 population" if n_populations == 1 else f"{n_populations} populations, one by one,"
    worst = f"{search.replaced} worst give" if search.replaced > 1 else "worst gives"
    text = (
        f"pbt: {many} of {search.population}; after epoch {after} the {worst} way to successors "
        f"of the best: {counted(needed, 'trial')} a population"
    )
    if left:
        text += f"; {left} of {search.trials} trials are left over"
    kept = [path for path in search.space if path not in perturbed_paths(study)]
    return text + (f"; successors keep {', '.join(kept)}" if kept else "")
