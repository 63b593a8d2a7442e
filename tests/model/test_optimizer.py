"""Optimiser, schedule and averaged weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.optimizer import TrainingConfig, WeightAverage, learning_rate, make_optimizer


def test_schedule_warms_up_linearly_and_falls_as_a_cosine_to_its_final_rate() -> None:
    config = TrainingConfig(learning_rate=0.2, warmup_fraction=0.1, final_learning_rate=0.05)
    rates = [learning_rate(config, s, 101) for s in range(101)]
    assert rates[:10] == pytest.approx([0.02 * (s + 1) for s in range(10)])
    assert max(rates) == rates[10] == pytest.approx(0.2)
    half = rates[10 + 91 // 2 : 10 + 91 // 2 + 2]
    assert half[0] > (0.2 + 0.01) / 2 > half[1]
    assert learning_rate(config, 101, 101) == pytest.approx(0.01)
    assert learning_rate(config, 500, 101) == pytest.approx(0.01), "past the end it stays"


def test_no_warm_up_starts_at_the_peak() -> None:
    config = TrainingConfig(learning_rate=0.2, warmup_fraction=0.0)
    assert learning_rate(config, 0, 10) == 0.2
    assert learning_rate(config, 0, 1) == 0.2


def test_only_matrices_and_kernels_decay() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = make_optimizer(network, TrainingConfig(weight_decay=0.5), torch.device("cpu"))
    decayed, kept = optimizer.param_groups
    assert [p.ndim for p in decayed["params"]] == [2]
    assert decayed["weight_decay"] == 0.5
    assert {p.ndim for p in kept["params"]} == {1}
    assert kept["weight_decay"] == 0.0


def test_average_follows_the_written_recursion() -> None:
    network = nn.Linear(2, 1)
    average = WeightAverage(network, 0.5)
    expected = network.weight.detach().clone()
    for step in range(1, 40):
        with torch.no_grad():
            network.weight.add_(float(step))
        average.update(network)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * network.weight.detach()
    torch.testing.assert_close(average.weights["weight"], expected)


def test_decay_zero_is_the_network_itself() -> None:
    network = nn.Linear(2, 1)
    average = WeightAverage(network, 0.0)
    with torch.no_grad():
        network.weight.add_(1.0)
    average.update(network)
    torch.testing.assert_close(average.weights["weight"], network.weight.detach())
