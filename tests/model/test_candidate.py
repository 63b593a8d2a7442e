"""The candidate network: what it says, against NumPy, and what it must not depend on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.candidate import CandidateNetwork, CandidateNetworkConfig
from model.decision import judge
from model.features import Features, compute_features
from model.loss import LossConfig, ScenesLoss
from model.pointing import OwnCells
from model.prediction import Prediction
from physics import Scenes, simulate, steering_vector
from physics.candidates import find_candidates
from tests.tiny import tiny_candidate_config

CONFIG = tiny_candidate_config(scene={"min_sources": 0})
ARRAY = CONFIG.array.build()
FAR = math.radians(9.0)  # that a direction is moved at most


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return simulate(6, CONFIG.scene, ARRAY, generator=torch.Generator().manual_seed(0))


def fresh(config: Any = CONFIG) -> CandidateNetwork:
    torch.manual_seed(0)
    network = CandidateNetwork(config.network, config.scene, ARRAY).eval()
    with torch.no_grad():  # a judgement that is not 0
        network.judgement.weight.normal_(0.0, 0.3)
        network.judgement.bias.normal_(0.0, 0.3)
    return network


@pytest.fixture(scope="module")
def network() -> CandidateNetwork:
    return fresh()


def features_of(
    network: CandidateNetwork,
    scenes: Scenes,
    snr_db: Tensor | None = None,
    config: Any = CONFIG,
    told: bool = True,
) -> Features:
    level = scenes.known_snr_db if snr_db is None else snr_db
    found = find_candidates(
        scenes.y,
        scenes.H,
        scenes.codes,
        array=ARRAY,
        scene=config.scene,
        snr_db=level if told else None,
        config=config.network.candidates,
    )
    return compute_features(
        scenes.y,
        scenes.H,
        scenes.codes,
        level,
        dictionary=network.dictionary,
        tikhonov=config.tikhonov,
        candidates=found,
        spectra=CandidateNetworkConfig().spectra,
    )


def outputs(p: Prediction) -> list[Tensor]:
    assert p.cells is not None
    assert p.angle_covariance is not None
    assert p.range_spread is not None
    return [
        torch.view_as_real(p.factor), p.existence, p.log_pointer, p.position, p.cells,
        p.angle_covariance, p.range_spread,
    ]  # fmt: skip


def finite(values: list[Tensor]) -> bool:
    return all(bool(torch.isfinite(v).all()) for v in values)


def softplus(x: Any) -> Any:
    return np.log1p(np.exp(x))


def test_a_slot_is_a_candidate_with_cells_of_its_own(
    network: CandidateNetwork, scenes: Scenes
) -> None:
    features = features_of(network, scenes)
    p = network(features)
    found = features.candidates
    assert found is not None
    assert p.cells is not None
    assert p.factor.shape == (6, 36, 3)
    assert p.factor.dtype == torch.complex64
    assert p.existence.shape == (6, 3)
    assert p.log_pointer.shape == (6, 3, 6)
    assert p.cells.shape == (6, 3, 6, 3)
    assert torch.equal(p.cells[..., 2], found.range_m)
    assert torch.equal(p.cells[:, :, 4, :2], p.position[..., :2])
    assert torch.equal(p.cells[:, :, 0, :2], p.position[..., :2])
    assert p.angle_covariance.shape == (6, 3, 2, 2)
    assert p.range_spread.shape == (6, 3)
    assert p.position.shape == (6, 3, 3)
    torch.testing.assert_close(p.covariance.trace(), torch.full((6,), 36.0))
    torch.testing.assert_close(p.log_pointer.exp().sum(-1), torch.ones(6, 3))


def overheard(network: CandidateNetwork, features: Features) -> tuple[Any, Prediction]:
    """The judgement (B, P, J) of candidates, and the prediction that came of it."""
    seen: list[Tensor] = []
    hook = network.judgement.register_forward_hook(lambda *call: seen.append(call[-1]))
    try:
        p = network(features)
    finally:
        hook.remove()
    return seen[0].detach().double().numpy(), p


def test_pointer_power_and_factor_are_those_that_the_judgement_asks_for(
    network: CandidateNetwork, scenes: Scenes
) -> None:
    features = features_of(network, scenes)
    judgement, p = overheard(network, features)
    assert np.abs(judgement).max() > 0.1
    found = features.candidates
    assert found is not None
    assert p.cells is not None
    for b in range(6):
        columns = []
        for i in range(3):
            sharpness, centre, weight, slope, log_power, log_spread, log_interval, *steps = (
                judgement[b, i]
            )
            r = found.range_m[b, i].double().numpy()
            score = softplus(sharpness + 0.54) * found.range_evidence[b, i].double().numpy()
            score = score + slope * np.log(r)
            score = score - 4 * softplus(weight - 2) * (np.log(r) - 1.5 - centre) ** 2
            w = np.exp(score - score.max())
            w /= w.sum()
            np.testing.assert_allclose(p.log_pointer[b, i].exp().detach(), w, atol=1e-4)
            mean = (w / r).sum()
            assert p.position[b, i, 2].item() == pytest.approx(mean, rel=1e-3)
            std = found.covariance[b, i, :2, :2].diagonal().sqrt().numpy()
            step = math.exp(steps[0]) * np.minimum(std, FAR) * np.array(steps[1:])
            moved = found.coordinates[b, i, :2].numpy() + FAR * np.tanh(step / FAR)
            np.testing.assert_allclose(p.position[b, i, :2].detach(), moved, atol=1e-6)
            np.testing.assert_allclose(p.cells[b, i, 3, :2].detach(), moved, atol=1e-6)
            wide = math.exp(2 * log_spread) * found.covariance[b, i, :2, :2]
            torch.testing.assert_close(p.angle_covariance[b, i], wide, rtol=1e-4, atol=0.0)
            assert p.range_spread[b, i].item() == pytest.approx(math.exp(log_interval), rel=1e-4)
            a = steering_vector(p.cells[b, i].detach().double(), ARRAY).numpy()
            q = 1 / (1 + math.exp(-p.existence[b, i].item()))
            power = max(float(found.power[b, i]), 1e-9) * math.exp(log_power)
            columns.append(math.sqrt(q * power) * (w @ a))
        expected = np.stack(columns, axis=1)
        factor = p.factor[b].detach().numpy()
        factor = factor * np.linalg.norm(expected) / np.linalg.norm(factor)
        np.testing.assert_allclose(factor, expected, atol=1e-3 * np.abs(expected).max())


def test_before_training_the_likelihood_of_range_counts_as_it_is(scenes: Scenes) -> None:
    torch.manual_seed(0)
    plain = CandidateNetwork(CONFIG.network, CONFIG.scene, ARRAY).eval()
    features = features_of(plain, scenes)
    found = features.candidates
    assert found is not None
    log_range = found.range_m.log()
    # A weak prior around exp(1.5) m, 4 softplus(-2) of the squared distance.
    prior = -4 * math.log1p(math.exp(-2)) * (log_range - 1.5).square()
    expected = torch.log_softmax(found.range_evidence + prior, -1)
    pointer = plain(features).log_pointer.exp().detach()
    assert float((pointer - expected.exp()).abs().max()) < 5e-3


def test_before_training_a_direction_is_the_pursuits(scenes: Scenes) -> None:
    torch.manual_seed(0)
    plain = CandidateNetwork(CONFIG.network, CONFIG.scene, ARRAY).eval()
    features = features_of(plain, scenes)
    found = features.candidates
    assert found is not None
    assert torch.equal(plain(features).position[..., :2], found.coordinates[..., :2])


def test_directions_learn_to_step_towards_their_sources(scenes: Scenes) -> None:
    """Sources a standard deviation to one side, as a wrong model shifts them."""
    torch.manual_seed(0)
    network = CandidateNetwork(CONFIG.network, CONFIG.scene, ARRAY)
    features = features_of(network, scenes)
    found = features.candidates
    assert found is not None
    std = torch.full_like(found.coordinates[..., :2], math.radians(2.0))
    found = replace(found, covariance=torch.diag_embed(torch.nn.functional.pad(std, (0, 1)) ** 2))
    features = replace(features, candidates=found)
    truth = found.coordinates.clone()
    truth[..., 0] += std[..., 0]
    truth[..., 2].reciprocal_()
    source = torch.arange(3).expand(6, 3)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(60):
        p = network(features)
        assert p.cells is not None
        optimizer.zero_grad()
        OwnCells(p, p.cells, truth).loss(source).mean().backward()
        optimizer.step()
    off = (network(features).position - truth)[..., :2].detach()
    assert float(off.abs().mean()) < 0.2 * math.radians(2.0)


def test_inputs_are_of_order_one(network: CandidateNetwork, scenes: Scenes) -> None:
    seen: list[Tensor] = []
    hook = network.token.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        for level in (None, torch.full((6,), math.nan), torch.full((6,), math.inf)):
            network(features_of(network, scenes, level, told=level is None))
    finally:
        hook.remove()
    inputs = torch.cat(seen)
    assert finite([inputs])
    assert float(inputs.abs().max()) < 20
    assert float(inputs.square().mean().sqrt()) < 3
    # Candidates of a scene, and scenes, differ in what is said of them.
    assert float(inputs.std(1).mean()) > 0.1
    assert float(inputs.std(0).mean()) > 0.1


def test_scenes_of_a_batch_do_not_see_one_another(
    network: CandidateNetwork, scenes: Scenes
) -> None:
    whole = outputs(network(features_of(network, scenes)))
    order = torch.tensor([4, 0, 5, 2])
    some = outputs(network(features_of(network, scenes[order])))
    alone = outputs(network(features_of(network, scenes[order[:1]])))
    for one, two, three in zip(whole, some, alone, strict=True):
        torch.testing.assert_close(one[order], two, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(one[order[:1]], three, rtol=1e-3, atol=1e-4)


def test_candidates_of_a_scene_see_one_another(network: CandidateNetwork, scenes: Scenes) -> None:
    features = features_of(network, scenes)
    found = features.candidates
    assert found is not None
    evidence = found.evidence.clone()
    evidence[:, 2] += 30.0
    changed = replace(features, candidates=replace(found, evidence=evidence))
    one, two = (network(f).existence.detach() for f in (features, changed))
    assert float((one - two)[:, :2].abs().max()) > 1e-3


@pytest.mark.parametrize(("scale_y", "scale_h"), [(1e12, 1.0), (1.0, 1e-12), (1e-12, 1e12)])
def test_scale_of_channel_and_measurement_changes_nothing(
    network: CandidateNetwork, scenes: Scenes, scale_y: float, scale_h: float
) -> None:
    scaled = replace(scenes, y=scenes.y * scale_y, H=scenes.H * scale_h)
    one, two = (outputs(network(features_of(network, s))) for s in (scenes, scaled))
    for a, b in zip(one, two, strict=True):
        # Rounding of the scaled input, through the steps of the fit.
        torch.testing.assert_close(a, b, rtol=2e-2, atol=5e-3)


def test_snr_is_used_and_may_be_unknown_or_without_end(
    network: CandidateNetwork, scenes: Scenes
) -> None:
    features = features_of(network, scenes)
    found = []
    for level in (0.0, 20.0, math.nan, -math.inf, math.inf):
        p = network(replace(features, snr_db=torch.full((6,), level)))
        assert finite(outputs(p))
        found.append(p.existence)
    for one, two in ((0, 1), (0, 2), (0, 3), (1, 4)):
        assert not torch.allclose(found[one], found[two])
    for level, without_end in ((-30.0, found[3]), (50.0, found[4])):
        p = network(replace(features, snr_db=torch.full((6,), level)))
        assert torch.equal(p.existence, without_end), "beyond these levels nothing changes"


@pytest.mark.parametrize("variance", [0.0, 1e30])
def test_errors_of_no_size_or_any_are_judged(
    network: CandidateNetwork, scenes: Scenes, variance: float
) -> None:
    features = features_of(network, scenes)
    found = features.candidates
    assert found is not None
    covariance = torch.full_like(found.covariance, variance)
    p = network(replace(features, candidates=replace(found, covariance=covariance)))
    assert finite(outputs(p))
    limit = torch.full_like(found.covariance, 1e2 if variance else 1e-10)
    q = network(replace(features, candidates=replace(found, covariance=limit)))
    assert torch.equal(p.existence, q.existence)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    "what", ["zero channel", "zero snapshots", "both", "one snapshot", "planar", "constant"]
)
def test_ugly_scenes_give_finite_output_and_gradient(what: str, known: bool) -> None:
    sections: dict[str, Any] = {"scene": {"min_sources": 0}}
    if what == "one snapshot":  # of 8 real observations one source takes 5 parameters
        sections = {
            "scene": {"n_snapshots": 1, "max_sources": 1},
            "network": {"candidates": {"count": 1, "range_cells": 2}},
        }
    elif what in ("planar", "constant"):
        sections["scene"]["wavefront" if what == "planar" else "source_mode"] = what
    config = tiny_candidate_config(**sections)
    network = fresh(config)
    S = simulate(4, config.scene, ARRAY, generator=torch.Generator().manual_seed(1))
    if what in ("zero channel", "both"):
        S = replace(S, H=0 * S.H)
    if what in ("zero snapshots", "both"):
        S = replace(S, y=0 * S.y)
    level = S.known_snr_db if known else torch.full((4,), math.nan)
    features = features_of(network, S, level, config, told=known)
    p = network(features)
    assert finite(outputs(p))
    for goal in ("f1", "gospa", "count"):
        assert finite(list(vars(judge(p, goal)).values()))
    loss = ScenesLoss(
        LossConfig(), ARRAY, config.scene.wavefront, network.dictionary, network.cell_size
    )
    loss(p, p.covariance, S).total.backward()
    grads = [q.grad for q in network.parameters()]
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in grads)


@pytest.mark.parametrize("existence", [-200.0, 200.0, "one"])
def test_gradients_are_finite_where_existence_is_extreme(scenes: Scenes, existence: Any) -> None:
    network = fresh()
    features = features_of(network, scenes)
    with torch.no_grad():
        network.existence.weight.zero_()
        if existence == "one":  # of the strongest inputs, so that slots differ by hundreds
            network.existence.weight.normal_(0.0, 100.0)
        else:
            network.existence.bias.fill_(existence)
    p = network(features)
    assert float(p.existence.detach().abs().max()) > 150
    assert finite(outputs(p))
    loss = ScenesLoss(LossConfig(), ARRAY, "spherical", network.dictionary, network.cell_size)
    value = loss(p, p.covariance, scenes)
    value.total.backward()
    assert bool(torch.isfinite(value.total))
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
    # However unlikely all of them are, R_pred says how the sources share its trace.
    torch.testing.assert_close(p.covariance.trace(), torch.full((6,), 36.0))


def test_every_parameter_gets_a_gradient_from_the_whole_loss(scenes: Scenes) -> None:
    network = fresh()
    p = network(features_of(network, scenes))
    loss = ScenesLoss(LossConfig(), ARRAY, "spherical", network.dictionary, network.cell_size)
    loss(p, p.covariance, scenes).total.backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name
    assert network.judgement.weight.grad is not None
    assert bool((network.judgement.weight.grad.abs().amax(1) > 0).all()), "of every judgement"


def test_what_leaves_under_autocast_is_in_full_precision(
    network: CandidateNetwork, scenes: Scenes
) -> None:
    features = features_of(network, scenes)
    exact = network(features).existence.detach()
    with torch.autocast("cpu", torch.bfloat16):
        p = network(features)
    for value in (p.existence, p.log_pointer, p.position):
        assert value.dtype == torch.float32
    assert p.factor.dtype == torch.complex64
    # bfloat16 keeps 8 bits.
    assert 0 < float((p.existence.detach() - exact).abs().max()) < 0.2


def test_features_without_candidates_are_refused(network: CandidateNetwork, scenes: Scenes) -> None:
    features = replace(features_of(network, scenes), candidates=None)
    with pytest.raises(ValueError, match="features hold no candidates"):
        network(features)


def test_no_scenes_are_judged(network: CandidateNetwork, scenes: Scenes) -> None:
    p = network(features_of(network, scenes[slice(0, 0)]))
    assert p.factor.shape == (0, 36, 3)
    assert p.existence.shape == (0, 3)


def test_sizes_come_from_the_configuration() -> None:
    def count(**changes: Any) -> int:
        config = CandidateNetworkConfig.model_validate(CONFIG.network.model_dump() | changes)
        network = CandidateNetwork(config, CONFIG.scene, ARRAY)
        assert config.slots == config.candidates.count
        assert config.front_end == config.candidates
        return sum(p.numel() for p in network.parameters())

    base = count()
    assert count(width=32) > base
    assert count(depth=2) > base
    assert count(heads=4) == base, "heads share the width"
    # One input more for every cell; two for every candidate, in its place and its deviance.
    assert count(candidates={"count": 3, "range_cells": 7}) == base + 16
    assert count(candidates={"count": 4, "range_cells": 6}) == base + 32
