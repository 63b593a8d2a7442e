"""What a study takes over from an earlier one, and what that never becomes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.tuner.support import FakeRun, run_here, tiny_study, write_study
from tuner.config import StudyConfig, load_study
from tuner.errors import StudyError
from tuner.folder import RunFolder
from tuner.records import PriorTrial
from tuner.study import Ledger
from tuner.telemetry import Progress
from tuner.trainable import NUMBER
from tuner.warmstart import _differences, read_prior

BETA = {"blend.beta": {"type": "float", "low": 0.0, "high": 0.6}}


def finished_study(folder: Path, *states: str, **changes: Any) -> tuple[Path, StudyConfig]:
    """A run folder whose trials ended so; the better, the smaller their blend.beta."""
    study = tiny_study(folder / "made", **changes)
    study = study.replaced({"search.trials": len(states)})
    run = folder / "earlier"
    run.mkdir()
    (run / "config.yaml").write_text(study.to_yaml())
    ledger = Ledger(run / "study.db", study)
    for state in states:
        trial = ledger.ask()
        assert trial is not None
        ledger.finish(trial.number, state, objective=1.0 + float(trial.params["blend.beta"]))  # type: ignore[arg-type]
    ledger.close()
    return run, study


def test_finished_trials_are_told_to_the_sampler_and_are_no_trials_of_this_study(
    tmp_path: Path,
) -> None:
    earlier, _ = finished_study(tmp_path, "done", "pruned", "failed", "done")
    study = tiny_study(tmp_path, search={"trials": 2})
    prior = read_prior(earlier, study)
    assert len(prior.trials) == 2
    assert "told to the sampler: 2 of" in prior.note
    assert "left out: 1 pruned, 1 failed" in prior.note
    assert "\n" not in prior.note
    ledger = Ledger(tmp_path / "study.db", study, lambda: prior.trials)
    known = [t for t in ledger.optuna_study.trials if t.state.name == "COMPLETE"]
    assert [(t.params, t.value) for t in known] == [(p.params, p.objective) for p in prior.trials]
    assert (ledger.trials(), ledger.best()) == ([], None)
    numbers = [trial.number for trial in (ledger.ask(), ledger.ask()) if trial is not None]
    assert numbers == [0, 3]
    assert ledger.ask() is None, "trials of the earlier study counted"
    ledger.finish(3, "done", objective=9.0)
    best = ledger.best()
    assert best is not None
    assert best.number == 3, "a better trial of the earlier study ranked"
    assert [trial.number for trial in ledger.finished_study().trials] == [0]


def test_the_sampler_searches_where_the_earlier_study_was_good(tmp_path: Path) -> None:
    prior = [PriorTrial(f"x#{i}", {"blend.beta": i * 0.05}, 1.0 + i * 0.05) for i in range(12)]
    changes: dict[str, Any] = {"trials": 6, "space": BETA, "include_base": False}
    ledger = Ledger(tmp_path / "warm.db", tiny_study(tmp_path, search=changes), lambda: prior)
    proposed = []
    while (trial := ledger.ask()) is not None:
        proposed.append(float(trial.params["blend.beta"]))  # type: ignore[arg-type]
    assert sum(proposed) / len(proposed) < 0.2, "0.3 is what chance alone would give"


def test_a_driver_that_died_while_learning_goes_on_where_it_was(tmp_path: Path) -> None:
    prior = [PriorTrial(f"x#{i}", {"blend.beta": i / 10}, 1.0) for i in range(4)]
    study = tiny_study(tmp_path, search={"space": BETA})
    Ledger(tmp_path / "study.db", study, lambda: prior[:2]).close()
    ledger = Ledger(tmp_path / "study.db", study, lambda: prior)
    assert len(ledger.optuna_study.trials) == 1 + 4
    assert ledger.ask() is not None

    def never() -> list[PriorTrial]:
        raise AssertionError("the earlier study is not needed any more")

    Ledger(tmp_path / "study.db", study, never).close()


def test_what_lies_outside_the_space_is_left_out_and_what_was_fixed_has_its_value(
    tmp_path: Path,
) -> None:
    earlier, made = finished_study(
        tmp_path, *["done"] * 6, search={"space": BETA, "startup_trials": 9}
    )
    narrow = {"blend.beta": {"type": "float", "low": 0.0, "high": 0.35}}
    heads = {"network.heads": {"type": "categorical", "choices": [2, 4]}}
    study = tiny_study(tmp_path, training={"epochs": 3}, search={"space": narrow | heads})
    prior = read_prior(earlier, study)
    assert {trial.params["network.heads"] for trial in prior.trials} == {made.network.heads}
    assert all(float(trial.params["blend.beta"]) <= 0.35 for trial in prior.trials)  # type: ignore[arg-type]
    assert f"left out: {6 - len(prior.trials)} whose blend.beta lies outside" in prior.note
    assert 0 < len(prior.trials) < 6
    assert "2 epochs (here 3)" in prior.note
    nothing = {"blend.beta": {"type": "float", "low": 0.599, "high": 0.6}}
    with pytest.raises(StudyError, match=r"no finished trial in this study's .*: 6 whose blend"):
        read_prior(earlier, tiny_study(tmp_path, search={"space": nothing}))


def test_no_run_and_another_objective_are_refused(tmp_path: Path) -> None:
    study = tiny_study(tmp_path)
    with pytest.raises(StudyError, match=r"search.warm_start: .*absent: no such folder"):
        read_prior(tmp_path / "absent", study)
    with pytest.raises(StudyError, match=r"search.warm_start: .*: holds no study"):
        read_prior(tmp_path, study)
    earlier, _ = finished_study(tmp_path, "done")
    with pytest.raises(StudyError, match=r"minimised 'nmse' and this study minimises 'gospa'"):
        read_prior(earlier, study.replaced({"objective": "gospa"}))
    with pytest.raises(StudyError, match=r"sampler random learns nothing from earlier"):
        study.replaced({"search.warm_start": earlier, "search.sampler": "random"})
    (earlier / "study.db").unlink()
    with pytest.raises(StudyError, match=r"no study.db there"):
        read_prior(earlier, study)


def test_where_and_whether_things_are_kept_sets_no_studies_apart(tmp_path: Path) -> None:
    study = tiny_study(tmp_path)
    other = study.replaced({"data.cache": str(tmp_path / "x"), "data.keep_images": False})
    assert not _differences(study, other)
    assert _differences(study, study.replaced({"data.val_scenes": 7})) == ["data"]


def test_ray_is_given_the_studys_own_trials_alone(tmp_path: Path) -> None:
    from tuner.search import LedgerSearch

    prior = [PriorTrial(f"x#{i}", {"blend.beta": i / 10}, 0.1) for i in range(3)]
    study = tiny_study(tmp_path, search={"space": BETA, "trials": 2})
    ledger = Ledger(tmp_path / "study.db", study, lambda: prior)
    search = LedgerSearch(ledger, Progress(study, []), RunFolder(tmp_path), device="cpu")
    assert [search.suggest("a")[NUMBER], search.suggest("b")[NUMBER]] == [0, 4]
    assert search.suggest("c") is None


def test_a_warm_started_study_needs_the_earlier_one_only_at_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tuner.local.TrialRun", FakeRun)
    earlier, _ = finished_study(tmp_path, "done", "done")
    config = write_study(tmp_path, search={"scheduler": "none", "trials": 2})
    out = tmp_path / "run"
    asked = ("--local", "--warm-start", earlier)
    bad = ("--config", config, "--out", out, *asked)
    assert run_here(*bad, "--set", "objective=f1") == 2
    assert not out.exists(), "something was started"
    assert run_here("--config", config, "--out", out, *asked) == 0
    assert "warm start: finished trials told to the sampler: 2" in capsys.readouterr().out
    earlier.rename(tmp_path / "gone")
    assert run_here("--resume", out, "--local", "--trials", 3) == 0
    assert run_here("--resume", out, *asked) == 2
    assert "--warm-start: cannot change with --resume" in capsys.readouterr().err
    with (out / "trials.csv").open() as stream:
        assert [row["trial"] for row in csv.DictReader(stream)] == ["0", "3", "4"]
    assert json.loads((out / "best.json").read_text())["trial"] in {0, 3, 4}
    assert load_study(out / "config.yaml").search.warm_start == earlier
