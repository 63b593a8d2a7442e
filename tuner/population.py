"""Population-based training: who goes on, who gives way, and to whose successor.

A population of trials trains side by side. At every milestone its members are compared by the
score of that same epoch's weights: the worst give way, and for each a successor begins
with the weights of one of the best. The result follows from the objectives alone. Neither the
number of machines nor who comes first changes it, so that a study of one slot, one of many and one
that was interrupted all decide alike.

Nobody waits whose fate is certain: a member goes on as soon as enough others are worse. Only the
worst of those who have come, as many as give way, wait for the slowest.

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
    """A trial of a population, as far as its fate depends on it.

    Args:
        number: of the trial.
        state: of the trial.
        reached: the last epoch that it need not train again: its weights lie on disk.
        objectives: by epoch, its own ones.
        replaces: the member whose successor it is; None of those that the population began with.
    """

    number: int
    state: State
    reached: int
    objectives: dict[int, float] = field(repr=False)
    replaces: int | None = None

    def has_arrived(self, milestone: int) -> bool:
        """Whether it can be compared there: what it reported will not be trained again."""
        return self.reached >= milestone and milestone in self.objectives

    def standing(self, milestone: int, successors: Mapping[int, Member]) -> tuple[bool, float, int]:
        """Its place among those who have arrived, best first.

        Who has given way stays who gave way, though the epoch may have been trained again on
        another GPU, to another last digit.
        """
        return self.number in successors, self.objectives[milestone], self.number


@dataclass(frozen=True)
class Turn:
    """A trial that may train, and the epoch after which it is looked at again."""

    number: int
    reached: int
    until: int


@dataclass(frozen=True)
class Exploit:
    """A member that gives way at a milestone, and those of whom one gets a successor."""

    epoch: int
    loser: int
    donors: tuple[int, ...]


@dataclass(frozen=True)
class Verdict:
    """What can be decided now.

    Args:
        turns: who may train.
        exploits: those to be carried out, in order.
        settled: the last milestone at which all has been decided and done; 0 before the first.
    """

    turns: tuple[Turn, ...]
    exploits: tuple[Exploit, ...]
    settled: int

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return not self.turns and not self.exploits


def judge(
    members: Sequence[Member],
    milestones: Sequence[int],
    *,
    epochs: int,
    replaced: int,
    founded: bool = True,
) -> Verdict:
    """Decide all that the objectives so far decide.

    Args:
        members: of one population, successors too.
        milestones: epochs after which members are compared, ascending.
        epochs: a trial's budget.
        replaced: members that give way at a milestone; never more than half of those compared.
        founded: whether all members are there that the population begins with.
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
            compared = arrived[: max(0, len(order) - replaced)]  # enough are worse already
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
    """Why a study cannot be searched by PBT, with its field; None where it can, or is not to be."""
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
    """Searched parameters that may change while the weights are kept."""
    free = set(adjustable_paths(study))
    space = study.search.space
    return [path for path, parameter in space.items() if path in free and parameter.size > 1]


def population_note(study: StudyConfig) -> str | None:
    """What the search will do, in one line, where PBT is to run it."""
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
