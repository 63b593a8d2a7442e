"""The image network: its spectra, its map's peaks, its loss, and that it learns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from model import Trainer, TrialConfig
from model.features import Features, Spectrum, compute_features
from model.image import ImageNetwork
from model.pointing import heat_loss
from physics import Scenes, simulate
from tests.tiny import TINY

SIZES: dict[str, Any] = {
    "family": "image",
    "width": 16,
    "depth": 2,
    "azimuth_cells": 10,
    "elevation_cells": 6,
    "range_cells": 2,
    "range_bins": 5,
    "rank": 4,
}


def config(**sections: Any) -> TrialConfig:
    merged = {**TINY, "network": SIZES}
    for name, values in sections.items():
        merged[name] = {**merged.get(name, {}), **values} if isinstance(values, dict) else values
    return TrialConfig.model_validate(merged)


CONFIG = config()
ARRAY = CONFIG.array.build()


@pytest.mark.parametrize(
    ("cells", "scene", "fits"),
    [
        ((2, 2), {"max_sources": 5}, False),
        ((2, 2), {"max_sources": 4}, True),
        ((4, 16), {"max_sources": 5, "elevation_deg": (0.0, 0.0)}, False),
        ((5, 16), {"max_sources": 5, "elevation_deg": (0.0, 0.0)}, True),
    ],
)
def test_fewer_directions_than_sources_are_refused(
    cells: tuple[int, int], scene: dict[str, Any], fits: bool
) -> None:
    sizes = {"azimuth_cells": cells[0], "elevation_cells": cells[1], "rank": 8}
    if fits:
        assert config(network=sizes, scene=scene).network.slots == 8
        return
    with pytest.raises(ValidationError, match=r"directions, fewer than scene.max_sources 5"):
        config(network=sizes, scene=scene)


def scenes(count: int = 6, seed: int = 0) -> Scenes:
    return simulate(count, CONFIG.scene, ARRAY, generator=torch.Generator().manual_seed(seed))


def network() -> ImageNetwork:
    torch.manual_seed(0)
    assert CONFIG.network.family == "image"
    return ImageNetwork(CONFIG.network, CONFIG.scene, ARRAY).eval()


def features(
    net: ImageNetwork, drawn: Scenes, spectra: tuple[Spectrum, ...] = CONFIG.network.spectra
) -> Features:
    return compute_features(
        drawn.y,
        drawn.H,
        drawn.codes,
        drawn.snr_db,
        dictionary=net.dictionary,
        tikhonov=CONFIG.tikhonov,
        spectra=spectra,
    )


def test_the_adaptive_spectrum_is_that_of_a_dense_inverse() -> None:
    net, drawn = network(), scenes()
    seen = features(net, drawn)
    R = seen.measured_covariance().dense().to(torch.complex128)
    inverse = torch.linalg.inv(R + 0.1 * torch.eye(ARRAY.size))
    a = net.dictionary.to(torch.complex128)
    quadratic = torch.einsum("gn,bnm,gm->bg", a.conj(), inverse, a).real
    expected = -torch.log(quadratic)
    expected = expected - expected.mean(-1, keepdim=True)
    torch.testing.assert_close(seen.spectrum[:, 2], expected.float(), rtol=1e-3, atol=1e-3)


def test_a_prediction_is_finite_and_its_slots_stand_at_the_highest_peaks() -> None:
    net, drawn = network(), scenes()
    with torch.no_grad():
        p = net(features(net, drawn))
    assert p.heat is not None
    assert p.cells is not None
    assert p.heat.shape == (6, 10, 6)
    torch.testing.assert_close(p.log_pointer.exp().sum(-1), torch.ones(6, 4))
    assert torch.isfinite(p.covariance.dense()).all()
    for item, heat in enumerate(p.heat):
        peaks = []
        for i in range(10):
            for j in range(6):
                around = heat[max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
                if heat[i, j] >= around.max():
                    peaks.append(float(heat[i, j]))
        best = sorted(peaks, reverse=True)[:4]
        torch.testing.assert_close(p.existence[item, : len(best)], torch.tensor(best))
    # Directions lie within a cell of the grid's points, and ranges within the field of view.
    offset = (p.cells[:, :, None, 0, :2] - net.directions.flatten(0, 1)).abs()
    assert bool((offset <= net.cell_size[:2] + 1e-6).all(-1).any(-1).all())
    low, high = CONFIG.scene.range_m
    assert float(p.cells[..., 2].min()) == pytest.approx(low)
    assert float(p.cells[..., 2].max()) == pytest.approx(high)


@pytest.mark.parametrize("scale", [1e12, 1e-12])
def test_the_scale_of_a_measurement_changes_nothing(scale: float) -> None:
    net, drawn = network(), scenes()
    with torch.no_grad():
        one = net(features(net, drawn))
        drawn = Scenes(**{**vars(drawn), "y": drawn.y * scale, "H": drawn.H / scale})
        two = net(features(net, drawn))
    torch.testing.assert_close(one.heat, two.heat, rtol=1e-3, atol=1e-3)


def test_the_loss_of_a_map_is_the_cross_entropy_of_the_nearest_cells_without_those_beside() -> None:
    generator = torch.Generator().manual_seed(1)
    heat = torch.randn(3, 10, 6, generator=generator)
    drawn = scenes(3)
    present = drawn.present
    directions = network().directions
    total = 0.0
    for b in range(3):
        hit = torch.zeros(10, 6, dtype=torch.bool)
        for k in range(present.shape[1]):
            if present[b, k]:
                apart = (directions - drawn.position[b, k, :2]).norm(dim=-1)
                hit[divmod(int(apart.argmin()), 6)] = True
        for i in range(10):
            for j in range(6):
                beside = hit[max(0, i - 1) : i + 2, max(0, j - 1) : j + 2].any() and not hit[i, j]
                if not beside:
                    logit = float(heat[b, i, j])
                    total += math.log1p(math.exp(-logit if hit[i, j] else logit))
    loss = heat_loss(heat, directions, drawn.position, present)
    assert float(loss) == pytest.approx(total / int(present.sum()), rel=1e-5)


def test_a_map_without_sources_is_pushed_down_everywhere() -> None:
    heat = torch.zeros(2, 10, 6, requires_grad=True)
    drawn = scenes(2)
    nobody = torch.zeros_like(drawn.present)
    heat_loss(heat, network().directions, drawn.position, nobody).backward()
    assert heat.grad is not None
    assert bool((heat.grad > 0).all())


def test_every_weight_gets_a_gradient_from_the_loss() -> None:
    many = {"train_scenes": 256}  # some slots must hold a source at a range within reach
    trainer = Trainer(config(training={"epochs": 1}, blend={"beta": 0.2}, data=many))
    batch = next(iter(trainer.source.train_batches(0, 256, 0)))
    trainer._train_step(trainer._prepared(batch))
    for name, parameter in trainer.network.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        assert float(parameter.grad.abs().max()) > 0, name
    assert isinstance(trainer.network, ImageNetwork)
    detail = trainer.network.detail.weight.grad
    assert detail is not None
    assert bool((detail.abs().amax((1, 2, 3)) > 0).all()), "of every detail"


def test_it_learns_where_sources_stand() -> None:
    one_source = {"max_sources": 1, "snr_db": (20.0, 30.0), "range_m": (1.0, 1.5)}
    trainer = Trainer(
        config(
            objective="f1",
            scene=one_source,
            data={"train_scenes": 512, "val_scenes": 64},
            training={"epochs": 6, "batch_size": 32, "learning_rate": 5e-3, "ema_decay": 0.9},
            loss={"existence": 1.0, "position": 0.3, "subspace_align": 0.0, "peak_contrast": 0.0},
        )
    )
    first = trainer.validate()["f1"]
    while not trainer.finished:
        metrics = trainer.run_epoch()
    assert metrics["f1"] > max(0.4, first + 0.2), (first, metrics["f1"])


def test_spectra_are_those_asked_for_in_their_order() -> None:
    net, drawn = network(), scenes()
    whole = features(net, drawn).spectrum
    assert whole.shape[1] == 3
    cases: list[tuple[tuple[Spectrum, ...], list[int]]] = [
        (("adaptive",), [2]),
        (("coherent", "incoherent"), [1, 0]),
        ((), []),
    ]
    for wanted, index in cases:
        assert torch.equal(features(net, drawn, wanted).spectrum, whole[:, index])


@pytest.mark.parametrize(("level", "as_told"), [(math.inf, 50.0), (-math.inf, -30.0)])
def test_a_level_without_end_is_the_last_one_and_not_unknown(level: float, as_told: float) -> None:
    net, drawn = network(), scenes()
    logits = {}
    for told in (level, as_told, math.nan):
        seen = features(net, replace(drawn, snr_db=torch.full_like(drawn.snr_db, told)))
        with torch.no_grad():
            logits[str(told)] = net(seen).existence
    assert torch.equal(logits[str(level)], logits[str(as_told)])
    assert not torch.allclose(logits[str(level)], logits["nan"])
