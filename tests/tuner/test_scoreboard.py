from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from physics import (
    Detections,
    PlanarArray,
    SceneConfig,
    simulate,
    somp,
    steering_vector,
)
from physics.covariance import source_covariance
from physics.metrics import match
from tests.tiny import tiny_config
from tuner.evaluation import evaluate_suite, suite_scenes
from tuner.scoreboard import (
    Estimate,
    Estimator,
    Truth,
    by_range,
    full_report,
    in_band,
    score,
    snr_bands,
    summary,
)
from tuner.suites import SUITES


def truth_and(estimate: Any, n: int = 40, **changes: Any) -> tuple[Truth, Any]:
    """Scenes of two sources, and an estimator that answers from the truth."""
    array = PlanarArray(6, 6)
    config = SceneConfig(**{"n_antennas": 4, "n_snapshots": 4, "max_sources": 2} | changes)
    scenes = simulate(n, config, array, generator=torch.Generator().manual_seed(0))
    return Truth.of(scenes, array, config), Estimator("told", "from the truth", estimate)


def test_a_perfect_estimator_scores_perfectly() -> None:
    array = PlanarArray(6, 6)

    def perfect(scenes: Any) -> Estimate:
        a = steering_vector(scenes.position, array)
        return Detections(scenes.position, scenes.present), source_covariance(a, scenes.power)

    truth, estimator = truth_and(perfect, 100)  # more than one batch
    report = full_report(score(estimator, truth), truth)
    overall = report["overall"]
    assert overall["scenes"] == 100
    for key in ("f1", "precision", "recall", "gated_recall", "count_accuracy", "all_found"):
        assert overall[key] == 1.0, key
    assert overall["f1_interval"] == [1.0, 1.0]
    assert overall["gospa_m"] == pytest.approx(0.0, abs=1e-6)
    assert overall["median_error_over_crb"] == 0.0
    assert overall["nmse"] == pytest.approx(0.0, abs=1e-5)
    assert overall["subspace_error"] == pytest.approx(0.0, abs=1e-4)
    assert "coverage" not in overall  # it predicts no covariance
    confusion = torch.tensor(report["confusion"])
    assert int(confusion.diagonal().sum()) == int(confusion.sum()) == 100


def test_an_estimator_that_finds_nothing_scores_zero() -> None:
    def blind(scenes: Any) -> Estimate:
        return Detections(scenes.position, torch.zeros_like(scenes.present)), None

    truth, estimator = truth_and(blind)
    overall = full_report(score(estimator, truth), truth)["overall"]
    assert overall["f1"] == overall["recall"] == overall["gated_recall"] == 0.0
    assert overall["median_error_over_crb"] is None
    assert "nmse" not in overall
    sources = truth.scenes.n_sources.double()
    # c^p / 2 = 2 for every missed source
    assert overall["gospa_m"] == pytest.approx(float((2.0 * sources).sqrt().mean()))


def test_groups_part_the_scenes_and_the_sources() -> None:
    def half(scenes: Any) -> Estimate:
        return Detections(
            scenes.position, scenes.present & (scenes.position[..., 2:] < 5).all(-1)
        ), None

    truth, estimator = truth_and(half, 120)
    scored = score(estimator, truth)
    report = full_report(scored, truth)
    assert sum(row["scenes"] for row in report["by_snr"]) == 120
    assert sum(row["scenes"] for row in report["by_k"]) == 120
    n_sources = int(truth.scenes.present.sum())
    rows = by_range(scored, truth)
    assert sum(row["sources"] for row in rows) == n_sources
    near = [row["recall"] for row in rows if row["high_m"] is not None and row["high_m"] <= 4]
    far = [row["recall"] for row in rows if row["low_m"] >= 6]
    assert all(value == 1.0 for value in near)
    assert all(value == 0.0 for value in far)
    bands = snr_bands(truth)
    assert bands[0][0] <= float(truth.scenes.snr_db.min())
    assert bands[-1][1] >= float(truth.scenes.snr_db.max())


def test_one_level_of_snr_makes_one_band() -> None:
    truth, _ = truth_and(None, 4, snr_db=(10.0, 10.0))
    assert snr_bands(truth) == [(10.0, 15.0)]


def test_somp_is_that_of_physics_and_is_told_nothing() -> None:
    config = tiny_config(scene={"min_sources": 0})
    content = evaluate_suite("nominal", config, None, n_scenes=24, methods=["somp"], say=len)
    array = config.array.build()
    drawn, _ = suite_scenes(config, SUITES["nominal"], array, 24)
    by_hand = somp(drawn.y, drawn.H, drawn.codes, array=array, scene=config.scene)
    matching = match(by_hand.detections, drawn.position, drawn.present)
    overall = content["methods"]["somp"]["overall"]
    assert overall["f1"] == pytest.approx(matching.f1)
    assert overall["count_accuracy"] == pytest.approx(matching.count_accuracy)
    assert "coverage" not in overall
    assert content["paired_f1"] == {}  # NOMP is not run


def test_errors_over_the_bound_are_those_of_gated_hits() -> None:
    truth, _ = truth_and(None, 3, min_sources=2)
    gated = torch.tensor([[True, False]] * 3)
    std = torch.full((3, 2, 3), 0.01)
    told = replace(truth, crb_std=std, gated=gated)

    def off(scenes: Any) -> Estimate:
        shift = torch.tensor([[0.01], [0.03]])  # one bound, and three
        return Detections(scenes.position + shift, scenes.present), None

    scored = score(Estimator("off", "", off), told)
    assert summary(scored, told)["median_error_over_crb"] == pytest.approx(1.0, rel=1e-3)


def test_the_highest_snr_belongs_to_the_last_band() -> None:
    truth, _ = truth_and(None, 8, snr_db=(20.0, 20.0))
    level = torch.tensor([10.0, 12.0, 15.0, 15.0, 17.0, 20.0, 20.0, 20.0])
    truth = replace(truth, scenes=replace(truth.scenes, snr_db=level))
    bands = snr_bands(truth)
    assert bands == [(10.0, 15.0), (15.0, 20.0)]
    counts = [int(in_band(truth, b, last=b == bands[-1]).sum()) for b in bands]
    assert counts == [2, 6]


def test_matching_of_the_scoreboard_is_that_of_the_metrics() -> None:
    def shifted(scenes: Any) -> Estimate:
        return Detections(scenes.position * 1.01, scenes.present), None

    truth, estimator = truth_and(shifted)
    scored = score(estimator, truth)
    expected = match(scored.found, truth.scenes.position, truth.scenes.present)
    assert torch.equal(scored.matching.detection, expected.detection)
