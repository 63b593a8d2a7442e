"""The snapshot network: shapes, invariances and what it sees."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from model.features import Features, compute_features
from model.snapshot import SnapshotConfig, SnapshotNetwork
from physics import Scenes, simulate, tikhonov_solve
from tests.tiny import tiny_config

CONFIG = tiny_config()
ARRAY = CONFIG.array.build()


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return simulate(5, CONFIG.scene, ARRAY, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network() -> SnapshotNetwork:
    torch.manual_seed(0)
    return SnapshotNetwork(CONFIG.network, CONFIG.scene, ARRAY).eval()


def features_of(
    network: SnapshotNetwork, y: Tensor, H: Tensor, codes: Tensor, snr_db: Tensor
) -> Features:
    return compute_features(
        y, H, codes, snr_db, dictionary=network.dictionary, tikhonov=CONFIG.tikhonov
    )


def test_prediction_has_the_documented_shapes_and_trace(
    network: SnapshotNetwork, scenes: Scenes
) -> None:
    p = network(features_of(network, scenes.y, scenes.H, scenes.codes, scenes.snr_db))
    cells = network.dictionary.shape[0]
    assert p.factor.shape == (5, 36, 3)
    assert p.factor.dtype == torch.complex64
    assert p.existence.shape == (5, 3)
    assert p.log_pointer.shape == (5, 3, cells)
    assert p.position.shape == (5, 3, 3)
    torch.testing.assert_close(p.covariance.trace(), torch.full((5,), 36.0))
    torch.testing.assert_close(p.log_pointer.exp().sum(-1), torch.ones(5, 3))


def test_spectra_are_the_incoherent_and_the_coherent_matched_filter(
    network: SnapshotNetwork, scenes: Scenes
) -> None:
    seen = features_of(network, scenes.y, scenes.H, scenes.codes, scenes.snr_db)
    ridge, _ = tikhonov_solve(scenes.y, scenes.H, scenes.codes, CONFIG.tikhonov.regularization)
    filtered = np.einsum("gn,bln->blg", network.dictionary.numpy().conj(), ridge.numpy())
    for found, power in zip(
        seen.spectrum.unbind(1),
        ((np.abs(filtered) ** 2).mean(1), np.abs(filtered.mean(1)) ** 2),
        strict=True,
    ):
        expected = np.log(power) - np.log(power).mean(-1, keepdims=True)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-3)


def test_snapshots_are_an_unordered_set(network: SnapshotNetwork, scenes: Scenes) -> None:
    order = torch.tensor([2, 0, 3, 1])
    one = network(features_of(network, scenes.y, scenes.H, scenes.codes, scenes.snr_db))
    two = network(
        features_of(network, scenes.y[:, order], scenes.H, scenes.codes[:, order], scenes.snr_db)
    )
    # Attention sums tokens in another order: float32 rounding through a few layers.
    torch.testing.assert_close(one.factor, two.factor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("scale_y", "scale_h"), [(1e15, 1.0), (1.0, 1e15), (1e-15, 1e-15)])
def test_scale_of_channel_and_measurement_changes_nothing(
    network: SnapshotNetwork, scenes: Scenes, scale_y: float, scale_h: float
) -> None:
    one = network(features_of(network, scenes.y, scenes.H, scenes.codes, scenes.snr_db))
    two = network(
        features_of(network, scenes.y * scale_y, scenes.H * scale_h, scenes.codes, scenes.snr_db)
    )
    torch.testing.assert_close(one.factor, two.factor, rtol=1e-3, atol=1e-4)


def test_trap_the_network_sees_the_channel_and_not_only_its_product(
    network: SnapshotNetwork, scenes: Scenes
) -> None:
    seen = features_of(network, scenes.y, scenes.H, scenes.codes, scenes.snr_db)
    other = seen.H.roll(1, 0)
    changed = Features(**(vars(seen) | {"H": other}))
    assert not torch.allclose(network(seen).factor, network(changed).factor)
    H = seen.H.clone().requires_grad_()
    ridge = seen.ridge.clone().requires_grad_()
    out = network(Features(**(vars(seen) | {"H": H, "ridge": ridge})))
    out.factor.abs().square().sum().backward()
    out_grad = [t.grad for t in (H, ridge)]
    assert all(g is not None and float(g.abs().max()) > 0 for g in out_grad)


def test_snr_is_used_and_may_be_unknown(network: SnapshotNetwork, scenes: Scenes) -> None:
    outputs = [
        network(
            features_of(network, scenes.y, scenes.H, scenes.codes, torch.full((5,), level))
        ).factor
        for level in (0.0, 20.0, float("nan"))
    ]
    assert all(bool(torch.isfinite(torch.view_as_real(o)).all()) for o in outputs)
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])


@pytest.mark.parametrize("what", ["zero channel", "zero snapshots", "one snapshot"])
def test_lesson_3_ugly_scenes_give_finite_output_and_gradient(
    network: SnapshotNetwork, scenes: Scenes, what: str
) -> None:
    y, H, codes = scenes.y, scenes.H, scenes.codes
    if what == "zero channel":
        H = torch.zeros_like(H)
    elif what == "zero snapshots":
        y = torch.zeros_like(y)
    else:
        y, codes = y[:, :1], codes[:, :1]
    p = network(features_of(network, y, H, codes, scenes.snr_db))
    network.zero_grad()
    (p.covariance.gram().abs().square().sum() + p.position.sum()).backward()
    grads = [q.grad for q in network.parameters() if q.grad is not None]
    assert grads
    assert all(bool(torch.isfinite(g).all()) for g in grads)
    assert bool(torch.isfinite(torch.view_as_real(p.factor.detach())).all())


def test_sizes_come_from_the_configuration() -> None:
    def count(**changes: object) -> int:
        config = SnapshotConfig.model_validate(CONFIG.network.model_dump() | changes)
        return sum(p.numel() for p in SnapshotNetwork(config, CONFIG.scene, ARRAY).parameters())

    base = count()
    assert count(width=32) > base
    assert count(depth=2) > base
    assert count(rank=4) == base + 16
    assert count(heads=4) == base, "heads share the width"


def test_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValidationError, match="width 20 is not a multiple of heads 8"):
        SnapshotConfig(width=20, heads=8)


def test_a_prediction_looked_at_without_gradient_keeps_its_gradient(
    network: SnapshotNetwork, scenes: Scenes
) -> None:
    p = network(features_of(network, scenes.y, scenes.H, scenes.codes, scenes.snr_db))
    with torch.no_grad():
        assert not p.covariance.factor.requires_grad
    assert p.covariance.factor.requires_grad
    assert p.covariance is p.covariance


def test_fewer_slots_than_sources_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"network\.rank 1 is below scene\.max_sources 2"):
        tiny_config(network={"rank": 1})


@pytest.mark.parametrize(("level", "as_told"), [(math.inf, 50.0), (-math.inf, -30.0)])
def test_a_level_without_end_is_the_last_one_and_not_unknown(
    network: SnapshotNetwork, scenes: Scenes, level: float, as_told: float
) -> None:
    logits = {}
    for told in (level, as_told, math.nan):
        seen = features_of(
            network, scenes.y, scenes.H, scenes.codes, torch.full_like(scenes.snr_db, told)
        )
        with torch.no_grad():
            logits[str(told)] = network(seen).existence
    assert torch.equal(logits[str(level)], logits[str(as_told)])
    assert not torch.allclose(logits[str(level)], logits["nan"])
