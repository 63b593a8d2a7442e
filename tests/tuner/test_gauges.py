"""What is told to Ray's metrics; tests/tuner/test_distributed.py scrapes them from a real Ray."""

from __future__ import annotations

import math
import time
from collections import Counter as Tally
from pathlib import Path
from typing import Any

import pytest
import torch

from model.training import Trainer
from tests.tuner.support import order, wait_for
from tuner import gauges, trainable
from tuner.gauges import COUNTERS, GAUGES, PREFIX, TrialGauges
from tuner.trainable import CHECKPOINT, RESUME, TrialActor
from tuner.trial import TrialRun

Series = tuple[str, str, str]  # name, study, trial


class Told:
    """In place of Ray's metrics: what each series was told last, and all that was counted."""

    def __init__(self) -> None:
        self.made: Tally[str] = Tally()
        self.gauges: dict[Series, float] = {}
        self.counts: Tally[Series] = Tally()

    def metric(self, name: str, description: str, tag_keys: tuple[str, ...]) -> Any:
        told = self

        class Metric:
            def set(self, value: float, tags: dict[str, str]) -> None:
                assert set(tags) == set(tag_keys)
                told.gauges[name.removeprefix(PREFIX), tags["study"], tags["trial"]] = value

            def inc(self, value: int, tags: dict[str, str]) -> None:
                assert set(tags) == set(tag_keys)
                assert value > 0  # Ray refuses others
                told.counts[name.removeprefix(PREFIX), tags["study"], tags["trial"]] += value

        assert description
        self.made[name] += 1
        return Metric()


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    monkeypatch.setattr("ray.tune.trainable.trainable.DEFAULT_STORAGE_PATH", str(tmp_path / "ray"))
    found = Told()
    monkeypatch.setattr(gauges, "Gauge", found.metric)
    monkeypatch.setattr(gauges, "Counter", found.metric)
    own = TrialGauges()
    monkeypatch.setattr(trainable, "trial_gauges", lambda: own)
    return found


def of(trial: str, told: dict[Series, float] | Tally[Series]) -> dict[str, float]:
    """What is told of one trial of the tiny study."""
    return {name: value for (name, *labels), value in told.items() if labels == ["tiny", trial]}


FALLING_BACK = {"solver": "gram", "regularization": 0.0}  # fewer antennas than elements
DIVERGING = {"learning_rate": 1e30, "gradient_clip": 1e30, "max_skipped_steps": 1}


def test_every_metric_is_made_once_a_process() -> None:
    assert gauges.trial_gauges() is gauges.trial_gauges()


def test_a_trial_shows_what_it_last_reported(tmp_path: Path, told: Told) -> None:
    actor = TrialActor(order(tmp_path, 7))
    assert of("trial-0007", told.gauges) == {"epoch": 0}
    for _ in range(2):
        result = actor.train()
    shown = of("trial-0007", told.gauges)
    assert shown == {name: result[name] for name in GAUGES if name != "gpu_memory_bytes"}
    assert shown["epoch"] == 2
    assert set(told.made) == {PREFIX + name for name in [*GAUGES, *COUNTERS]}
    assert set(told.made.values()) == {1}


def test_a_reused_actor_speaks_of_its_present_trial_only(tmp_path: Path, told: Told) -> None:
    actor = TrialActor(order(tmp_path, 1, tikhonov=FALLING_BACK))
    first = actor.train()
    assert actor.reset(order(tmp_path, 2, tikhonov=FALLING_BACK))
    before = of("trial-0001", told.gauges)
    told.gauges.clear()
    second = actor.train()
    assert before["epoch"] == 1
    assert of("trial-0001", told.gauges) == {}
    assert of("trial-0002", told.gauges)["objective"] == second["objective"]
    assert of("trial-0001", told.counts) == {"solver_fallbacks": first["solver_fallbacks"]}
    assert of("trial-0002", told.counts) == {"solver_fallbacks": second["solver_fallbacks"]}
    assert first["solver_fallbacks"] > 0


def test_nothing_is_said_of_a_trial_that_has_ended(tmp_path: Path, told: Told) -> None:
    actor = TrialActor(order(tmp_path, 1))
    actor.train()
    wait_for(lambda: bool(told.gauges))
    actor.cleanup()
    told.gauges.clear()
    time.sleep(1.5 * gauges._REFRESH_SECONDS)
    assert told.gauges == {}


def test_a_long_epoch_keeps_what_was_shown(tmp_path: Path, told: Told) -> None:
    actor = TrialActor(order(tmp_path, 1))
    result = actor.train()
    told.gauges.clear()
    wait_for(lambda: len(told.gauges) == len(GAUGES) - 1, timeout=10)
    assert of("trial-0001", told.gauges)["objective"] == result["objective"]


def test_counters_count_what_is_new_not_what_a_checkpoint_brings(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.run_epoch

    def skipping(self: Trainer) -> dict[str, Any]:
        self.skipped_steps += 2
        return dict(original(self))

    monkeypatch.setattr(Trainer, "run_epoch", skipping)
    epochs = {"epochs": 3}
    first = TrialActor(order(tmp_path, 1, training=epochs))
    results = [first.train() for _ in range(2)]
    assert [result["skipped_steps"] for result in results] == [2, 4]
    assert of("trial-0001", told.counts) == {"skipped_steps": 4}
    first.cleanup()
    told.counts.clear()
    told.gauges.clear()
    resumed = order(tmp_path, 1, training=epochs) | {RESUME: results[-1][CHECKPOINT]}
    again = TrialActor(resumed)
    assert of("trial-0001", told.gauges) == {"epoch": 2}
    assert again.train()["skipped_steps"] == 6
    assert of("trial-0001", told.counts) == {"skipped_steps": 2}


def test_a_trial_that_diverges_has_its_skipped_steps_counted(tmp_path: Path, told: Told) -> None:
    actor = TrialActor(order(tmp_path, 1, training=DIVERGING))
    while not (result := actor.train())["done"]:
        pass
    assert result["failed"]
    assert of("trial-0001", told.counts) == {"skipped_steps": 1}
    assert all(math.isfinite(value) for value in told.gauges.values())


def test_a_gpus_memory_is_the_largest_of_each_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The trainer stays on the CPU; what CUDA would be asked is answered here.
    peak = {"now": 0}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.update(now=0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak["now"])
    run = TrialRun(order(tmp_path, 1)["config"], "cuda")
    monkeypatch.setattr("tuner.trial.Trainer", OneEpoch(peak, [300, 200]))
    assert [run.step()["gpu_memory_bytes"] for _ in range(2)] == [300, 200]


class OneEpoch:
    """A trainer that does nothing but use memory."""

    finished, epoch, skipped_steps = False, 1, 0

    def __init__(self, peak: dict[str, int], uses: list[int]) -> None:
        self._peak, self._uses = peak, uses

    def __call__(self, config: Any, device: str) -> OneEpoch:
        return self

    def run_epoch(self) -> dict[str, float]:
        self._peak["now"] = max(self._peak["now"], self._uses.pop(0))
        return {"objective": 1.0}
