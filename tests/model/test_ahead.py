"""A training whose host is ahead of its device is the training that it would be otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from model import Trainer, TrialDiverged
from model.ahead import Look, delayed
from model.optimizer import make_optimizer
from physics import simulate
from tests.tiny import tiny_config


@pytest.mark.parametrize("by", [0, 1, 3, 9])
def test_each_item_comes_when_more_have_been_made(by: int) -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for item in range(5):
            made.append(item)
            yield item

    seen = [(item, len(made)) for item in delayed(items(), by)]
    assert seen == [(item, min(5, item + 1 + by)) for item in range(5)]


def test_a_look_returns_what_the_values_were() -> None:
    assert Look(torch.tensor([1.5, math.inf, -2.0])).read() == [1.5, math.inf, -2.0]


def trainer(ahead: int, **training: Any) -> Trainer:
    """With an optimiser that decides on its own whether to step."""
    made = Trainer(tiny_config(training={"epochs": 2} | training))
    made.optimizer = make_optimizer(made.network, made.config.training, torch.device("meta"))
    assert made.optimizer.defaults["fused"]
    made._ahead = ahead
    return made


def spoiled(monkeypatch: pytest.MonkeyPatch, keys: list[str], scenes: slice) -> None:
    """Simulated scenes of which some hold NaN."""

    def broken(*arguments: Any, **options: Any) -> Any:
        made = simulate(*arguments, **options)
        bad = {key: getattr(made, key).clone() for key in keys}
        for value in bad.values():
            value[scenes] = math.nan
        return replace(made, **bad)

    monkeypatch.setattr("model.plugin.simulate", broken)


def assert_same(one: Trainer, two: Trainer) -> None:
    for a, b in zip(one.network.parameters(), two.network.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, value in one.average.weights.items():
        assert torch.equal(value, two.average.weights[name])
    assert (one.step, one.skipped_steps) == (two.step, two.skipped_steps)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("keys", [[], ["y"], ["power"]], ids=["sound", "fallback", "skipped"])
def test_it_ends_where_one_that_waits_for_every_step_does(
    keys: list[str], accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, keys, slice(20, 21))  # a scene of the second batch
    one, two = (trainer(ahead, accumulation=accumulation) for ahead in (0, 1))
    for _ in range(2):
        expected, found = one.run_epoch(), two.run_epoch()
        for times in ("scenes_per_second", "epoch_seconds"):
            del expected[times], found[times]
        assert found == expected
        assert found["solver_fallbacks"] == (keys == ["y"])
    assert one.skipped_steps == 2 * (keys == ["power"])
    assert_same(one, two)


def test_the_next_step_is_asked_for_before_one_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ahead = trainer(1)
    done: list[str] = []
    read = Look.read

    def noting(look: Look) -> list[float]:
        done.append("look at features" if len(look._values) == 1 else "look at step")
        return read(look)

    monkeypatch.setattr(Look, "read", noting)
    for name in ("_prepared", "_train_step"):
        original = getattr(ahead, name)

        def noted(argument: Any, of: Any = original, name: str = name) -> Any:
            made = of(argument)
            done.append(name)
            return made

        monkeypatch.setattr(ahead, name, noted)
    ahead._train_epoch()
    assert ahead.steps_per_epoch == 3
    assert done == [
        "_prepared", "_prepared", "look at features", "_train_step",
        "_prepared", "look at features", "_train_step", "look at step",
        "look at features", "_train_step", "look at step", "look at step",
    ]  # fmt: skip


def test_a_run_of_skipped_steps_ends_it_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled(monkeypatch, ["power"], slice(None))
    with pytest.raises(TrialDiverged, match="2 non-finite steps in a row in epoch 1"):
        trainer(1, max_skipped_steps=2).run_epoch()


def test_an_optimizer_that_decides_itself_leaves_all_as_it_was_where_a_step_is_not_finite() -> None:
    fused = trainer(1)
    batches = list(fused.source.train_batches(0, 16, 0))
    fused._train_step(fused._prepared(batches[0]))
    state = fused.optimizer.state_dict()["state"]
    before = [p.detach().clone() for p in fused.network.parameters()]
    moments = {i: {k: v.clone() for k, v in entry.items()} for i, entry in state.items()}
    batches[1].scenes.power[3] = math.nan
    step = fused._train_step(fused._prepared(batches[1]))
    assert step.outcome().skipped
    for parameter, kept in zip(fused.network.parameters(), before, strict=True):
        assert torch.equal(parameter, kept)
    for index, entry in fused.optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            assert torch.equal(value, moments[index][key]), key
