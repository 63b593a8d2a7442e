"""Localizer: what a user calls with a trained network."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from shutil import copytree

import pytest
import torch

from model import CheckpointError, Localizer, Trainer, export_best
from model.checkpoint import load_tensors, save_tensors
from model.decision import Decision, judge
from model.localizer import Source
from model.prediction import Prediction
from physics import LowRankCovariance, PlanarArray, PolarGrid, Scenes, simulate, steering_vector
from physics.metrics import gospa, match
from tests.tiny import tiny_candidate_config, tiny_config

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


def numbers(source: Source) -> list[float]:
    """Everything that is said of a source."""
    said = dict(vars(source))
    covariance = said.pop("covariance")
    return [*said.values(), *(value for line in covariance or () for value in line)]


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
    assert all(math.isfinite(v) for s in found for v in numbers(s))


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


def test_a_run_folder_stands_for_its_winner(best: Path, tmp_path: Path) -> None:
    of_best, of_run = Localizer.load(best), Localizer.load(best.parent)
    assert of_run.config == of_best.config
    for name, weight in of_best.network.state_dict().items():
        assert torch.equal(of_run.network.state_dict()[name], weight), name
    copytree(best.parent, tmp_path / "run")
    (tmp_path / "run" / "best" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"run/best/model\.safetensors: no such file"):
        Localizer.load(tmp_path / "run")


def test_missing_damaged_or_foreign_weights_are_named(best: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such folder; expected model\.safetensors"):
        Localizer.load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_bytes((best / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        Localizer.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match="not readable as safetensors"):
        Localizer.load(tmp_path)
    weights, metadata = load_tensors(best / "model.safetensors")
    for other in ({}, metadata | {"format": "2"}):
        save_tensors(tmp_path / "model.safetensors", weights, other)
        with pytest.raises(CheckpointError, match="or version mean something else here"):
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


# Of the network that judges candidates


@pytest.fixture(scope="module")
def candidate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, dict[str, float], Path]:
    folder = tmp_path_factory.mktemp("candidate")
    trainer = Trainer(tiny_candidate_config(training={"epochs": 1}))
    metrics = trainer.run_epoch()
    trainer.save(folder / "checkpoint")
    export_best(folder / "checkpoint", folder / "best")
    return trainer, metrics, folder / "best"


def test_what_was_exported_names_the_sources_that_validation_scored(
    candidate: tuple[Trainer, dict[str, float], Path],
) -> None:
    trainer, metrics, folder = candidate
    localizer = Localizer.load(folder)
    assert localizer.decision == trainer.decision != Decision()
    scenes = trainer.source.validation().scenes
    found, prediction, _ = localizer.detect(scenes.y, scenes.H, scenes.codes, scenes.known_snr_db)
    assert prediction.cells is not None
    matching = match(found, scenes.position, scenes.present)
    assert 0 < int(found.count.sum()) < found.present.numel(), "some are named and some are not"
    assert matching.f1 == pytest.approx(metrics["f1"])
    assert matching.count_accuracy == pytest.approx(metrics["count_accuracy"])
    cost = float(gospa(found, scenes.position, scenes.present).total.mean())
    assert cost == pytest.approx(metrics["gospa"], rel=1e-4)
    assert found.covariance is not None
    assert bool((torch.linalg.eigvalsh(found.covariance[found.present].double()) > 0).all())


def test_sources_are_the_candidates_above_the_threshold_with_their_own_probability(
    candidate: tuple[Trainer, dict[str, float], Path], tmp_path: Path
) -> None:
    trainer, _, folder = candidate
    localizer = Localizer.load(folder)
    scenes = trainer.source.validation().scenes[slice(0, 8)]
    call = (scenes.y, scenes.H, scenes.codes, scenes.known_snr_db)
    _, prediction, _ = localizer.detect(*call)
    # A threshold that names a later candidate of some scene and not the first.
    score = judge(prediction, "f1").score
    later = score[score[:, 0] < score[:, 1]]
    assert len(later)
    localizer.decision = Decision("f1", float(later[0, :2].mean()))
    found, prediction, _ = localizer.detect(*call)
    assert bool((found.present[:, 1] & ~found.present[:, 0]).any())
    probability = torch.sigmoid(prediction.existence)
    sources = localizer.locate(*call)
    for b, part in enumerate(sources):
        slots = found.present[b].nonzero().squeeze(-1).tolist()
        expected = {
            (round(math.degrees(found.position[b, i, 0]), 3), round(float(probability[b, i]), 5))
            for i in slots
        }
        got = {(round(s.azimuth_deg, 3), round(s.probability, 5)) for s in part}  # type: ignore[union-attr]
        assert got == expected
        powers = [s.power for s in part]  # type: ignore[union-attr]
        assert powers == sorted(powers, reverse=True)
    everything = Localizer(localizer.config, localizer.network, decision=Decision("f1", 0.0))
    assert [len(part) for part in everything.locate(*call)] == [3] * 8  # type: ignore[arg-type]
    nothing = Localizer(localizer.config, localizer.network, decision=Decision("f1", 1.0))
    assert nothing.locate(*call) == [[]] * 8


def test_candidates_of_inference_are_not_kept(
    candidate: tuple[Trainer, dict[str, float], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trainer, _, folder = candidate
    scenes = trainer.source.validation().scenes[slice(0, 2)]
    Localizer.load(folder).locate(scenes.y, scenes.H, scenes.codes)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("snr_db", [None, 10.0, "each", "some"])
def test_candidates_are_judged_with_and_without_the_snr(
    candidate: tuple[Trainer, dict[str, float], Path], snr_db: object
) -> None:
    trainer, _, folder = candidate
    localizer = Localizer.load(folder)
    scenes = trainer.source.validation().scenes[slice(0, 4)]
    level = scenes.snr_db if snr_db == "each" else snr_db
    if snr_db == "some":
        level = scenes.snr_db.clone()
        level[1] = math.nan
    batch = localizer.locate(scenes.y, scenes.H, scenes.codes, level)  # type: ignore[arg-type]
    assert len(batch) == 4
    one = level[0] if isinstance(level, torch.Tensor) else level
    alone = localizer.locate(scenes.y[0], scenes.H[0], scenes.codes[0], one)  # type: ignore[arg-type]
    assert [s.azimuth_deg for s in alone] == pytest.approx(  # type: ignore[union-attr]
        [s.azimuth_deg for s in batch[0]],
        abs=1e-2,  # type: ignore[union-attr]
    )


def test_a_level_that_is_not_given_is_one_that_is_not_known(
    candidate: tuple[Trainer, dict[str, float], Path],
) -> None:
    trainer, _, folder = candidate
    localizer = Localizer.load(folder)
    scenes = trainer.source.validation().scenes[slice(0, 4)]
    call = (scenes.y, scenes.H, scenes.codes)
    one, _, features = localizer.predict(*call)
    two, _, _ = localizer.predict(*call, torch.full((4,), math.nan))
    assert bool(features.snr_db.isnan().all())
    assert torch.equal(one.existence, two.existence)
    told, _, _ = localizer.predict(*call, scenes.snr_db)
    assert not torch.allclose(one.existence, told.existence)


def test_codes_beyond_single_precision_are_refused_and_not_taken_for_none(
    candidate: tuple[Trainer, dict[str, float], Path],
) -> None:
    trainer, _, folder = candidate
    scenes = trainer.source.validation().scenes[slice(0, 2)]
    y, H, codes = (t.to(torch.complex128) for t in (scenes.y, scenes.H, scenes.codes))
    localizer = Localizer.load(folder)
    localizer.predict(y, H, codes)
    with pytest.raises(ValueError, match=r"codes have a modulus of 1e\+40, beyond single"):
        localizer.predict(y, H, codes * 1e40)


def test_a_network_whose_answer_is_not_finite_is_no_network_that_finds_nothing(
    candidate: tuple[Trainer, dict[str, float], Path], tmp_path: Path
) -> None:
    trainer, _, folder = candidate
    scenes = trainer.source.validation().scenes[slice(0, 2)]
    weights, metadata = load_tensors(folder / "model.safetensors")
    for scale, said in ((math.nan, "holds NaN or Inf"), (1e30, "answers with NaN or Inf")):
        damaged = tmp_path / str(scale)
        shutil.copytree(folder, damaged)
        scaled = {n: t * scale if t.is_floating_point() else t for n, t in weights.items()}
        save_tensors(damaged / "model.safetensors", scaled, metadata)
        with pytest.raises((CheckpointError, ValueError), match=said):
            Localizer.load(damaged).predict(scenes.y, scenes.H, scenes.codes)


@pytest.mark.parametrize("what", ["zero channel", "zero snapshots", "no scenes"])
def test_ugly_scenes_of_candidates_give_a_defined_answer(
    candidate: tuple[Trainer, dict[str, float], Path], what: str
) -> None:
    trainer, _, folder = candidate
    n = 0 if what == "no scenes" else 2
    scenes = trainer.source.validation().scenes[slice(0, n)]
    y = 0 * scenes.y if what == "zero snapshots" else scenes.y
    H = 0 * scenes.H if what == "zero channel" else scenes.H
    named = Decision("f1", -1.0)  # all of them, so that there is something to look at
    localizer = Localizer.load(folder)
    everything = Localizer(localizer.config, localizer.network, decision=named)
    found = everything.locate(y, H, scenes.codes)
    assert len(found) == n
    for part in found:
        assert len(part) == 3  # type: ignore[arg-type]
        assert all(math.isfinite(v) for s in part for v in numbers(s))  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_scale_changes_nothing_of_what_candidates_say(
    candidate: tuple[Trainer, dict[str, float], Path], dtype: torch.dtype
) -> None:
    trainer, _, folder = candidate
    localizer = Localizer.load(folder)
    scenes = trainer.source.validation().scenes[slice(0, 6)]
    scale = 2.0**50 if dtype == torch.complex64 else 2.0**200
    y, H, codes = (t.to(dtype) for t in (scenes.y, scenes.H, scenes.codes))
    one, _, _ = localizer.detect(y, H, codes)
    two, _, _ = localizer.detect(y * scale, H / scale, codes)
    assert torch.equal(one.present, two.present)
    torch.testing.assert_close(one.position, two.position)
