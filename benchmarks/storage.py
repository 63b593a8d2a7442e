"""The ledger in SQLite, in SQLite with a write-ahead log, and in Optuna's journal file.

    python -m benchmarks.storage [--trials 100 1000] [--kills 20] [--json FILE]

Each storage is timed with 0 and 4 processes that read the whole ledger continuously, as the report
and dashboards do: a report (an epoch's metrics and its checkpoint), a proposal with its end (drawn
at random, so that the storage is timed and not the sampler), and opening and reading the ledger.
Then a writing process is repeatedly killed with kill -9, or its file is not allowed to grow, as on
a full disk. The benchmark checks whether the ledger is readable, whether any acknowledged write is
lost, and how long it takes until the ledger can be written again.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import multiprocessing.context
import os
import resource
import shutil
import sqlite3
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import create_trial

from tuner.config import StudyConfig
from tuner.space import suggest
from tuner.storage import PatientStorage, open_storage, sqlite_url
from tuner.study import Ledger

EPOCHS = 16
READERS = 4
_FILLED = 100  # trials that are written one by one before they are copied
_PAUSE = 2.0  # seconds between two reads of a reader
_METRICS = ("loss", "nmse_pred", "nmse_blend", "f1", "gospa", "count_accuracy", "grad_norm",
            "grad_norm_max", "learning_rate", "epoch_seconds", "gpu_seconds", "scenes_per_second",
            "loss_cov_pred", "loss_existence", "loss_position", "untrained_objective")  # fmt: skip


def _sqlite(folder: Path) -> PatientStorage:
    return open_storage(sqlite_url(folder / "study.db"))


def _wal(folder: Path) -> PatientStorage:
    with sqlite3.connect(folder / "study.db") as connection:
        connection.execute("PRAGMA journal_mode = WAL")  # stored in the file
    return _sqlite(folder)


def _journal(folder: Path) -> PatientStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storage = JournalStorage(JournalFileBackend(str(folder / "study.journal")))
    return PatientStorage(storage, "study.journal")  # type: ignore[abstract]


STORAGES: dict[str, Callable[[Path], PatientStorage]] = {
    "SQLite": _sqlite,
    "SQLite, WAL": _wal,
    "journal file": _journal,
}


def study(trials: int) -> StudyConfig:
    """The default search space with enough trials to propose."""
    changes = {"search.sampler": "random", "search.trials": trials, "search.include_base": False}
    return StudyConfig().replaced(changes)


def metrics(epoch: int) -> dict[str, Any]:
    """As many numbers as an epoch reports."""
    return {"epoch": epoch, "objective": 1.0 / epoch, "node": "node-17", "device": "cuda",
            **dict.fromkeys(_METRICS, 0.123456789 * epoch)}  # fmt: skip


def opened(name: str, folder: Path) -> Ledger:
    return Ledger(STORAGES[name](folder), study(10**6))


def fill(ledger: Ledger, trials: int) -> None:
    """Add finished trials with all their epochs."""
    drawing = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for number in range(trials):
        drawn = drawing.ask()
        suggest(ledger.config.search.space, drawn)
        ledger.optuna_study.add_trial(
            create_trial(
                value=1.0 + number,
                params=drawn.params,
                distributions=drawn.distributions,
                user_attrs={
                    "seed": 1,
                    "budget": EPOCHS,
                    **{f"epoch/{e:05d}": metrics(e) for e in range(1, EPOCHS + 1)},
                },
                intermediate_values={e: 1.0 / e for e in range(1, EPOCHS + 1)},
            )
        )


def multiply(database: Path, times: int) -> None:
    """Copy all trials in the database, since a thousand take minutes through Optuna."""
    tables = ("trial_params", "trial_values", "trial_user_attributes", "trial_intermediate_values")
    with sqlite3.connect(database) as connection:
        (count,) = connection.execute("SELECT max(trial_id) FROM trials").fetchone()
        for copy in range(1, times):
            shift = copy * count
            connection.execute(
                "INSERT INTO trials (trial_id, number, study_id, state, datetime_start, "
                f"datetime_complete) SELECT trial_id + {shift}, number + {shift}, study_id, state, "
                f"datetime_start, datetime_complete FROM trials WHERE trial_id <= {count}"
            )
            for table in tables:
                rows = connection.execute(f"PRAGMA table_info({table})").fetchall()
                names = ", ".join(row[1] for row in rows if row[1] != "trial_id" and not row[5])
                connection.execute(
                    f"INSERT INTO {table} (trial_id, {names}) SELECT trial_id + {shift}, {names} "
                    f"FROM {table} WHERE trial_id <= {count}"
                )


def _processes() -> multiprocessing.context.ForkServerContext:
    """Context of processes that start with all imports done, so that imports are not timed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tuner.study", "optuna.storages.journal"])
    return context


def _read(name: str, folder: Path, stop: Any, errors: Any, readings: Any) -> None:
    while not stop.is_set():
        try:
            ledger = opened(name, folder)
            ledger.ranking()
            ledger.close()
            with readings.get_lock():
                readings.value += 1
        except Exception:  # noqa: BLE001 - whatever it is, it is counted and shown
            with errors.get_lock():
                errors.value += 1
        stop.wait(_PAUSE)


@contextmanager
def reading(name: str, folder: Path, count: int) -> Iterator[tuple[Any, Any]]:
    """Run processes that read the ledger continuously."""
    context = _processes()
    stop, errors, readings = context.Event(), context.Value("i", 0), context.Value("i", 0)
    arguments = (name, folder, stop, errors, readings)
    processes = [context.Process(target=_read, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        while readings.value + errors.value < count:
            time.sleep(0.1)
        yield errors, readings
    finally:
        stop.set()
        for process in processes:
            process.join()


class _Outages(logging.Handler):
    """Counts the attempts that failed because the database was locked."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


def timed(call: Callable[[], Any], count: int) -> list[float]:
    """Milliseconds of each call."""
    found = []
    for _ in range(count):
        begun = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - begun))
    return found


def speed(name: str, folder: Path, readers: int, rounds: int) -> dict[str, Any]:
    """Times of all operations at the ledger's size."""
    outages = _Outages()
    log = logging.getLogger("tuner.storage")
    log.addHandler(outages)
    log.setLevel(logging.INFO)
    log.propagate = False
    with reading(name, folder, readers) as (errors, readings):
        ledger = opened(name, folder)
        begun, epoch = ledger.ask(), 0
        assert begun is not None

        def report() -> None:
            nonlocal epoch
            epoch += 1
            ledger.report(begun.number, metrics(epoch), "/mnt/runs/study/trials/0001/checkpoint")

        def ask() -> None:
            trial = ledger.ask()
            assert trial is not None
            ledger.finish(trial.number, "failed", reason="timed")

        def whole() -> None:
            other = opened(name, folder)
            other.ranking()
            other.close()

        found = {
            "report": timed(report, rounds),
            "ask and end": timed(ask, max(5, rounds // 4)),
            "open and read": timed(whole, 5),
        }
        ledger.finish(begun.number, "failed", reason="timed")
        ledger.close()
        log.removeHandler(outages)
        return {
            **{what: statistics.median(values) for what, values in found.items()},
            "longest report": max(found["report"]),
            "locked": outages.count,
            "reader errors": errors.value,
            "readings": readings.value,
        }


def _write(name: str, folder: Path, pipe: Any, room: int | None) -> None:
    logging.disable()  # a ledger that waits for its disk logs it
    ledger = opened(name, folder)
    trial = ledger.ask()
    assert trial is not None
    pipe.send((trial.number, 0))
    if room is not None:
        largest = max(path.stat().st_size for path in folder.iterdir())
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest + room, largest + room))
    epoch = 0
    while True:
        epoch += 1
        try:
            ledger.report(trial.number, metrics(epoch))
        except Exception:  # noqa: BLE001 - what the full disk is called differs by storage
            os._exit(1)
        pipe.send((trial.number, epoch))


def _ended(name: str, folder: Path, room: int | None, after: float) -> tuple[int, int]:
    """Number and last written epoch of a trial after its writer ended."""
    context = _processes()
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_write, args=(name, folder, theirs, room))
    process.start()
    theirs.close()
    number, written = mine.recv()
    process.join(after)
    process.kill()
    try:
        while True:
            number, written = mine.recv()
    except EOFError:
        process.join()
    return number, written


def ends(name: str, count: int, *, full: bool) -> dict[str, Any]:
    """Interrupt writers by kill -9, or by a file that is not allowed to grow further.

    In the latter case, as on a full disk, the last write is cut off after some bytes.
    """
    generator = np.random.default_rng(1)
    readable = lost = 0
    again: list[float] = []
    said: set[str] = set()
    for _ in range(count):
        with tempfile.TemporaryDirectory() as home:
            room = int(generator.integers(1, 2000)) if full else None
            after = _PAUSE if full else float(generator.uniform(0.0, 0.5))
            number, written = _ended(name, Path(home), room, after)
            begun = time.perf_counter()
            try:
                ledger = opened(name, Path(home))
                lost += max(0, written - ledger.trial(number).epoch)
                ledger.finish(number, "failed", reason="killed")
                ledger.close()
                opened(name, Path(home)).close()
                readable += 1
                again.append(time.perf_counter() - begun)
            except Exception as error:  # noqa: BLE001 - what it left cannot be read
                said.add(f"{name}: {type(error).__name__}: {str(error).split(':')[0]}")
    for line in sorted(said):
        print(line)
    longest = max(again, default=math.inf)
    return {"ends": count, "readable": readable, "lost reports": lost, "longest wait": longest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="*", default=[100, 1000])
    parser.add_argument("--rounds", type=int, default=60, help="timed reports")
    parser.add_argument("--kills", type=int, default=20, help="of each kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    figures: dict[str, Any] = {}
    heads = ("report", "longest report", "ask and end", "open and read")
    print(f"{EPOCHS} epochs a trial; milliseconds, medians")
    print(f"{'storage':<14}{'trials':>7}{'readers':>8}" + "".join(f"{h:>16}" for h in heads)
          + f"{'locked':>8}{'reader errors':>15}")  # fmt: skip
    for trials in arguments.trials:
        with tempfile.TemporaryDirectory() as plain, tempfile.TemporaryDirectory() as other:
            for name in STORAGES:
                home = other if name.endswith("WAL") else plain
                if home == other:
                    shutil.copy(Path(plain) / "study.db", other)
                else:
                    times = trials // _FILLED if name == "SQLite" and trials > _FILLED else 1
                    ledger = opened(name, Path(home))
                    fill(ledger, trials // times)
                    ledger.close()
                    if times > 1:
                        multiply(Path(home) / "study.db", times)
                for readers in (0, READERS):
                    row = speed(name, Path(home), readers, arguments.rounds)
                    figures[f"{name}, {trials} trials, {readers} readers"] = row
                    print(f"{name:<14}{trials:>7}{readers:>8}"
                          + "".join(f"{row[head]:>16.1f}" for head in heads)
                          + f"{row['locked']:>8}{row['reader errors']:>8} of {row['readings']}",
                          flush=True)  # fmt: skip
    for what, full in (("kill -9", False), ("disk full", True)):
        print(
            f"\n{'storage':<14}{what:>10}{'readable':>10}{'lost reports':>14}{'longest wait':>14}"
        )
        for name in STORAGES:
            row = ends(name, arguments.kills, full=full)
            figures[f"{name}, {what}"] = row
            print(f"{name:<14}{row['ends']:>10}{row['readable']:>14}{row['lost reports']:>14}"
                  f"{row['longest wait']:>12.1f} s", flush=True)  # fmt: skip
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
