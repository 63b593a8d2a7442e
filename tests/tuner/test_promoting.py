"""Whole sessions that end with a promotion, with trials of no time; and one that is killed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model import Localizer
from tests.tuner.support import (
    Clock,
    FakeRun,
    kill,
    read_until,
    run,
    run_here,
    start,
    write_study,
)
from tuner.command import execute
from tuner.config import load_study
from tuner.promotion import Promotion, promoted_seed
from tuner.study import Ledger
from tuner.train import app as train_app

pytestmark = pytest.mark.long

NOWHERE = ("--address", "127.0.0.1:1")  # a cluster that is not there: exit 2 where it is asked for


class Fickle(FakeRun):
    """A trial whose objective also depends on its seed; set `doomed` and `cut` to let some fail."""

    doomed: frozenset[int] = frozenset()
    cut: int | None = None  # the seed at whose second epoch somebody presses Ctrl-C

    def step(self) -> dict[str, Any]:
        found = super().step()
        seed = self.config.seed
        if seed in self.doomed:
            ends = {"failed": True, "reason": "diverged: unlucky", "traceback": "Traceback"}
            return {**found, "objective": float("nan"), **ends}
        if seed == self.cut and self.epoch == 2:
            raise KeyboardInterrupt
        return {**found, "objective": found["objective"] + seed % 1000 / 1000}


@pytest.fixture
def fickle(monkeypatch: pytest.MonkeyPatch) -> type[Fickle]:
    monkeypatch.setattr("tuner.local.TrialRun", Fickle)
    monkeypatch.setattr("tuner.conclusion._score_winner", lambda folder, study, progress: None)
    monkeypatch.setattr("tuner.results.export_network", lambda trial, place, patience=None: True)
    monkeypatch.setattr("tuner.conclusion.write_report", lambda folder, ledger: None)
    monkeypatch.setattr(Fickle, "doomed", frozenset())
    monkeypatch.setattr(Fickle, "cut", None)
    return Fickle


def study_file(folder: Path, **search: Any) -> Path:
    return write_study(
        folder,
        training={"epochs": 2},
        search={"trials": 3, "scheduler": "none", "full_epochs": 3, "promote_seeds": 2} | search,
    )


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "promoted.csv").open() as stream:
        return list(csv.DictReader(stream))


def best_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "best.json").read_text())
    return found


def runs_of(folder: Path) -> list[Any]:
    search = Ledger(folder / "study.db", load_study(folder / "config.yaml"))
    promotion = Promotion(search)
    try:
        return [(t.number, t.state, t.seed, t.params, t.curve) for t in promotion.trials()]
    finally:
        promotion.close()
        search.close()


def test_a_promotion_decides_who_has_won(
    tmp_path: Path, fickle: type[Fickle], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    config = study_file(tmp_path)
    assert run_here("--config", config, "--local", "--promote", 3, "--out", out) == 0
    said = capsys.readouterr().out
    assert "promotion: the search's best 3, with 2 seeds each and 3 epochs" in said
    rows = rows_of(out)
    by_trial: dict[int, list[float]] = {}
    for row in rows:
        by_trial.setdefault(int(row["trial"]), []).append(float(row["objective"]))
        assert row["state"] == "done"
        assert row["epochs"] == "3"
    means = {number: float(np.mean(values)) for number, values in by_trial.items()}
    assert [len(values) for values in by_trial.values()] == [2, 2, 2]
    assert list(means) == sorted(means, key=means.__getitem__)
    best, first = best_of(out), next(iter(means))
    assert best["trial"] == first
    assert best["promoted"]["mean"] == pytest.approx(means[first])
    assert best["promoted"]["std"] == pytest.approx(np.std(by_trial[first], ddof=1))
    assert best["objective"] == min(by_trial[first])
    assert best["epochs"] == best["config"]["training"]["epochs"] == 3
    assert best["seed"] == best["config"]["seed"]
    assert {run["seed"]: run["objective"] for run in best["promoted"]["runs"]}[
        best["seed"]
    ] == best["objective"]
    assert f"1. trial {first:04d}: {means[first]:.5f} ± " in said
    assert f"winner: trial {first:04d}; best/ is its network of seed {best['seed']}" in said
    kept = {path.parent.name for path in (out / "promoted").glob("*/checkpoint*")}
    assert kept == {
        f"{int(row['run']):04d}"
        for row in rows
        if float(row["objective"]) == min(by_trial[int(row["trial"])])
    }


def test_a_finished_study_is_promoted_later_and_the_search_decides_again_without(
    tmp_path: Path, fickle: type[Fickle], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run_here("--config", study_file(tmp_path), "--local", "--out", out) == 0
    assert not (out / "promoted.csv").exists()
    assert not (out / "promoted").exists()
    searched = best_of(out)
    assert "promoted" not in searched
    assert run_here("--resume", out, *NOWHERE, "--promote", 1) == 2, "there is work for a cluster"
    assert best_of(out) == searched
    assert run_here("--resume", out, "--local", "--promote", 9) == 0
    said = capsys.readouterr().out
    assert "the search's best 3, with 2 seeds each and 3 epochs (--promote 9: no more" in said
    assert "trial 0000 starts" not in said.partition("promotion:")[2]
    assert len(rows_of(out)) == 6
    assert best_of(out)["promoted"]["seeds"] == 2
    promoted = best_of(out)
    assert run_here("--resume", out, *NOWHERE) == 0, "nothing is left to run"
    assert (out / "promoted.csv").exists()
    assert run_here("--resume", out, *NOWHERE, "--promote", 0) == 0
    assert best_of(out) == searched
    assert not (out / "promoted.csv").exists(), "it decides no more"
    assert run_here("--resume", out, *NOWHERE, "--promote", 3) == 0, "its runs are kept"
    assert len(rows_of(out)) == 6
    assert best_of(out) == promoted


def test_a_seed_that_fails_is_told_and_costs_the_first_place(
    tmp_path: Path,
    fickle: type[Fickle],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = study_file(tmp_path)
    assert run_here("--config", config, "--local", "--promote", 2, "--out", tmp_path / "calm") == 0
    leader = best_of(tmp_path / "calm")
    unlucky = next(r["seed"] for r in leader["promoted"]["runs"] if r["seed"] != leader["seed"])
    monkeypatch.setattr(fickle, "doomed", frozenset({unlucky}))
    out = tmp_path / "run"
    capsys.readouterr()
    assert run_here("--config", config, "--local", "--promote", 2, "--out", out) == 0
    said = capsys.readouterr().out
    assert f"2. trial {leader['trial']:04d}: {leader['objective']:.5f} (1 of 2 seeds)" in said
    assert f"seed {unlucky} failed: diverged: unlucky" in said
    assert best_of(out)["trial"] != leader["trial"]
    (failed,) = [row for row in rows_of(out) if row["state"] == "failed"]
    assert (failed["rank"], failed["objective"]) == ("2", "")
    assert failed["reason"] == "diverged: unlucky"


def test_where_every_run_fails_the_searchs_winner_stays(
    tmp_path: Path,
    fickle: type[Fickle],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    assert run_here("--config", study_file(tmp_path), "--local", "--out", out) == 0
    searched = best_of(out)
    seeds = {promoted_seed(3, searched["trial"], repeat) for repeat in range(2)}
    monkeypatch.setattr(fickle, "doomed", frozenset(seeds))
    assert run_here("--resume", out, "--local", "--promote", 1) == 0
    assert "no promoted run has a score: best/ is the search's winner" in capsys.readouterr().out
    assert best_of(out) == searched


def test_ctrl_c_in_a_promotion_keeps_the_searchs_winner_until_it_has_gone_on(
    tmp_path: Path,
    fickle: type[Fickle],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = study_file(tmp_path, promote=2)
    assert run_here("--config", config, "--local", "--out", tmp_path / "whole") == 0
    whole = runs_of(tmp_path / "whole")
    out = tmp_path / "cut"
    monkeypatch.setattr(fickle, "cut", whole[1][2])
    capsys.readouterr()
    assert run_here("--config", config, "--local", "--out", out) == 130
    said = capsys.readouterr().out
    assert "runs are left: until they have ended best/ is the search's winner" in said
    assert "promoted" not in best_of(out)
    assert [row["state"] for row in rows_of(out)] == ["done", "running"]
    monkeypatch.setattr(fickle, "cut", None)
    assert run_here("--resume", out, "--local") == 0
    said = capsys.readouterr().out
    assert "run 0001 goes on after epoch 1" in said
    assert "run 0000 starts" not in said
    assert runs_of(out) == whole
    assert best_of(out) == best_of(tmp_path / "whole")


def test_a_time_budget_ends_the_search_and_not_the_promotion(
    tmp_path: Path,
    fickle: type[Fickle],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Clock(monkeypatch)  # a minute an epoch
    out = tmp_path / "run"
    config = study_file(tmp_path, promote=1, time_budget="3m")
    assert run_here("--config", config, "--local", "--out", out) == 0
    assert "ended early: the time budget of 3m is used up" in capsys.readouterr().out
    assert [row["epochs"] for row in rows_of(out)] == ["3", "3"]
    search = Ledger(out / "study.db", load_study(out / "config.yaml"))
    promotion = Promotion(search)
    assert (search.seconds, promotion.seconds) == (180.0, 360.0)


# And for real


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_promotion_killed_halfway_ends_as_if_nothing_had_happened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_study(
        tmp_path,
        training={"epochs": 2},
        search={"trials": 2, "scheduler": "none", "full_epochs": 6, "promote_seeds": 2},
    )
    asked = ("--config", config, "--local", "--promote", 2)
    whole = run(*asked, "--out", tmp_path / "whole", timeout=300)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    process = start(*asked, "--out", tmp_path / "cut")
    read_until(process, "run 0002 epoch 3/6", timeout=300)
    kill(process)
    resumed = run("--resume", tmp_path / "cut", "--local", timeout=300)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "run 0002 goes on after epoch" in resumed.stdout
    assert "run 0001 starts" not in resumed.stdout
    assert runs_of(tmp_path / "cut") == runs_of(tmp_path / "whole")
    best = best_of(tmp_path / "whole")
    again = best_of(tmp_path / "cut")
    for key in ("trial", "objective", "seed", "params", "config", "promoted"):
        assert again[key] == best[key], key
    weights = [tmp_path / name / "best" / "model.safetensors" for name in ("whole", "cut")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert Localizer.load(tmp_path / "cut" / "best").config.seed == best["seed"]
    # What best.json tells trains to the score of best/.
    assert execute(train_app, ["--from", str(tmp_path / "cut")]) == 0
    said = capsys.readouterr().out
    assert f"when promoted {best['objective']!r}: the same, bit for bit" in said
