from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tuner.support import run_here, tiny_study, write_study
from tuner.errors import ConfigError
from tuner.population import Member, Verdict, judge, perturbed_paths, population_note

MILESTONES, EPOCHS = (2, 4, 6), 8


def objective(number: int, epoch: int) -> float:
    """Any, different for all."""
    return float(np.random.default_rng((number, epoch)).random())


Given = tuple[int, int, int, set[int]]


def slow_history(size: int, replaced: int, fatal: dict[int, int]) -> list[Given]:
    """Who gives way, when, to which number and to whose successor, if all wait for all.

    The obvious way, a milestone after the other; `fatal` has the epoch in which a trial fails.
    """
    alive, fresh = list(range(size)), size
    said: list[Given] = []
    for before, milestone in zip((0, *MILESTONES), MILESTONES, strict=False):
        died = [n for n in alive if before < fatal.get(n, 0) <= milestone]
        ranked = sorted((objective(n, milestone), n) for n in alive if n not in died)
        order = [n for _, n in ranked] + sorted(died)
        count = min(replaced, len(order) // 2)
        best = {n for n in order[:count] if n not in died}
        if not best:
            alive = [n for n in alive if n not in died]
            continue
        losers = order[len(order) - count :]
        alive = [n for n in alive if n not in died and n not in losers]
        for loser in losers:
            said.append((milestone, loser, fresh, best))
            alive.append(fresh)
            fresh += 1
    return said


class Played:
    """A population that trains as it is told, an epoch of somebody at a time."""

    def __init__(self, size: int, replaced: int, fatal: dict[int, int]) -> None:
        self.replaced, self.fatal = replaced, fatal
        self.members = {n: Member(n, "running", 0, {}) for n in range(size)}
        self.history: list[Given] = []

    def verdict(self) -> Verdict:
        """With all that gives way carried out."""
        while True:
            found = judge(
                list(self.members.values()), MILESTONES, epochs=EPOCHS, replaced=self.replaced
            )
            if not found.exploits:
                return found
            first, number = found.exploits[0], len(self.members)
            loser = self.members[first.loser]
            state: Any = "pruned" if loser.state == "running" else loser.state
            self._put(loser, state=state)
            self.members[number] = Member(number, "running", first.epoch, {}, first.loser)
            self.history.append((first.epoch, first.loser, number, set(first.donors)))

    def train(self, number: int) -> None:
        """One epoch."""
        member = self.members[number]
        epoch = member.reached + 1
        if self.fatal.get(number) == epoch:
            self._put(member, state="failed")
            return
        known = member.objectives | {epoch: objective(number, epoch)}
        self._put(member, reached=epoch, objectives=known)
        if epoch == EPOCHS:
            self._put(self.members[number], state="done")

    def _put(self, member: Member, **changes: Any) -> None:
        self.members[member.number] = Member(**(vars(member) | changes))


@pytest.mark.parametrize("seed", range(30))
def test_who_gives_way_does_not_depend_on_who_comes_first(seed: int) -> None:
    random = np.random.default_rng(seed)
    size = int(random.integers(2, 10))
    replaced = int(random.integers(1, size // 2 + 1))
    numbers = range(size + 3 * replaced)
    # None fails, some do, or so many and so early that not all of them can be replaced.
    share, last = ((0.0, 1), (0.2, EPOCHS), (0.7, 4))[seed % 3]
    fatal = {n: int(random.integers(1, last + 1)) for n in numbers if random.random() < share}
    played = Played(size, replaced, fatal)
    while not (verdict := played.verdict()).over:
        turn = verdict.turns[int(random.integers(len(verdict.turns)))]
        assert played.members[turn.number].reached < turn.until
        played.train(turn.number)
    assert played.history == slow_history(size, replaced, fatal)
    ended = [m for m in played.members.values() if m.state == "done"]
    assert all(m.reached == EPOCHS for m in ended)


def test_only_the_worst_wait_for_a_slow_one() -> None:
    played = Played(8, 2, {})
    for number in range(1, 8):  # 0 does not come
        played.train(number)
        played.train(number)
    ranked = sorted(range(1, 8), key=lambda n: objective(n, 2))
    verdict = played.verdict()
    assert {t.number: t.until for t in verdict.turns} == {0: 2} | dict.fromkeys(ranked[:5], 4)
    assert verdict.exploits == ()
    assert verdict.settled == 0


def test_nothing_is_decided_later_while_a_successor_is_missing() -> None:
    members = [
        Member(0, "running", 4, {2: 0.1, 4: 0.1}),  # went on: its fate was certain
        Member(1, "running", 4, {2: 0.2, 4: 0.2}),
        Member(2, "running", 2, {2: 0.3}),
        Member(3, "running", 2, {2: 0.4}),
    ]
    verdict = judge(members, (2, 4), epochs=6, replaced=2)
    assert [(e.epoch, e.loser) for e in verdict.exploits] == [(2, 2), (2, 3)]
    assert (verdict.turns, verdict.settled) == ((), 0), "they may be among the worst at 4"


def test_what_was_decided_stays_though_a_last_digit_changes() -> None:
    members = [
        Member(0, "running", 2, {2: 0.1}),
        Member(1, "running", 2, {2: 0.3}),
        Member(2, "pruned", 2, {2: 0.3 - 1e-7}),  # trained again, and now better by a hair
        Member(3, "running", 2, {}, replaces=2),
    ]
    verdict = judge(members, (2, 4), epochs=6, replaced=1)
    assert verdict.exploits == ()
    assert [turn.number for turn in verdict.turns] == [0, 1, 3]


def test_a_milestone_is_reached_when_its_weights_are_on_disk() -> None:
    members = [Member(0, "running", 2, {2: 0.1}), Member(1, "running", 1, {1: 0.5, 2: 0.4})]
    verdict = judge(members, (2,), epochs=4, replaced=1)
    assert [(turn.number, turn.until) for turn in verdict.turns] == [(1, 2)]


def test_where_all_have_failed_nobody_is_to_succeed() -> None:
    members = [Member(n, "failed", 1, {1: 0.1}) for n in range(4)]
    assert judge(members, (2, 4), epochs=6, replaced=2) == Verdict((), (), 4)


PBT: dict[str, Any] = {"scheduler": "pbt", "population": 4, "trials": 7, "perturbation_epochs": 1}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"search": {"trials": 6}}, "search.trials: 6 trials make no whole population"),
        ({"search": {"population": 9, "trials": 9}}, "are 15"),
        ({"training": {"epochs": 1}}, "training.epochs is 1"),
        ({"search": {"perturbation_epochs": 4}}, "every 4 epochs, and training.epochs is 4"),
        ({"search": {"sampler": "grid"}}, "search.sampler: grid"),
        ({"search": {"sampler": "cmaes"}}, "search.sampler: cmaes"),
        ({"search": {"promote": 1}}, "search.promote: "),
        ({"search": {"cost": "flops"}}, "search.cost: the scheduler pbt judges by"),
        ({"training": {"patience": 2}}, "training.patience: "),
        ({"search": {"quantile": 0.6}}, "search.quantile: got 0.6"),
        ({"search": {"population": 1}}, "search.population: got 1"),
        (
            {"search": {"space": {"network.heads": {"type": "categorical", "choices": [1, 2]}}}},
            "search.space: holds nothing that may change while a network keeps its weights",
        ),
        (
            {"search": {"space": {"training.learning_rate": {"type": "float", "low": 1e-3,
                                                             "high": 1e-3}}}},
            "search.space: holds nothing that may change",
        ),
        (
            {"search": {"space": {"blend.beta": {"type": "float", "low": 0.1, "high": 0.3,
                                                 "step": 0.1}}}},
            "search.population: 4 members, and search.space has 3 points",
        ),
    ],
)  # fmt: skip
def test_a_study_that_is_no_population_is_refused(
    tmp_path: Path, changes: dict[str, dict[str, Any]], words: str
) -> None:
    search = PBT | changes.get("search", {})
    training = {"epochs": 4} | changes.get("training", {})
    with pytest.raises(ConfigError) as caught:
        tiny_study(tmp_path, search=search, training=training)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_refusal_ends_the_command_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_study(tmp_path, search=PBT | {"trials": 3}, training={"epochs": 4})
    assert run_here("--config", config, "--local", "--out", tmp_path / "run") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_what_is_not_asked_of_other_schedulers(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, search={"trials": 1, "population": 8})
    assert study.search.milestones(20) == []
    assert population_note(study) is None


@pytest.mark.parametrize(
    ("epochs", "milestones"), [(2, [1]), (5, [1, 2, 3, 4]), (8, [2, 4, 6]), (27, [6, 12, 18, 24])]
)
def test_a_population_is_compared_four_times_at_most_unless_told_otherwise(
    tmp_path: Path, epochs: int, milestones: list[int]
) -> None:
    search = {"scheduler": "pbt", "trials": 50}
    study = tiny_study(tmp_path, search=search, training={"epochs": epochs})
    assert study.search.milestones(epochs) == milestones
    assert study.search.replaced == 2
    assert study.search.population_trials(epochs) == 8 + 2 * len(milestones)


def test_what_is_kept_is_said_beforehand(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, search=PBT | {"trials": 16}, training={"epochs": 4})
    assert perturbed_paths(study) == ["training.learning_rate", "blend.beta"]
    assert population_note(study) == (
        "pbt: 2 populations, one by one, of 4; after epoch 1, 2, 3 the worst gives way to "
        "successors of the best: 7 trials a population; 2 of 16 trials are left over; successors "
        "keep network.heads"
    )
