from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import InMemoryStorage

from model import Localizer
from tests.tuner.events import assert_mirrors_the_ledger, scalars
from tests.tuner.support import (
    ROOT,
    FakeRun,
    environment,
    kill,
    read_until,
    run,
    run_here,
    start,
    tiny_study,
    write_study,
)
from tuner.config import load_study
from tuner.folder import RunFolder
from tuner.local import run_local
from tuner.study import Ledger
from tuner.trial import DeviceLost
from tuner.watchers import Watcher

FILES = ["best", "best.json", "config.yaml", "evaluation.csv", "evaluation.html",
         "evaluation.json", "report.html", "scenes.json", "study.db", "tensorboard", "trials",
         "trials.csv", "tuner.log"]  # fmt: skip


def ledger_of(folder: Path) -> Ledger:
    return Ledger(folder / "study.db", load_study(folder / "config.yaml"))


def test_the_local_mode_imports_no_ray_and_fills_the_run_folder(tmp_path: Path) -> None:
    arguments = ["--config", str(write_study(tmp_path)), "--local", "--out", str(tmp_path / "run")]
    code = (
        "import sys\n"
        "from tuner.command import execute\n"
        "from tuner.run import app\n"
        f"code = execute(app, {arguments!r})\n"
        "assert 'ray' not in sys.modules\n"
        "sys.exit(code)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    present = sorted(p.name for p in (tmp_path / "run").iterdir() if not p.name.startswith("."))
    assert present == FILES
    assert load_study(tmp_path / "run" / "config.yaml") == tiny_study(tmp_path)
    Localizer.load(tmp_path / "run" / "best")


def test_a_search_reports_what_was_located_and_ends_with_its_winner_beside_nomp(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_study(tmp_path)
    assert run_here("--config", config, "--local", "--out", tmp_path / "run") == 0
    with (tmp_path / "run" / "trials.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        assert 0.0 <= float(row["f1"]) <= 1.0
        assert float(row["gospa"]) > 0.0
    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    methods = scores["suites"]["nominal"]["methods"]
    assert list(methods) == ["network", "network+refinement", "nomp"]
    shown = capsys.readouterr().out
    for name, report in methods.items():
        overall = report["overall"]
        assert f"{name}: F1 {overall['f1']:.3f}, GOSPA {overall['gospa_m']:.2f} m" in shown
    assert "winner beside NOMP, both told the SNR; scenes: 256 simulated" in shown
    best = ledger_of(tmp_path / "run").best()
    assert best is not None
    for metrics in best.epochs.values():
        assert {"f1", "gospa", "count_accuracy", "nmse_blend"} <= metrics.keys()


def test_a_search_says_when_training_did_not_help(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_study(tmp_path, search={"trials": 1})
    space = "search.space={training.learning_rate: {type: categorical, choices: [1e-30, 1e-29]}}"
    searched = ("--config", config, "--local")
    assert run_here(*searched, "--out", tmp_path / "still", "--set", space) == 0
    assert "training did not help: the winner is no better than before" in capsys.readouterr().out
    assert run_here(*searched, "--out", tmp_path / "run") == 0
    assert "training did not help" not in capsys.readouterr().out


def test_the_local_mode_stops_trials(tmp_path: Path) -> None:
    config = write_study(
        tmp_path,
        search={
            "trials": 8,
            "grace_epochs": 1,
            "reduction_factor": 2,
            "space": {"training.learning_rate": {"type": "float", "low": 1e-6, "high": 1e-1,
                                                 "log": True}},
        },
        training={"epochs": 4},
    )  # fmt: skip
    assert run_here("--config", config, "--local", "--out", tmp_path / "run") == 0
    states = [trial.state for trial in ledger_of(tmp_path / "run").trials()]
    assert "pruned" in states
    assert "done" in states


@pytest.mark.parametrize("scheduler", ["hyperband", "median"])
def test_other_rules_stop_what_is_worse_and_never_what_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str
) -> None:
    monkeypatch.setattr("tuner.local.TrialRun", FakeRun)
    monkeypatch.setattr("tuner.conclusion._score_winner", lambda folder, study, progress: None)
    betas = [0.0, 0.02, 0.04, 0.5, 0.55]  # the lower, the better
    config = write_study(
        tmp_path,
        training={"epochs": 4},
        search={
            "trials": len(betas),
            "reduction_factor": 2,
            "scheduler": scheduler,
            "include_base": False,
            "enqueue": [{"blend.beta": beta} for beta in betas],
            "space": {"blend.beta": {"type": "float", "low": 0.0, "high": 0.6}},
        },
    )
    assert run_here("--config", config, "--local", "--out", tmp_path / "run") == 0
    ledger = ledger_of(tmp_path / "run")
    states = [trial.state for trial in ledger.trials()]
    assert states[0] == "done"
    assert "pruned" in states[3:]
    assert {trial.state for trial in ledger.ranking()} == {"done"}
    assert json.loads((tmp_path / "run" / "best.json").read_text())["trial"] == 0


@pytest.mark.parametrize("least_chance", [0.0, 0.3])
def test_a_driver_that_died_after_an_epoch_goes_on_as_if_it_had_lived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least_chance: float
) -> None:
    """After every epoch in turn: the study ends as one whose driver lived."""
    monkeypatch.setattr("tuner.local.TrialRun", FakeRun)
    changes = {
        "trials": 8, "grace_epochs": 1, "reduction_factor": 2, "sampler": "random",
        "least_chance": least_chance, "scheduler": "none" if least_chance else "asha",
        "space": {"blend.beta": {"type": "float", "low": 0.0, "high": 0.6}},
    }  # fmt: skip
    study = tiny_study(tmp_path, search=changes, training={"epochs": 4})

    def go(storage: InMemoryStorage, name: str) -> list[Any]:
        ledger, home = Ledger(storage, study), RunFolder(tmp_path / name)
        run_local(ledger, home, Watcher(), device="cpu", stop=lambda: False, after=lambda: None)
        return [(t.number, t.state, t.curve, t.reason) for t in ledger.trials()]

    class Dead(BaseException):
        pass

    whole, report, met = go(InMemoryStorage(), "whole"), Ledger.report, 0
    assert any(state == "pruned" for _, state, _, _ in whole)
    for at in range(sum(len(curve) for _, _, curve, _ in whole)):
        storage, left = InMemoryStorage(), [at]

        def dying(ledger: Ledger, *told: Any, left: list[int] = left) -> str | None:
            stopped = report(ledger, *told)
            left[0] -= 1
            if left[0] == -1:
                raise Dead
            return stopped

        monkeypatch.setattr(Ledger, "report", dying)
        try:
            go(storage, f"cut-{at}")
        except Dead:
            met += 1
            assert go(storage, f"cut-{at}") == whole, at
    assert met > 10


def test_a_killed_local_run_goes_on_and_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    config = write_study(tmp_path, training={"epochs": 6}, search={"scheduler": "none"})
    whole = run("--config", config, "--local", "--out", tmp_path / "whole")
    assert whole.returncode == 0
    process = start("--config", config, "--local", "--out", tmp_path / "cut")
    read_until(process, "trial 0001 epoch 3/6")
    kill(process)
    resumed = run("--resume", tmp_path / "cut", "--local")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "trial 0001 goes on after epoch" in resumed.stdout
    assert "trial 0000 starts" not in resumed.stdout
    outcomes = [
        [(t.number, t.state, t.seed, t.params, t.curve) for t in ledger_of(tmp_path / n).trials()]
        for n in ("whole", "cut")
    ]
    assert outcomes[0] == outcomes[1]
    assert_mirrors_the_ledger(tmp_path / "cut")
    first = scalars(tmp_path / "cut" / "tensorboard" / "trial-0000")
    assert {"objective", "nmse_pred", "f1", "gospa", "loss", "learning_rate"} <= set(first)


def test_ctrl_c_ends_with_130_and_prints_how_to_go_on(tmp_path: Path) -> None:
    config = write_study(tmp_path, training={"epochs": 400}, search={"scheduler": "none"})
    process = start("--config", config, "--local", "--out", tmp_path / "run")
    read_until(process, "trial 0000 epoch 2/400")
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert f"python -m tuner.run --resume {tmp_path / 'run'}" in output
    assert [trial.state for trial in ledger_of(tmp_path / "run").trials()] == ["running"]
    assert (tmp_path / "run" / "trials.csv").exists()


def test_a_finished_study_only_reports_and_can_be_extended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_study(tmp_path, search={"trials": 2})
    assert run_here("--config", config, "--local", "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert run_here("--resume", tmp_path / "run", "--local") == 0
    assert "starts" not in capsys.readouterr().out
    assert run_here("--resume", tmp_path / "run", "--local", "--trials", 3) == 0
    said = capsys.readouterr().out
    assert "trial 0002 starts" in said
    assert "trial 0001 starts" not in said
    assert load_study(tmp_path / "run" / "config.yaml").search.trials == 3


def test_a_second_driver_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_study(tmp_path, training={"epochs": 400}, search={"scheduler": "none"})
    process = start("--config", config, "--local", "--out", tmp_path / "run")
    try:
        read_until(process, "trial 0000 epoch 1/400")
        assert run_here("--resume", tmp_path / "run", "--local") == 2
        assert f"another run (process {process.pid} on " in capsys.readouterr().err
        assert run_here("--config", config, "--local", "--out", tmp_path / "run") == 2
    finally:
        kill(process)


def test_a_crash_never_ranks_best_and_the_search_goes_on(tmp_path: Path) -> None:
    space = {"training.learning_rate": {"type": "float", "low": 1e-4, "high": 1e31, "log": True}}
    config = write_study(
        tmp_path,
        training={"gradient_clip": 1e30, "max_skipped_steps": 1},
        search={"space": space, "enqueue": [{"training.learning_rate": 1e30}], "trials": 2},
    )
    assert run_here("--config", config, "--local", "--out", tmp_path / "run") == 0
    trials = ledger_of(tmp_path / "run").trials()
    assert [trial.state for trial in trials] == ["done", "failed"]
    assert str(trials[1].reason).startswith("diverged")
    assert (tmp_path / "run" / "trials" / "0001" / "error.txt").read_text().strip()
    assert json.loads((tmp_path / "run" / "best.json").read_text())["trial"] == 0


def test_only_the_winners_checkpoint_is_kept(tmp_path: Path) -> None:
    config = write_study(tmp_path)
    assert run_here("--config", config, "--local", "--out", tmp_path / "run") == 0
    kept = list((tmp_path / "run" / "trials").glob("*/checkpoint*"))
    best = json.loads((tmp_path / "run" / "best.json").read_text())["trial"]
    assert [path.parent.name for path in kept] == [f"{best:04d}"]


def test_a_gpu_that_no_longer_answers_ends_the_session_and_fails_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(FakeRun):
        def step(self) -> dict[str, object]:
            if self.epoch == 1:
                raise DeviceLost("cuda of this-host no longer answers: CUDA error: ECC")
            return super().step()

    monkeypatch.setattr("tuner.local.TrialRun", Broken)
    out = tmp_path / "run"
    assert run_here("--config", write_study(tmp_path), "--local", "--out", out) == 2
    said = capsys.readouterr().err
    assert "cuda of this-host no longer answers" in said
    assert f"python -m tuner.run --resume {out}" in said
    assert "Traceback" not in said
    assert [trial.state for trial in ledger_of(out).trials()] == ["running"]
