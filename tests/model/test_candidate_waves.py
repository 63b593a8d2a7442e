"""The candidate network where candidates are judged by other models of the waves too."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from model.candidate import CandidateNetwork
from model.decision import judge
from model.features import Features
from model.loss import LossConfig, ScenesLoss
from physics import Scenes, simulate
from physics.candidates import Candidates
from tests.model.test_candidate import (
    ARRAY,
    FAR,
    features_of,
    finite,
    fresh,
    outputs,
    overheard,
    softplus,
)
from tests.tiny import TINY_CANDIDATE, tiny_candidate_config

CANDIDATES = TINY_CANDIDATE["candidates"] | {"waves": ["paraxial", "fresnel"]}


def with_waves(**scene: Any) -> Any:
    scene = {"min_sources": 0, "true_wavefront": "paraxial", "error_levels": "varied"} | scene
    return tiny_candidate_config(scene=scene, network={"candidates": CANDIDATES})


CONFIG = with_waves()


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return simulate(6, CONFIG.scene, ARRAY, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network() -> CandidateNetwork:
    return fresh(CONFIG)


def untrained() -> CandidateNetwork:
    torch.manual_seed(0)
    return CandidateNetwork(CONFIG.network, CONFIG.scene, ARRAY).eval()


def found_in(features: Features) -> Candidates:
    assert features.candidates is not None
    return features.candidates


def test_direction_and_range_are_those_of_all_models_by_their_probability(
    network: CandidateNetwork, scenes: Scenes
) -> None:
    features = features_of(network, scenes, config=CONFIG)
    judgement, p = overheard(network, features)
    found = found_in(features)
    assert p.angle_covariance is not None
    assert judgement.shape == (6, 3, 13)
    moved = 0.0
    for b in range(6):
        ratio = np.clip(found.wave_evidence[b].double().numpy(), -20, 20)
        for i in range(3):
            sharpness, centre, weight, slope, _, log_spread, _, scale, *step = judgement[b, i, :10]
            wave_sharpness, *said = judgement[b, i, 10:]
            logit = np.concatenate([[0.0], softplus(wave_sharpness + 0.54) * ratio + said])
            share = np.exp(logit - logit.max())
            share /= share.sum()
            r = found.range_m[b, i].double().numpy()
            weights = 0.0
            rows = [found.range_evidence[b, i], *found.other_range_evidence[b, i]]
            for row, part in zip(rows, share, strict=True):
                score = softplus(sharpness + 0.54) * row.double().numpy()
                likelihood = np.exp(score - score.max())
                weights = weights + part * likelihood / likelihood.sum()
            prior = slope * np.log(r) - 4 * softplus(weight - 2) * (np.log(r) - 1.5 - centre) ** 2
            weights = weights * np.exp(prior - prior.max())
            weights /= weights.sum()
            np.testing.assert_allclose(p.log_pointer[b, i].exp().detach(), weights, atol=1e-4)
            places = [found.coordinates[b, i], *found.other_coordinates[b, i]]
            mean = sum(
                s * place[:2].double().numpy() for s, place in zip(share, places, strict=True)
            )
            wide = found.covariance[b, i, :2, :2].double().numpy()
            for part, place in zip(share, places, strict=True):
                off = place[:2].double().numpy() - mean
                wide = wide + part * np.outer(off, off)
            wide = math.exp(2 * log_spread) * wide
            np.testing.assert_allclose(
                p.angle_covariance[b, i].detach(), wide, rtol=1e-3, atol=1e-4 * np.abs(wide).max()
            )
            moved = max(moved, float(np.abs(mean - places[0][:2].numpy()).max()))
            std = found.covariance[b, i, :2, :2].diagonal().double().sqrt().numpy()
            std = np.minimum(std, FAR)
            mean = mean + FAR * np.tanh(math.exp(scale) * std * np.array(step) / FAR)
            np.testing.assert_allclose(p.position[b, i, :2].detach(), mean, atol=1e-5)
    assert moved > 1e-3, "some candidate must be moved by what another model says"


def test_before_training_a_model_has_its_posterior_probability() -> None:
    """With even chances: none where it fits far worse, all where it fits far better."""
    S = simulate(40, CONFIG.scene, ARRAY, generator=torch.Generator().manual_seed(1))
    network = untrained()
    features = features_of(network, S, config=CONFIG)
    found = found_in(features)
    away = torch.zeros(40, 3, 2, 2) + torch.tensor([[0.1, 0.2], [-0.3, 0.1]])
    direction = found.coordinates[..., :2]
    places = torch.cat([direction.unsqueeze(2) + away, found.other_coordinates[..., 2:]], -1)
    for evidence, expected in (
        ([-1e4, -1e4], direction),
        ([1e4, -1e4], direction + away[..., 0, :]),
        ([-1e4, 1e4], direction + away[..., 1, :]),
        ([0.0, 0.0], direction + away.sum(2) / 3.0),
        # softplus(0.54) is not quite 1.
        ([math.log(2.0), -1e4], direction + away[..., 0, :] * 2.0 / 3.0),
    ):
        other = torch.tensor(evidence).expand(40, 2)
        told = replace(found, wave_evidence=other, other_coordinates=places)
        p = network(replace(features, candidates=told))
        torch.testing.assert_close(p.position[..., :2], expected, rtol=0, atol=1e-4)


def test_what_another_model_says_is_read(network: CandidateNetwork, scenes: Scenes) -> None:
    features = features_of(network, scenes, config=CONFIG)
    found = found_in(features)
    before = network(features).existence
    for name in ("other_coordinates", "other_evidence", "other_range_evidence", "wave_evidence"):
        value = found.tensors()[name]
        generator = torch.Generator().manual_seed(0)
        changed = value * (1.0 + torch.rand(value.shape, generator=generator))
        told = replace(features, candidates=replace(found, **{name: changed}))
        assert not torch.allclose(network(told).existence, before), name


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("what", ["zero channel", "zero snapshots", "constant", "plain"])
def test_ugly_scenes_give_finite_output_and_gradient(what: str, known: bool) -> None:
    config = with_waves(source_mode="constant" if what == "constant" else "fluctuating")
    network = fresh(config)
    S = simulate(4, config.scene, ARRAY, generator=torch.Generator().manual_seed(1))
    S = replace(S, H=0 * S.H) if what == "zero channel" else S
    S = replace(S, y=0 * S.y) if what == "zero snapshots" else S
    level = S.known_snr_db if known else torch.full((4,), math.nan)
    features = features_of(network, S, level, config, told=known)
    p = network(features)
    assert finite(outputs(p))
    assert finite(list(vars(judge(p, "f1")).values()))
    loss = ScenesLoss(
        LossConfig(), ARRAY, config.scene.wavefront, network.dictionary, network.cell_size
    )
    loss(p, p.covariance, S).total.backward()
    grads = [q.grad for q in network.parameters()]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in grads)
    if what in ("constant", "plain"):
        assert network.judgement.weight.grad is not None
        assert bool((network.judgement.weight.grad[10:].abs().amax(1) > 0).all()), "of the waves"


@pytest.mark.parametrize("value", [0.0, 1e20, -1e20])
def test_differences_of_any_size_are_judged(
    network: CandidateNetwork, scenes: Scenes, value: float
) -> None:
    features = features_of(network, scenes, config=CONFIG)
    found = found_in(features)
    told = replace(
        found,
        wave_evidence=torch.full_like(found.wave_evidence, value),
        other_evidence=torch.full_like(found.other_evidence, value),
        other_range_evidence=torch.full_like(found.other_range_evidence, value),
        covariance=torch.zeros_like(found.covariance),
    )
    assert finite(outputs(network(replace(features, candidates=told))))


def test_the_nominal_model_is_no_other() -> None:
    with pytest.raises(ValueError, match="paraxial stands there twice"):
        with_waves(wavefront="paraxial", true_wavefront=None)
