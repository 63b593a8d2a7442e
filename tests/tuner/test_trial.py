from __future__ import annotations

import errno
import gc
import math
import shutil
import weakref
from bdb import BdbQuit
from pathlib import Path
from typing import Any

import pytest

from model.config import TrialConfig
from model.training import Trainer
from tests.tuner.support import tiny_study
from tuner.disk import speaks_of_full_disk
from tuner.trial import DiskExhausted, TrialRun


def config(folder: Path, **changes: Any) -> TrialConfig:
    return tiny_study(folder, **changes).trial_config({}, seed=5)


def test_a_trial_reports_its_trainers_metrics_until_it_has_finished(tmp_path: Path) -> None:
    trial = config(tmp_path)
    trainer = Trainer(trial)
    wanted = [trainer.run_epoch()["objective"] for _ in range(2)]
    run = TrialRun(trial)
    results = [run.step(), run.step()]
    assert [result["objective"] for result in results] == wanted
    assert [result["finished"] for result in results] == [False, True]
    assert not any(result["failed"] for result in results)


def test_a_diverging_trial_fails_with_its_reason_and_no_score(tmp_path: Path) -> None:
    training = {"learning_rate": 1e30, "gradient_clip": 1e30, "epochs": 5, "max_skipped_steps": 2}
    run = TrialRun(config(tmp_path, training=training))
    result: dict[str, Any] = {"failed": False, "finished": False}
    while not (result["failed"] or result["finished"]):
        result = run.step()
    assert result["failed"]
    assert result["reason"].startswith("diverged: ")
    assert math.isnan(result["objective"])
    assert not run.save(tmp_path / "checkpoint")


def test_bad_data_fails_the_trial_with_words(tmp_path: Path) -> None:
    result = TrialRun(config(tmp_path, data={"shards": str(tmp_path / "absent")})).step()
    assert result["failed"]
    assert result["reason"].startswith("data: ")
    assert "absent" in result["reason"]


def test_leaving_the_debugger_ends_the_session_and_fails_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def left(self: Trainer) -> dict[str, Any]:
        raise BdbQuit

    monkeypatch.setattr(Trainer, "run_epoch", left)
    with pytest.raises(KeyboardInterrupt):
        TrialRun(config(tmp_path)).step()


def test_an_exception_of_the_users_own_fails_the_trial_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Trainer) -> dict[str, Any]:
        raise ZeroDivisionError("division by zero\nin two lines")

    monkeypatch.setattr(Trainer, "run_epoch", broken)
    result = TrialRun(config(tmp_path)).step()
    assert result["failed"]
    assert result["reason"] == "ZeroDivisionError: division by zero in two lines"
    assert "Traceback" in result["traceback"]


def test_a_full_disk_is_no_trials_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchInductor's cache, say, or what a plug-in writes."""

    def full(self: Trainer) -> dict[str, Any]:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/tmp/cache")
        except OSError as error:
            raise RuntimeError("the backend failed") from error

    monkeypatch.setattr(Trainer, "run_epoch", full)
    with pytest.raises(DiskExhausted) as caught:
        TrialRun(config(tmp_path)).step()
    assert speaks_of_full_disk(str(caught.value)), "by its words Ray's driver knows it"


def test_a_trial_goes_on_from_its_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    trial = config(tmp_path, training={"epochs": 3})
    whole = TrialRun(trial)
    wanted = [whole.step()["objective"] for _ in range(3)]
    first = TrialRun(trial)
    first.step()
    assert first.save(tmp_path / "checkpoint")
    first.close()
    second = TrialRun(trial, checkpoint=tmp_path / "checkpoint")
    results = [second.step(), second.step()]
    assert [result["epoch"] for result in results] == [2, 3]
    assert [result["objective"] for result in results] == wanted[1:]


def test_one_trial_after_another_leaves_no_trainer_behind(tmp_path: Path) -> None:
    for _ in range(3):
        run = TrialRun(config(tmp_path))
        run.step()
        trainer = run._trainer
        assert trainer is not None
        trainer.itself = trainer  # type: ignore[attr-defined]  # a cycle, as exceptions make
        seen = weakref.ref(trainer)
        del trainer
        run.close()
        assert seen() is None
    assert gc.get_freeze_count() > 10_000, "modules are looked through again for every trial"


def test_a_damaged_checkpoint_means_a_start_from_the_beginning(tmp_path: Path) -> None:
    trial = config(tmp_path)
    first = TrialRun(trial)
    objective = first.step()["objective"]
    first.save(tmp_path / "checkpoint")
    for path in (tmp_path / "checkpoint").iterdir():
        path.write_bytes(b"torn")
    again = TrialRun(trial, checkpoint=tmp_path / "checkpoint").step()
    assert (again["epoch"], again["objective"]) == (1, objective)


def test_a_trial_cut_after_its_last_epoch_only_tells_its_score(tmp_path: Path) -> None:
    trial = config(tmp_path)
    run = TrialRun(trial)
    run.step()
    objective = run.step()["objective"]
    run.save(tmp_path / "checkpoint")
    again = TrialRun(trial, checkpoint=tmp_path / "checkpoint").step()
    assert again["finished"]
    assert again["repeated"]
    assert (again["epoch"], again["objective"]) == (2, objective)


def donor_in(folder: Path) -> Path:
    """A checkpoint of another trial after two epochs."""
    donor = TrialRun(config(folder, training={"epochs": 4}))
    donor.step()
    donor.step()
    assert donor.save(folder / "donor")
    return folder / "donor"


def heir_config(folder: Path) -> TrialConfig:
    changed = {"training": {"epochs": 4, "learning_rate": 2e-3}, "blend": {"beta": 0.1}}
    return tiny_study(folder, **changed).trial_config({}, seed=6)


def test_an_heir_begins_with_its_donors_weights_and_goes_on_from_its_own(tmp_path: Path) -> None:
    donor = donor_in(tmp_path)
    trainer = Trainer(heir_config(tmp_path))
    trainer.inherit(donor)
    wanted = [trainer.run_epoch()["objective"] for _ in range(2)]
    heir = TrialRun(heir_config(tmp_path), donor=donor)
    first = heir.step()
    assert (first["epoch"], first["objective"]) == (3, wanted[0])
    heir.save(tmp_path / "own")
    shutil.rmtree(donor)
    second = TrialRun(heir_config(tmp_path), checkpoint=tmp_path / "own", donor=donor).step()
    assert (second["epoch"], second["objective"]) == (4, wanted[1])


def test_the_beginning_of_an_heir_is_its_donor_and_nothing_else(tmp_path: Path) -> None:
    donor = donor_in(tmp_path)
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "checkpoint.safetensors").write_bytes(b"torn")
    again = TrialRun(heir_config(tmp_path), checkpoint=torn, donor=donor).step()
    assert again["epoch"] == 3
    shutil.rmtree(donor)
    for checkpoint in (None, torn):
        lost = TrialRun(heir_config(tmp_path), checkpoint=checkpoint, donor=donor).step()
        assert lost["failed"], "it began with new weights"
        assert "no such file" in lost["reason"]


def test_an_heir_of_another_network_fails_with_the_field(tmp_path: Path) -> None:
    wide = config(tmp_path, training={"epochs": 4}, network={"width": 16})
    result = TrialRun(wide, donor=donor_in(tmp_path)).step()
    assert result["failed"]
    assert "weights of another kind: network.width is 8 there and 16 here" in result["reason"]


def test_a_later_checkpoint_takes_the_place_of_what_was_begun_with(tmp_path: Path) -> None:
    donor = donor_in(tmp_path)
    before = TrialRun(heir_config(tmp_path), donor=donor)
    before.step()
    before.save(tmp_path / "own")
    begun = TrialRun(heir_config(tmp_path), donor=donor)
    begun.build()
    assert begun.epoch == 2
    again = TrialRun(heir_config(tmp_path), checkpoint=tmp_path / "own", donor=donor)
    again.build()
    assert again.epoch == 3
