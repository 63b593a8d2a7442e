"""A training whose host is ahead of its device is the training that it would be otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from model import Trainer, TrialConfig, TrialDiverged
from model.ahead import Look, delayed
from physics import simulate
from tests.model.test_step_sizes import NETWORKS
from tests.tiny import TINY, tiny_config


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("index", range(max(1, torch.cuda.device_count())))
def test_a_look_waits_for_its_values_on_every_gpu(index: int) -> None:
    with torch.cuda.device(index):
        values = torch.zeros(3, device="cuda")
        torch.cuda._sleep(50_000_000)
        values += 7.0
    look = Look(values)
    values += 1.0
    assert look.read() == [7.0] * 3


def trainer(ahead: int, family: str = "snapshot", **training: Any) -> Trainer:
    """With an optimiser that decides on its own whether to step."""
    sections = TINY | {
        "scene": TINY["scene"] | {"n_antennas": 6, "n_snapshots": 6},
        "network": NETWORKS[family],
        "training": TINY["training"] | training,
    }
    made = Trainer(TrialConfig.model_validate(sections))
    made.optimizer = torch.optim.AdamW(
        made.network.parameters(), lr=made.config.training.learning_rate, fused=True
    )
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


@pytest.mark.parametrize("family", ["candidate", "image", "snapshot"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("keys", [[], ["y"], ["power"]], ids=["sound", "fallback", "skipped"])
def test_it_ends_where_one_that_waits_for_every_step_does(
    keys: list[str], accumulation: int, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, keys, slice(30, 31))  # a scene of the second batch, none to validate
    one, two = (trainer(ahead, family, accumulation=accumulation) for ahead in (0, 1))
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


def test_only_the_parts_that_the_svd_has_to_help_are_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoiled(monkeypatch, ["y"], slice(30, 31))
    ahead = trainer(1, accumulation=4)
    trusted: list[bool] = []
    features = ahead._features

    def noting(part: Any, *, trusting: bool = False) -> Any:
        trusted.append(trusting)
        return features(part, trusting=trusting)

    monkeypatch.setattr(ahead, "_features", noting)
    ahead._train_epoch()
    assert (trusted.count(True), trusted.count(False)) == (12, 1)


def test_a_scaler_learns_the_same_beside_an_optimizer_that_decides_itself() -> None:
    """In fp16 as it is trained on a GPU without bf16: the first steps overflow."""
    trainers = []
    for fused in (False, True):
        made = Trainer(tiny_config(training={"epochs": 20}, network={"dropout": 0.0}))
        made.amp.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=3)
        rate = made.config.training.learning_rate
        made.optimizer = torch.optim.AdamW(made.network.parameters(), lr=rate, fused=fused)
        trainers.append(made)
    plain, fused_one = trainers
    for _ in range(3):
        expected, found = plain.run_epoch(), fused_one.run_epoch()
        assert found["skipped_steps"] == expected["skipped_steps"] > 0
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert fused_one.amp.state_dict() == plain.amp.state_dict()
    steps = [int(entry["step"]) for entry in fused_one.optimizer.state_dict()["state"].values()]
    assert set(steps) == {fused_one.step - fused_one.skipped_steps}
    assert not hasattr(fused_one.optimizer, "found_inf")
