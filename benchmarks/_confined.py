"""Runs the tuner in a process that is given little: real faults, on purpose.

    python -m benchmarks._confined --memory-mb 400 -- --config study.yaml --local
    python -m benchmarks._confined --file-kb 64 -- --resume runs/study --local

Memory is limited beyond what the process has once everything is imported and a small trial has
trained; then an allocator fails as on a machine that is full. No file may grow beyond its limit:
the kernel refuses the write (EFBIG), as a full disk does (ENOSPC).
"""

from __future__ import annotations

import argparse
import resource
import signal
import sys
from pathlib import Path

from model import TrialConfig
from model.training import Trainer
from tuner.command import execute
from tuner.run import app


def main() -> int:
    """Limit this process, then run `python -m tuner.run` in it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--memory-mb", type=int)
    parser.add_argument("--file-kb", type=int)
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    asked = parser.parse_args()
    arguments = [argument for argument in asked.arguments if argument != "--"]
    if asked.memory_mb is not None:
        confine_memory(asked.memory_mb)
    if asked.file_kb is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails, the process survives
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked.file_kb * 1024,) * 2)
    return execute(app, arguments)


def confine_memory(megabytes: int) -> None:
    """Limit this process to the memory of a small training plus the given amount."""
    _warm_up()
    limit = _address_space() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _warm_up() -> None:
    """Allocate what every training allocates once: imports, threads, scratch space."""
    import plotly.offline  # noqa: F401
    import sqlalchemy.dialects.sqlite  # noqa: F401

    import tuner.session  # noqa: F401

    data = {"train_scenes": 8, "val_scenes": 4}
    config = {"data": data, "training": {"batch_size": 4, "epochs": 1}}
    Trainer(TrialConfig.model_validate(config)).run_epoch()


def _address_space() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmSize"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
