from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from model import cost
from model.config import TrialConfig
from model.cost import forward_flops
from model.training import Trainer
from tests.tuner.support import TINY, merged


def trainer(seed: int = 0, **network: Any) -> Trainer:
    sections = ("array", "scene", "data", "network", "training")
    data = merged({name: TINY[name] for name in sections}, {"network": network, "seed": seed})
    if "family" in network:
        data["network"] = network
    if network.get("family") == "candidate":
        data["network"]["candidates"] = {"count": 2}
    return Trainer(TrialConfig.model_validate(data))


def flops(of: Trainer, n_scenes: int = 1) -> int:
    return forward_flops(of.network, of._features(of.source.validation()[slice(0, n_scenes)]))


def products_of_encoder(network: nn.Module, tokens: int) -> int:
    """What a transformer encoder multiplies, layer by layer, written down from its definition."""
    total = 0
    for layer in network.encoder.layers:  # type: ignore[union-attr]
        width, hidden = layer.linear1.in_features, layer.linear1.out_features
        total += 4 * tokens * width * width  # to queries, keys and values, and out again
        total += 2 * tokens * tokens * width  # scores, and values weighted by them
        total += 2 * tokens * width * hidden
    return 2 * total


def test_two_layers_more_cost_what_their_products_cost() -> None:
    thin, deep = (trainer(family="candidate", width=8, heads=2, depth=d) for d in (1, 3))
    tokens: list[int] = []
    deep.network.encoder.register_forward_hook(  # type: ignore[union-attr]
        lambda module, given, out: tokens.append(out.shape[1])
    )
    more = flops(deep) - flops(thin)
    layers = [products_of_encoder(one.network, tokens[0]) for one in (thin, deep)]
    assert more == layers[1] - layers[0]


@pytest.mark.parametrize("family", ["snapshot", "image", "candidate"])
def test_the_number_follows_from_shapes_alone(family: str) -> None:
    sizes = {"family": family, "width": 8, "depth": 1}
    first, other = trainer(0, **sizes), trainer(7, **sizes)
    assert flops(first) > 0
    assert flops(first) == flops(other) == flops(first, 3)
    state = torch.get_rng_state()
    first.network.train()
    flops(first)
    assert torch.equal(torch.get_rng_state(), state), "a trial would go on differently"
    assert first.network.training
    assert all(parameter.grad is None for parameter in first.network.parameters())


def test_every_epoch_reports_it() -> None:
    one = trainer()
    metrics = one.run_epoch()
    assert metrics["flops"] == flops(one)


def test_networks_of_one_shape_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[nn.Module] = []

    def counting(network: Any, features: Any) -> int:
        counted.append(network)
        return forward_flops(network, features)

    monkeypatch.setattr(cost, "_COUNTED", {})
    monkeypatch.setattr(cost, "forward_flops", counting)
    one, other = trainer(0, dropout=0.0), trainer(7, dropout=0.2)
    wider = trainer(0, width=16)
    found = [of.run_epoch()["flops"] for of in (one, other, wider)]
    assert found == [flops(of) for of in (one, other, wider)]
    assert counted == [one.network, wider.network]
