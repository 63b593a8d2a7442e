"""Tune on a Ray cluster that runs, and go on with the study if this script was cut off.

    python examples/tune_on_a_cluster.py --address HEAD:6379 --out /mnt/shared/runs/first

The run folder must lie where all machines of the cluster see it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tuner.folder import RunFolder
from tuner.session import Request, run_session

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"


def main() -> int:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--address", default="auto", help="host:port of the head")
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--config", type=Path, default=CONFIG)
    arguments.add_argument("--trials", type=int)
    arguments.add_argument("--set", action="append", default=[], dest="overrides")
    args = arguments.parse_args()

    options = {"search__trials": args.trials}
    if RunFolder(args.out).holds_study:
        request = Request(resume=args.out, options=options, address=args.address)
    else:
        request = Request(
            config=args.config,
            overrides=tuple(args.overrides),
            options=options,
            out=args.out,
            address=args.address,
        )
    return run_session(request)


if __name__ == "__main__":
    sys.exit(main())
