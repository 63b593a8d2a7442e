"""Localizer: what a user calls with a trained network."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from model import CheckpointError, Localizer, Trainer, export_best
from model.localizer import Source
from model.prediction import Prediction
from physics import LowRankCovariance, PlanarArray, PolarGrid, Scenes, simulate, steering_vector
from tests.tiny import tiny_config

CONFIG = tiny_config()


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer = Trainer(CONFIG)
    trainer.run_epoch()
    trainer.save(folder / "checkpoint")
    export_best(folder / "checkpoint", folder / "best")
    return folder / "best"


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    generator = torch.Generator().manual_seed(4)
    return simulate(6, CONFIG.scene, CONFIG.array.build(), generator=generator)


def test_locate_answers_one_scene_and_a_batch_alike(best: Path, scenes: Scenes) -> None:
    localizer = Localizer.load(best)
    batch = localizer.locate(scenes.y, scenes.H, scenes.codes)
    assert len(batch) == 6
    assert any(batch), "needs scenes in which something is found"
    for i in range(6):
        alone = localizer.locate(scenes.y[i], scenes.H[i], scenes.codes[i])
        assert len(alone) == len(batch[i])
        for a, b in zip(alone, batch[i], strict=True):
            assert a.azimuth_deg == pytest.approx(b.azimuth_deg, abs=1e-2)
            assert a.range_m == pytest.approx(b.range_m, rel=1e-2)


def test_every_source_is_inside_the_field_of_view_and_has_a_probability(
    best: Path, scenes: Scenes
) -> None:
    localizer = Localizer.load(best)
    found = [s for part in localizer.locate(scenes.y, scenes.H, scenes.codes) for s in part]
    assert found
    assert all(isinstance(s, Source) for s in found)
    for s in found:
        assert -60.001 <= s.azimuth_deg <= 60.001
        assert -30.001 <= s.elevation_deg <= 30.001
        assert 0.499 <= s.range_m <= 10.001
        assert 0 <= s.probability <= 1
        assert math.isfinite(s.power)


def test_a_perfect_covariance_is_decoded_to_its_sources(best: Path) -> None:
    """Decoding alone: the slots count two and R_blend is R_true."""
    trained = Localizer.load(best)
    config = tiny_config(array={"n_horizontal": 12, "n_vertical": 12})
    array = PlanarArray()
    network = type(trained.network)(config.network, config.scene, array)
    localizer = Localizer(config, network, grid=PolarGrid.covering(config.scene, 121, 61, 16))
    position = torch.tensor([[0.3, 0.1, 1.2], [-0.5, -0.2, 3.0]])
    a = steering_vector(position, array)
    R = LowRankCovariance((a.mT * torch.tensor([1.0, 0.6])).unsqueeze(0)).normalized()
    # The first slot points at the second source, the second at the first.
    pointer = torch.zeros(1, 3, network.dictionary.shape[0])
    nearest = (network.dictionary @ a.mH).abs().argmax(0)
    pointer[0, [1, 0], nearest] = 50.0
    prediction = Prediction(
        R.factor,
        torch.tensor([[4.0, 3.0, -5.0]]),
        torch.log_softmax(pointer, -1),
        torch.zeros(1, 3, 3),
    )
    first, second = localizer._decode(prediction, R)[0]
    for source, (azimuth, elevation, distance) in zip(
        (first, second), position.tolist(), strict=True
    ):
        assert source.azimuth_deg == pytest.approx(math.degrees(azimuth), abs=0.5)
        assert source.elevation_deg == pytest.approx(math.degrees(elevation), abs=0.5)
        assert source.range_m == pytest.approx(distance, rel=0.1)
    # The true shares are 1/1.6 and 0.6/1.6; the peaks miss the beams' tops by a little.
    assert first.power == pytest.approx(0.625, abs=0.15)
    assert second.power == pytest.approx(0.375, abs=0.15)
    assert first.power + second.power < 1.02, "what both see counts once"
    # No slot speaks for two sources, and only slots that hold one speak.
    assert {round(s.probability, 4) for s in (first, second)} == {0.982, 0.9526}
    assert first.probability == pytest.approx(1 / (1 + math.exp(-3.0)))
    assert second.probability == pytest.approx(1 / (1 + math.exp(-4.0)))


@pytest.mark.parametrize("snr_db", [None, 10.0, "each"])
def test_snr_may_be_unknown_common_or_one_per_scene(
    best: Path, scenes: Scenes, snr_db: object
) -> None:
    level = scenes.snr_db if snr_db == "each" else snr_db
    assert len(Localizer.load(best).locate(scenes.y, scenes.H, scenes.codes, level)) == 6  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["y", "H", "codes"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_input_is_refused_by_name(
    best: Path, scenes: Scenes, name: str, bad: float
) -> None:
    values = {k: getattr(scenes, k).clone() for k in ("y", "H", "codes")}
    values[name][1, 0, 0] = bad
    with pytest.raises(ValueError, match=rf"{name} holds 1 non-finite.*\(1, 0, 0\)"):
        Localizer.load(best).locate(**values)


def test_misshapen_input_is_refused(best: Path, scenes: Scenes) -> None:
    localizer = Localizer.load(best)
    y, H, codes = scenes.y, scenes.H, scenes.codes
    with pytest.raises(ValueError, match=r"dtype torch\.float32; expected complex64"):
        localizer.locate(y.real, H, codes)
    with pytest.raises(ValueError, match="shapes do not fit"):
        localizer.locate(y, H[:, :2], codes)
    with pytest.raises(ValueError, match=r"trained for y \(B, L, 4\) and H \(B, 4, 36\)"):
        localizer.locate(y, H[..., :9], codes[..., :9])
    with pytest.raises(ValueError, match=r"snr_db has shape \(2,\); expected a number or \(6,\)"):
        localizer.locate(y, H, codes, torch.zeros(2))
    for call in (localizer.locate, localizer.predict):
        with pytest.raises(ValueError, match=r"y has shape \(1, 6, .*expected a batch \(B, L, M\)"):
            call(y[None], H[None], codes[None])
    with pytest.raises(ValueError, match="locate takes one scene"):
        localizer.predict(y[0], H[0], codes[0])


def test_a_channel_and_codes_may_be_common_to_a_batch(best: Path, scenes: Scenes) -> None:
    localizer = Localizer.load(best)
    y, H, codes = scenes.y, scenes.H[:1], scenes.codes[:1]
    _, expected, _ = localizer.predict(y, H.expand(6, -1, -1), codes.expand(6, -1, -1))
    for common in ((H, codes), (H[0], codes[0])):
        _, R, _ = localizer.predict(y, *common)
        torch.testing.assert_close(R.factor, expected.factor)
        assert len(localizer.locate(y, *common)) == 6


@pytest.mark.parametrize("what", ["zero channel", "zero snapshots", "one snapshot"])
def test_ugly_scenes_give_a_defined_answer(best: Path, scenes: Scenes, what: str) -> None:
    y, H, codes = scenes.y[0], scenes.H[0], scenes.codes[0]
    if what == "zero channel":
        H = torch.zeros_like(H)
    elif what == "zero snapshots":
        y = torch.zeros_like(y)
    else:
        y, codes = y[:1], codes[:1]
    found = Localizer.load(best).locate(y, H, codes)
    assert all(math.isfinite(v) for s in found for v in vars(s).values())


def test_an_empty_batch_has_no_answers(best: Path, scenes: Scenes) -> None:
    assert Localizer.load(best).locate(scenes.y[:0], scenes.H[:0], scenes.codes[:0]) == []


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_scale_changes_nothing(best: Path, scenes: Scenes, dtype: torch.dtype) -> None:
    localizer = Localizer.load(best)
    scale = 1e15 if dtype == torch.complex64 else 1e60
    y, H, codes = (t.to(dtype) for t in (scenes.y, scenes.H, scenes.codes))
    _, one, _ = localizer.predict(y, H, codes)
    _, two, _ = localizer.predict(y * scale, H / scale, codes)
    # Rounding of the scaled input, through the network.
    torch.testing.assert_close(one.dense(), two.dense(), rtol=1e-3, atol=1e-3)
    found = localizer.locate(y * scale, H / scale, codes)
    assert [len(s) for s in localizer.locate(y, H, codes)] == [len(s) for s in found]  # type: ignore[arg-type]


def test_missing_damaged_or_foreign_weights_are_named(best: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such folder; expected model\.safetensors"):
        Localizer.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"a run directory; load its winner, .*best"):
        Localizer.load(best.parent)
    (tmp_path / "config.json").write_bytes((best / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        Localizer.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match="not readable as safetensors"):
        Localizer.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((best / "model.safetensors").read_bytes())
    text = (best / "config.json").read_text().replace('"width": 16', '"width": 32')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="weights of another network"):
        Localizer.load(tmp_path)


def test_power_that_two_neighbours_see_counts_once(best: Path) -> None:
    trained = Localizer.load(best)
    # The grid holds both sources, so that their peaks are exact; their beams overlap.
    grid = PolarGrid((0.04, 0.10, 0.16, 0.22, 0.28), (0.0,), (1.0 / 3.0,))
    localizer = Localizer(trained.config, trained.network, grid=grid)
    position = torch.tensor([[0.10, 0.0, 3.0], [0.22, 0.0, 3.0]])
    a = steering_vector(position, trained.array)
    assert float((a[0].conj() @ a[1]).abs().square()) > 0.2
    R = LowRankCovariance((a.mT * torch.tensor([0.8, 0.6])).unsqueeze(0)).normalized()
    prediction = Prediction(
        R.factor,
        torch.tensor([[4.0, 3.0, -5.0]]),
        torch.log_softmax(torch.zeros(1, 3, trained.network.dictionary.shape[0]), -1),
        torch.zeros(1, 3, 3),
    )
    powers = [source.power for source in localizer._decode(prediction, R)[0]]
    # 0.8^2 and 0.6^2; what each sees alone would be 0.64 + 0.36 times the overlap.
    assert powers == pytest.approx([0.64, 0.36], abs=0.03)
