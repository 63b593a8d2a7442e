from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState, create_trial

from model import Trainer
from tests.tuner.support import tiny_study
from tuner.folder import RunFolder
from tuner.results import drop_losers, write_best, write_trials
from tuner.study import Ledger


def test_checkpoints_are_kept_of_the_winner_and_of_what_runs_however_many_trials(
    tmp_path: Path,
) -> None:
    study = tiny_study(tmp_path, search={"trials": 20_000, "startup_trials": 20_000})
    folder = RunFolder.fresh(tmp_path / "run")
    ledger = Ledger(InMemoryStorage(), study)

    def checkpoint(name: str) -> Path:
        path = folder.trials / name
        path.mkdir(parents=True)
        return path

    assert [trial.number for trial in (ledger.ask(), ledger.ask()) if trial] == [0, 1]
    names = ("0000/checkpoint-00002", "0000/checkpoint-00001", "0001/checkpoint-00002")
    won, before, lost = (checkpoint(name) for name in names)
    ledger.report(0, {"epoch": 2, "objective": 1.0}, str(won))
    ledger.finish(0, "done", objective=1.0)
    ledger.finish(1, "done", objective=2.0)
    ended = create_trial(state=TrialState.FAIL, user_attrs={"seed": 0, "budget": 2})
    ledger.optuna_study.add_trials([ended] * 9998)
    running = ledger.ask()
    assert running is not None
    assert running.number == 10_000  # its name begins as that of trial 1000, which has ended
    names = ("10000/checkpoint-00001", "10000/checkpoint-00002", "1000/checkpoint-00001")
    alive, newer, dead = (checkpoint(name) for name in names)
    drop_losers(folder, ledger, ledger.best())
    assert [path.exists() for path in (won, alive, newer)] == [True] * 3
    assert [path.exists() for path in (before, lost, dead)] == [False] * 3
    ledger.report(10_000, {"epoch": 2, "objective": 3.0}, str(newer))
    drop_losers(folder, ledger, ledger.best())
    assert [path.exists() for path in (won, alive, newer)] == [True, False, True]
    ledger.close()


def test_the_winners_measures_are_those_of_the_weights_that_are_kept(tmp_path: Path) -> None:
    folder = RunFolder.fresh(tmp_path / "run")
    ledger = Ledger(InMemoryStorage(), tiny_study(tmp_path))
    assert ledger.ask() is not None
    for epoch, (best, f1) in enumerate([(2.0, 0.5), (1.0, 0.75), (1.0, 0.625)], start=1):
        ledger.report(0, {"epoch": epoch, "objective": best, "f1": f1, "skipped_steps": epoch})
    ledger.finish(0, "done", objective=1.0)
    write_best(folder, ledger)
    best = json.loads(folder.best_json.read_text())
    assert (best["metrics"]["epoch"], best["metrics"]["f1"]) == (2, 0.75)
    write_trials(folder, ledger)
    (row,) = csv.DictReader(folder.trials_csv.open(newline=""))
    assert (row["f1"], row["epochs"], row["skipped_steps"]) == ("0.75", "3", "3")
    ledger.close()


def trained(folder: Path, ledger: Ledger, objective: float) -> Path:
    """One more trial of the ledger, with the checkpoint of a training."""
    trial = ledger.ask()
    assert trial is not None
    config = ledger.trial_config(trial)
    trainer = Trainer(config, "cpu")
    trainer.run_epoch()
    place = folder / "trials" / f"{trial.number:04d}" / "checkpoint-00001"
    trainer.save(place)
    ledger.report(trial.number, {"epoch": 1, "objective": objective}, str(place))
    ledger.finish(trial.number, "done", objective=objective)
    return place


def weights(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.iterdir()))


def test_what_best_json_describes_is_what_best_holds_at_any_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.fresh(tmp_path / "run")
    ledger = Ledger(InMemoryStorage(), tiny_study(tmp_path, training={"epochs": 1}))
    trained(folder.path, ledger, 2.0)
    write_best(folder, ledger)
    first = weights(folder.best)
    trained(folder.path, ledger, 1.0)

    def dies(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # the driver dies between the two
        patch.setattr("tuner.results.write_text", dies)
        with pytest.raises(KeyboardInterrupt):
            write_best(folder, ledger)
    write_best(folder, ledger)
    assert json.loads(folder.best_json.read_text())["trial"] == 1
    second = weights(folder.best)
    assert second != first
    assert json.loads((folder.best / "config.json").read_text())["seed"] == ledger.trial(1).seed
    written = folder.best.stat().st_ino
    write_best(folder, ledger)
    assert folder.best.stat().st_ino == written, "nothing has changed, and it is written again"
    # Of an earlier version, which wrote best/ at the end of a session alone:
    json_text = folder.best_json.read_text()
    for path in folder.best.iterdir():
        path.unlink()
    (folder.best / "config.json").write_text(json.dumps({"seed": -1}))
    write_best(folder, ledger)
    assert weights(folder.best) == second
    assert folder.best_json.read_text() == json_text
    ledger.close()


def test_a_winner_whose_network_is_out_of_reach_has_no_other_ones(tmp_path: Path) -> None:
    folder = RunFolder.fresh(tmp_path / "run")
    ledger = Ledger(InMemoryStorage(), tiny_study(tmp_path, training={"epochs": 1}))
    trained(folder.path, ledger, 2.0)
    write_best(folder, ledger)
    first = weights(folder.best)
    place = trained(folder.path, ledger, 1.0)
    place.rename(tmp_path / "away")
    write_best(folder, ledger)
    assert json.loads(folder.best_json.read_text())["trial"] == 1
    assert not folder.best.exists()
    assert weights(folder.earlier_best) == first
    (tmp_path / "away").rename(place)
    write_best(folder, ledger)
    second = weights(folder.best)
    assert not folder.earlier_best.exists()
    place.rename(tmp_path / "away")  # out of reach again, and what best.json says has changed
    folder.best_json.write_text("{}")
    write_best(folder, ledger)
    assert weights(folder.best) == second, "it is the winner's"
    assert json.loads(folder.best_json.read_text())["trial"] == 1
    ledger.close()
