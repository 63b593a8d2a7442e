"""The run folder, which holds all files of one study, and its lock."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import platform
import re
import shlex
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from model.files import write_text
from tuner.errors import StudyError
from tuner.files import FileLock, Locked, sweep


@dataclass(frozen=True)
class Driver:
    """The process that last wrote the lock file, and whether it is seen to hold the lock."""

    pid: int | None
    host: str | None
    since: float  # unix time
    locked: bool

    @property
    def is_here(self) -> bool:
        """Whether it ran on this machine, where the lock state is reliable."""
        return self.host is None or self.host == platform.node()


def checkpoint_name(epoch: int) -> str:
    """Return the name of an epoch's checkpoint in its trial's folder."""
    return f"checkpoint-{epoch:05d}"


def checkpoint_epoch(location: str) -> int | None:
    """Return the epoch of a checkpoint's path or URI; None for a name of an earlier version."""
    found = re.search(r"/checkpoint-(\d{5,})(\?|$)", location)
    return int(found[1]) if found else None


def is_before(location: str, epoch: int) -> bool:
    """Return whether a checkpoint, by its name, is of an earlier epoch."""
    found = checkpoint_epoch(location)
    return found is not None and found < epoch


class RunFolder:
    """Paths of one study's files, and the lock that keeps a second driver out."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        self._lock = FileLock(self.path / ".lock")
        self._stage = ""

    @property
    def config(self) -> Path:
        """The study's whole configuration."""
        return self.path / "config.yaml"

    @property
    def database(self) -> Path:
        """The ledger: an Optuna study in SQLite, unless the study names another database."""
        return self.path / "study.db"

    @property
    def study_name(self) -> Path:
        """The name of the study in a shared database."""
        return self.path / "study.name"

    @property
    def trials_csv(self) -> Path:
        """Table with one line per trial."""
        return self.path / "trials.csv"

    @property
    def best_json(self) -> Path:
        """The winner, with all that is needed to retrain it."""
        return self.path / "best.json"

    @property
    def best(self) -> Path:
        """The winner's network."""
        return self.path / "best"

    @property
    def earlier_best(self) -> Path:
        """The network of an earlier winner, if the winner's own is not accessible."""
        return self.path / "best.earlier"

    @property
    def pareto(self) -> Path:
        """Networks of the Pareto front, one folder per trial."""
        return self.path / "pareto"

    def fingerprint(self) -> str:
        """Return a hash of the winner's network: weights, configuration and decision."""
        digest = hashlib.sha256()
        for path in sorted(self.best.iterdir()):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()

    @property
    def report(self) -> Path:
        """The page that shows the study."""
        return self.path / "report.html"

    @property
    def evaluation(self) -> Path:
        """The comparison of the winner with NOMP."""
        return self.path / "evaluation.json"

    @property
    def scenes(self) -> Path:
        """Held-out scenes drawn with the winner's network, for the report."""
        return self.path / "scenes.json"

    @property
    def log(self) -> Path:
        """The log file."""
        return self.path / "tuner.log"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files, one folder per trial."""
        return self.path / "tensorboard" / self._stage

    @property
    def trials(self) -> Path:
        """Checkpoints and tracebacks, one folder per trial."""
        return self.path / (self._stage or "trials")

    @property
    def promoted_csv(self) -> Path:
        """Table with one line per promoted run."""
        return self.path / "promoted.csv"

    def promotion(self) -> RunFolder:
        """Return the same run folder with the subfolders for promoted runs."""
        other = RunFolder(self.path)
        other._stage = "promoted"
        return other

    @property
    def identity(self) -> str:
        """The name of the run on shared storage, created on first use.

        It is stored with the folder's inode: a renamed folder keeps its name, and a copy, which
        always has a different inode, gets a new name. So does a folder that was moved to another
        file system: it still reads the checkpoints that it knows of, and deletes none of them.
        """
        path, inode = self.path / ".identity", str(self.path.stat().st_ino)
        known, its = _identity_in(path)
        if known and its == inode:
            return known
        earlier = known and not its.isdecimal()  # by a version that used the path
        known = f"{self.path.name}-{known if earlier else uuid.uuid4().hex[:8]}"
        write_text(path, f"{known}\n{inode}\n")
        return known

    @property
    def _results(self) -> tuple[Path, ...]:
        """The files of a study besides its configuration, its ledger and its log."""
        return (
            self.trials,
            self.trials_csv,
            self.best_json,
            self.best,
            self.earlier_best,
            self.pareto,
            self.promotion().trials,
            self.promoted_csv,
            self.report,
            self.evaluation,
            self.evaluation.with_suffix(".html"),
            self.evaluation.with_suffix(".csv"),
            self.scenes,
            self.tensorboard,
        )

    def _held_results(self) -> list[str]:
        """Return the names of existing results; empty folders do not count."""
        return [
            path.name
            for path in self._results
            if path.exists() and (path.is_file() or any(path.iterdir()))
        ]

    def refuse_lost_ledger(self) -> None:
        """Raise StudyError if there are results but the ledger they came from is missing."""
        empty = self.database.exists() and not self.database.stat().st_size
        if self.has_ledger and not empty:
            return
        results = self._held_results()
        if results:
            raise StudyError(
                f"{self.database} is {'empty' if empty else 'gone'}, and {', '.join(results)} are "
                "of the study that was in it: put it back; to begin again, move these away or run "
                f"in another folder: python -m tuner.run --config "
                f"{shlex.quote(str(self.config))} --out ..."
            )

    def trial(self, number: int) -> Path:
        """The folder of one trial."""
        return self.trials / f"{number:04d}"

    @property
    def has_ledger(self) -> bool:
        """Whether a study has started here, wherever its ledger is stored."""
        return self.database.exists() or self.study_name.exists()

    @property
    def holds_study(self) -> bool:
        """Whether a study was started here."""
        return self.database.exists() or self.config.exists()

    @classmethod
    def fresh(cls, path: Path) -> RunFolder:
        """Create and lock a folder for a new study; raise StudyError if it holds a study."""
        folder = cls(path)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            folder._acquire()
        except OSError as error:
            raise folder._unwritable(error) from error
        try:
            folder.refuse_study()
        except StudyError:
            folder.release()
            raise
        return folder

    def refuse_study(self) -> None:
        """Raise StudyError if a study was started here or would overwrite other files."""
        try:
            held = self.holds_study
            others = self._held_results()
        except OSError as error:
            raise self._unwritable(error) from error
        if held:
            raise StudyError(
                f"--out: {self.path} already holds a study; go on with --resume "
                f"{self.path}, or choose another folder"
            )
        if others:
            raise StudyError(
                f"--out: {self.path} holds no study, but {', '.join(others)}, which a study here "
                "would write over; choose another folder"
            )

    def _unwritable(self, error: OSError) -> StudyError:
        return StudyError(f"--out: cannot write to {self.path}: {error.strerror or error}")

    @classmethod
    def existing(cls, path: Path, *, lock: bool = True) -> RunFolder:
        """Open the folder of a study that was started before."""
        folder = cls(path)
        if not folder.path.is_dir():
            raise StudyError(f"{path}: no such folder")
        if not folder.config.exists():
            raise StudyError(f"{path}: holds no study (config.yaml is expected there)")
        if lock:
            try:
                folder._acquire()
            except OSError as error:
                raise StudyError(f"{path}: cannot be written: {error.strerror}") from error
            folder._sweep()
        return folder

    def _sweep(self) -> None:
        """Remove partial files where only the study's driver writes.

        Other processes may have subfolders here: a final training, a user's project.
        """
        sweep(self.path, below=False)
        for place in (self.trials, self.promotion().trials):
            sweep(place)

    @classmethod
    def default_path(cls, name: str) -> Path:
        """Return an unused path `runs/<name>-<timestamp>`."""
        stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        path = Path("runs") / stem
        count = 2
        while path.exists():
            path = Path("runs") / f"{stem}-{count}"
            count += 1
        return path

    @property
    def driver(self) -> Driver | None:
        """The running or interrupted driver of the study; None if there is none or it ended."""
        path = self.path / ".lock"
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        try:
            locked = False
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:  # file systems without locks show none
                locked = error.errno in (errno.EAGAIN, errno.EACCES)
            text = os.pread(handle, 300, 0).decode(errors="replace")
            since = os.fstat(handle).st_mtime
        finally:
            os.close(handle)
        found = re.fullmatch(r"(\d+)(?: on (\S+))?", text.strip())
        if found is None:
            return Driver(None, None, since, locked) if locked else None
        return Driver(int(found[1]), found[2], since, locked)

    def _acquire(self) -> None:
        try:
            self._lock.acquire()
        except Locked as error:
            raise StudyError(f"{self.path}: another run{error} is at work on this study") from None

    def release(self) -> None:
        """Release the lock and clear the file, which marks a regular end."""
        self._lock.release()


def _identity_in(path: Path) -> tuple[str, str]:
    """Return the stored identity of a run and its folder's inode; empty strings if missing."""
    try:
        known, _, inode = path.read_text(encoding="utf-8").partition("\n")
    except OSError:
        return "", ""
    return known, inode.strip()
