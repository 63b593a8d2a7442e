"""What is written for TensorBoard; tests of whole studies (test_local.py, test_distributed.py)
compare it with the ledger of a run that was killed and went on."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from tests.tuner.events import scalars
from tests.tuner.support import tiny_study
from tuner.study import Ledger
from tuner.tensorboard import TensorBoardLog
from tuner.watchers import Watchers


def metrics(epoch: int, objective: float, **more: Any) -> dict[str, Any]:
    return {"epoch": epoch, "objective": objective, **more}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "study.db", tiny_study(tmp_path))


def tell(ledger: Ledger, log: TensorBoardLog, number: int, *epochs: dict[str, Any]) -> None:
    for epoch in epochs:
        ledger.report(number, epoch)
        log.reported(number, epoch)


def test_a_resumed_trial_goes_on_without_doubling_steps(tmp_path: Path, ledger: Ledger) -> None:
    assignment = ledger.ask()
    assert assignment is not None
    folder = tmp_path / "tensorboard"
    log = TensorBoardLog(ledger, folder)
    tell(ledger, log, 0, metrics(1, 3.0), metrics(2, 2.0), metrics(3, 1.5))
    # Cut before the third epoch's checkpoint: the next session runs it again.
    again = TensorBoardLog(ledger, folder)
    tell(ledger, again, 0, metrics(3, 1.25), metrics(4, 1.0))
    wanted = [(1, 3.0), (2, 2.0), (3, 1.25), (4, 1.0)]
    assert scalars(folder / "trial-0000") == {"objective": wanted}


def test_a_lost_machine_doubles_no_steps_either(tmp_path: Path, ledger: Ledger) -> None:
    for _ in range(2):
        ledger.ask()
    log = TensorBoardLog(ledger, tmp_path)
    tell(ledger, log, 0, metrics(1, 3.0), metrics(2, 2.0))
    tell(ledger, log, 1, metrics(1, 5.0))
    tell(ledger, log, 0, metrics(1, 3.0), metrics(2, 2.5))
    assert scalars(tmp_path / "trial-0000") == {"objective": [(1, 3.0), (2, 2.5)]}
    assert scalars(tmp_path / "trial-0001") == {"objective": [(1, 5.0)]}


def test_an_epoch_can_be_seen_at_once_and_only_finite_numbers_are_written(
    tmp_path: Path, ledger: Ledger
) -> None:
    ledger.ask()
    log = TensorBoardLog(ledger, tmp_path)
    Watchers(log).finished(7, "failed", "it never began")
    assert not (tmp_path / "trial-0007").exists()
    tell(ledger, log, 0, metrics(1, 3.0, f1=math.nan, node="here", early_stopped=False))
    assert scalars(tmp_path / "trial-0000") == {"objective": [(1, 3.0)]}


def test_an_epoch_costs_next_to_nothing(tmp_path: Path, ledger: Ledger) -> None:
    ledger.ask()
    log = TensorBoardLog(ledger, tmp_path)
    many = {f"metric_{i}": float(i) for i in range(30)}
    log.reported(0, metrics(1, 1.0, **many))
    started = time.process_time()
    for epoch in range(2, 102):
        log.reported(0, metrics(epoch, 1.0, **many))
    assert (time.process_time() - started) / 100 < 0.02  # seconds; a report to Ray costs 0.004
