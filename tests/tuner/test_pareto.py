"""Two objectives: the front, what is refused beside them, and whole searches."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest

from model import Localizer
from model.config import TrialConfig
from tests.reference.pareto import pareto_front as reference
from tests.tuner.support import (
    FakeRun,
    kill,
    read_until,
    run,
    run_here,
    start,
    tiny_study,
    write_study,
)
from tuner.config import load_study
from tuner.errors import ConfigError
from tuner.folder import RunFolder
from tuner.pages.material import Material
from tuner.pareto import pareto_front
from tuner.report import page
from tuner.results import winners, write_best
from tuner.study import Ledger
from tuner.yamlfile import dump_yaml

pytestmark = pytest.mark.long

SPACE = {
    "training.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
    "network.width": {"type": "categorical", "choices": [8, 16, 24]},
    "network.depth": {"type": "int", "low": 1, "high": 2},
}


def changes(**search: Any) -> dict[str, Any]:
    return {"search": {"cost": "flops", "scheduler": "none", "space": SPACE} | search}


def finished(folder: Path, points: list[tuple[float, float]], **search: Any) -> Ledger:
    """A study whose trials ended with these objectives and costs."""
    study = tiny_study(folder, **changes(trials=len(points) + 2, sampler="random", **search))
    ledger = Ledger(folder / "study.db", study)
    for objective, flops in points:
        trial = ledger.ask()
        assert trial is not None
        ledger.report(trial.number, {"epoch": 2, "objective": objective, "flops": flops})
        ledger.finish(trial.number, "done", objective=objective)
    return ledger


def test_the_front_is_what_comparing_every_pair_finds(tmp_path: Path) -> None:
    draw = random.Random(0)
    points = [(draw.randint(0, 5) / 4, float(draw.randint(0, 5))) for _ in range(12)]
    points += sorted(points)[:2]  # equal ones: each of them or none
    ledger = finished(tmp_path, points)
    front = pareto_front(ledger)
    assert {trial.number for trial in front} == reference(dict(enumerate(points)))
    costs = [trial.metrics["flops"] for trial in front]
    assert costs == sorted(costs)
    assert [t.objective for t in ledger.ranking()] == sorted(objective for objective, _ in points)


def test_what_did_not_finish_is_on_no_front(tmp_path: Path) -> None:
    ledger = finished(tmp_path, [(1.0, 10.0)])
    cut, failed = ledger.ask(), ledger.ask()
    assert cut is not None
    assert failed is not None
    for trial in (cut, failed):
        ledger.report(trial.number, {"epoch": 1, "objective": 0.1, "flops": 1.0})
    ledger.finish(failed.number, "failed", reason="diverged")
    assert [trial.number for trial in pareto_front(ledger)] == [0]


def test_a_trial_without_a_cost_has_failed(tmp_path: Path) -> None:
    ledger = finished(tmp_path, [])
    trial = ledger.ask()
    assert trial is not None
    ledger.report(trial.number, {"epoch": 1, "objective": 0.1})
    assert ledger.finish(trial.number, "done", objective=0.1) == "failed"
    assert ledger.trial(trial.number).reason == "flops is None"


def test_a_study_of_one_objective_has_no_front(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "study.db", tiny_study(tmp_path))
    with pytest.raises(ValueError, match="one objective"):
        pareto_front(ledger)


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ({"scheduler": "asha"}, "take search.scheduler=none"),
        ({"sampler": "cmaes"}, "cmaes has one objective"),
        ({"warm_start": "earlier"}, "search.warm_start tells the sampler one objective"),
        ({"cost": "watts"}, "search.cost"),
    ],
)
def test_what_knows_one_objective_is_refused(
    tmp_path: Path, search: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny_study(tmp_path, **changes(**search))


def test_a_front_end_that_is_searched_is_refused(tmp_path: Path) -> None:
    space = {"network.candidates.count": {"type": "int", "low": 2, "high": 4}}
    path = tmp_path / "study.yaml"
    path.write_text(dump_yaml({"network": {"family": "candidate"}, **changes(space=space)}))
    with pytest.raises(ConfigError, match=r"network\.candidates\.count changes what precedes"):
        load_study(path)


def test_the_report_draws_the_front_and_all_else(tmp_path: Path) -> None:
    ledger = finished(tmp_path, [(1.0, 10.0), (0.5, 20.0), (0.7, 30.0), (0.8, 5.0)])
    text = page(Material.read(RunFolder(tmp_path), ledger))
    assert "<h2>Pareto front</h2>" in text
    assert "2 trials of 4 on the front, from 0.8 at 5 flops to 0.5 at 20." in text
    assert "cannot be drawn" not in text
    nothing = finished(tmp_path / "none", [])
    assert "cannot be drawn" not in page(Material.read(RunFolder(tmp_path / "none"), nothing))


class CostlyRun(FakeRun):
    """A trial of no time: a wider network is better and costs more."""

    def step(self) -> dict[str, Any]:
        found, width = super().step(), self.config.network.width
        return {**found, "objective": found["objective"] + 8 / width, "flops": 1000 * width}


@pytest.mark.parametrize("sampler", ["tpe", pytest.param("gp", marks=pytest.mark.slow), "grid"])
def test_a_search_of_two_objectives_ends_with_its_front(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sampler: str,
) -> None:
    monkeypatch.setattr("tuner.local.TrialRun", CostlyRun)
    monkeypatch.setattr("tuner.conclusion._score_winner", lambda folder, study, progress: None)
    monkeypatch.setattr("tuner.results.export_network", lambda trial, place, patience=None: True)
    monkeypatch.setattr("tuner.conclusion.write_report", lambda folder, ledger: None)
    step = 0.2 if sampler == "grid" else None
    space = {
        "network.width": {"type": "categorical", "choices": [8, 16, 24]},
        "blend.beta": {"type": "float", "low": 0.0, "high": 0.6, "step": step},
    }
    asked = changes(sampler=sampler, space=space, trials=6, promote_seeds=1)
    out = tmp_path / "run"
    config = write_study(tmp_path, **asked)
    assert run_here("--config", config, "--local", "--promote", 1, "--out", out) == 0
    ledger = Ledger(out / "study.db", load_study(out / "config.yaml"))
    trials = ledger.trials()
    assert [trial.state for trial in trials] == ["done"] * 6
    points = {t.number: (float(t.objective or 0), float(t.metrics["flops"])) for t in trials}
    best = json.loads((out / "best.json").read_text())
    assert {entry["trial"] for entry in best["pareto"]} == reference(points)
    assert best["trial"] == min(points, key=lambda number: (*points[number], number))
    for entry in best["pareto"]:
        assert (entry["objective"], entry["flops"]) == points[entry["trial"]]
    shown = ", ".join(
        f"{entry['trial']:04d} ({entry['flops']:,.0f} flops, {entry['objective']:.5f})"
        for entry in best["pareto"]
    )
    assert f"Pareto front, cheapest first: {shown}; networks: pareto/" in capsys.readouterr().out
    with (out / "trials.csv").open() as stream:
        assert [float(row["flops"]) for row in csv.DictReader(stream)] == [
            flops for _, flops in points.values()
        ]


def test_the_networks_of_the_front_are_kept_and_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.session._BETWEEN_WRITES", 0)  # after every trial
    widths = [8, 24]
    space = {
        "network.width": {"type": "categorical", "choices": widths},
        "training.learning_rate": {"type": "float", "low": 1e-7, "high": 1e-2, "log": True},
    }
    # The cheap one learns nothing: both are on the front.
    points = [
        {"network.width": 8, "training.learning_rate": 1e-7},
        {"network.width": 24, "training.learning_rate": 1e-2},
    ]
    asked = changes(space=space, trials=2, sampler="random", include_base=False, enqueue=points)
    out = tmp_path / "run"
    assert run_here("--config", write_study(tmp_path, **asked), "--local", "--out", out) == 0
    best = json.loads((out / "best.json").read_text())
    front = {entry["trial"]: entry for entry in best["pareto"]}
    assert set(front) == {0, 1}
    assert sorted(path.name for path in (out / "pareto").iterdir()) == [
        f"{number:04d}" for number in sorted(front)
    ]
    for number, entry in front.items():
        localizer = Localizer.load(out / entry["network"])
        assert localizer.config == TrialConfig.model_validate(entry["config"])
        assert localizer.config.network.width == widths[number]
        assert entry["seed"] == localizer.config.seed
    kept = {int(path.parent.name) for path in (out / "trials").glob("*/checkpoint-*")}
    assert kept == set(front)


def test_who_is_beaten_leaves_the_front_with_its_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tuner.results.export_network",
        lambda trial, place, patience: place.mkdir(parents=True, exist_ok=True) or True,
    )
    ledger = finished(tmp_path, [(1.0, 10.0), (0.5, 20.0)])
    folder = RunFolder(tmp_path)
    write_best(folder, ledger)
    assert sorted(path.name for path in folder.pareto.iterdir()) == ["0000", "0001"]
    trial = ledger.ask()
    assert trial is not None
    ledger.report(trial.number, {"epoch": 2, "objective": 0.25, "flops": 10.0})
    ledger.finish(trial.number, "done", objective=0.25)
    write_best(folder, ledger)
    assert sorted(path.name for path in folder.pareto.iterdir()) == ["0002"]
    assert [t.number for t in winners(ledger)] == [2, 2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_search_of_two_objectives_ends_with_the_same_front(tmp_path: Path) -> None:
    config = write_study(tmp_path, training={"epochs": 4}, **changes(trials=4))
    asked = ("--config", config, "--local")
    assert run(*asked, "--out", tmp_path / "whole", timeout=300).returncode == 0
    process = start(*asked, "--out", tmp_path / "cut")
    read_until(process, "trial 0002 epoch 2/4", timeout=300)
    kill(process)
    resumed = run("--resume", tmp_path / "cut", "--local", timeout=300)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    best = [json.loads((tmp_path / n / "best.json").read_text()) for n in ("whole", "cut")]
    assert best[0]["pareto"] == best[1]["pareto"]
    assert best[0]["objective"] == best[1]["objective"]
    flops = [entry["flops"] for entry in best[0]["pareto"]]
    assert flops == sorted(flops)
