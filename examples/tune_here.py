"""Tune on this machine from Python, one trial after another, and look into the ledger.

python examples/tune_here.py [--trials 4] [--out runs/from-python]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tuner.config import load_study
from tuner.folder import RunFolder
from tuner.ledger import read_ledger
from tuner.session import Request, run_session

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"


def main() -> int:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--trials", type=int, default=4)
    arguments.add_argument("--out", type=Path, default=Path("runs/from-python"))
    arguments.add_argument("--set", action="append", default=[], dest="overrides")
    args = arguments.parse_args()

    # Without local=True the same study runs on Ray, on all CPUs or GPUs of this machine.
    code = run_session(
        Request(
            config=CONFIG,
            overrides=tuple(args.overrides),
            options={"search__trials": args.trials},
            out=args.out,
            local=True,
        )
    )
    folder = RunFolder.existing(args.out, lock=False)
    ledger = read_ledger(folder, load_study(folder.config))
    for trial in ledger.ranking():
        rate = trial.params.get("training.learning_rate")
        print(f"trial {trial.number}: objective {trial.objective:.4f}, learning rate {rate}")
    ledger.close()
    return code


if __name__ == "__main__":
    sys.exit(main())
