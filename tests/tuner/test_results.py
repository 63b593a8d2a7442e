from __future__ import annotations

from pathlib import Path

from optuna.storages import InMemoryStorage
from optuna.trial import TrialState, create_trial

from tests.tuner.support import tiny_study
from tuner.folder import RunFolder
from tuner.results import drop_losers
from tuner.study import Ledger


def test_checkpoints_are_kept_of_the_winner_and_of_what_runs_however_many_trials(
    tmp_path: Path,
) -> None:
    study = tiny_study(tmp_path, search={"trials": 20_000, "startup_trials": 20_000})
    folder = RunFolder.fresh(tmp_path / "run")
    ledger = Ledger(InMemoryStorage(), study)

    def checkpoint(name: str) -> Path:
        path = folder.trials / name / "checkpoint_000001"
        path.mkdir(parents=True)
        return path

    assert [trial.number for trial in (ledger.ask(), ledger.ask()) if trial] == [0, 1]
    won, lost, again = (checkpoint(name) for name in ("0000", "0001", "0001-after-epoch-1"))
    ledger.checkpointed(0, str(won), 2)
    ledger.finish(0, "done", objective=1.0)
    ledger.finish(1, "done", objective=2.0)
    ended = create_trial(state=TrialState.FAIL, user_attrs={"seed": 0, "budget": 2})
    ledger.optuna_study.add_trials([ended] * 9998)
    running = ledger.ask()
    assert running is not None
    assert running.number == 10_000  # its name begins as that of trial 1000, which has ended
    alive, resumed, dead = (checkpoint(n) for n in ("10000", "10000-after-epoch-1", "1000"))
    drop_losers(folder, ledger, ledger.best())
    assert [path.exists() for path in (won, alive, resumed)] == [True] * 3
    assert [path.exists() for path in (lost, again, dead)] == [False] * 3
    ledger.close()
