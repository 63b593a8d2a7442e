"""The run folder: where everything of one study lies, and who may write to it."""

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
    """Who wrote the lock last, and whether the lock is seen to be held."""

    pid: int | None
    host: str | None
    since: float  # unix time
    locked: bool

    @property
    def is_here(self) -> bool:
        """Whether it ran on this machine, where its lock tells all."""
        return self.host is None or self.host == platform.node()


def checkpoint_name(epoch: int) -> str:
    """What the checkpoint after an epoch is called in its trial's folder."""
    return f"checkpoint-{epoch:05d}"


def checkpoint_epoch(location: str) -> int | None:
    """The epoch of a checkpoint's path or URI; None of a name of an earlier version."""
    found = re.search(r"/checkpoint-(\d{5,})(\?|$)", location)
    return int(found[1]) if found else None


def is_before(location: str, epoch: int) -> bool:
    """Whether a checkpoint, by its name, is of an epoch before this one."""
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
        """What the study is called in a database that it shares with others."""
        return self.path / "study.name"

    @property
    def trials_csv(self) -> Path:
        """One line a trial."""
        return self.path / "trials.csv"

    @property
    def best_json(self) -> Path:
        """The winner, with all that retrains it."""
        return self.path / "best.json"

    @property
    def best(self) -> Path:
        """The winner's network."""
        return self.path / "best"

    @property
    def earlier_best(self) -> Path:
        """The network of an earlier winner, where the winner's own is out of reach."""
        return self.path / "best.earlier"

    @property
    def pareto(self) -> Path:
        """Networks of a study's front, a folder a trial."""
        return self.path / "pareto"

    def fingerprint(self) -> str:
        """Of the winner's network: weights, configuration and decision."""
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
        """The winner beside NOMP."""
        return self.path / "evaluation.json"

    @property
    def scenes(self) -> Path:
        """Held-out scenes as the winner sees them, for the report."""
        return self.path / "scenes.json"

    @property
    def log(self) -> Path:
        """What happened, line by line."""
        return self.path / "tuner.log"

    @property
    def tensorboard(self) -> Path:
        """Event files, a folder a trial."""
        return self.path / "tensorboard" / self._stage

    @property
    def trials(self) -> Path:
        """Checkpoints and tracebacks, a folder a trial."""
        return self.path / (self._stage or "trials")

    @property
    def promoted_csv(self) -> Path:
        """One line a promoted run."""
        return self.path / "promoted.csv"

    def promotion(self) -> RunFolder:
        """The same folder with other places for runs: those of the search's best, promoted."""
        other = RunFolder(self.path)
        other._stage = "promoted"
        return other

    @property
    def identity(self) -> str:
        """What the run is called where others keep theirs too, made at the first question.

        It is kept with the folder's inode: a folder that is renamed keeps its name, and a copy,
        whose inode is another one wherever it lies, gets a name of its own. So does what was moved
        to another file system: it reads on what it knows of, and deletes nothing.
        """
        path, inode = self.path / ".identity", str(self.path.stat().st_ino)
        known, its = _identity_in(path)
        if known and its == inode:
            return known
        earlier = known and not its.isdecimal()  # a version that knew a folder by its place
        known = f"{self.path.name}-{known if earlier else uuid.uuid4().hex[:8]}"
        write_text(path, f"{known}\n{inode}\n")
        return known

    @property
    def _results(self) -> tuple[Path, ...]:
        """What a study leaves beside its configuration, its ledger and its log."""
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
        """Names of the results that there are; an empty folder is none."""
        return [
            path.name
            for path in self._results
            if path.exists() and (path.is_file() or any(path.iterdir()))
        ]

    def refuse_lost_ledger(self) -> None:
        """Raise StudyError where results lie and the ledger that they were made from does not."""
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
        """Whether a study has begun here, wherever its ledger lies."""
        return self.database.exists() or self.study_name.exists()

    @property
    def holds_study(self) -> bool:
        """Whether a study was started here."""
        return self.database.exists() or self.config.exists()

    @classmethod
    def fresh(cls, path: Path) -> RunFolder:
        """Make and lock a folder for a new study; one that holds a study is refused."""
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
        """Raise StudyError where a study was started here, or would write over others' files."""
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
        """Remove halves of files where a study's driver alone writes.

        Other processes have folders of their own here: a final training, a user's project.
        """
        sweep(self.path, below=False)
        for place in (self.trials, self.promotion().trials):
            sweep(place)

    @classmethod
    def default_path(cls, name: str) -> Path:
        """`runs/<name>-<timestamp>`, one that does not exist yet."""
        stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        path = Path("runs") / stem
        count = 2
        while path.exists():
            path = Path("runs") / f"{stem}-{count}"
            count += 1
        return path

    @property
    def driver(self) -> Driver | None:
        """Who drives the study, or was cut off driving it; None where nobody was, or all ended."""
        path = self.path / ".lock"
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError:
            return None
        try:
            locked = False
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:  # a file system without locks shows none
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
        """Let another driver in, and leave word that this one was not cut off."""
        self._lock.release()


def _identity_in(path: Path) -> tuple[str, str]:
    """A run's identity and its folder's inode, as they are kept; empty where there is none."""
    try:
        known, _, inode = path.read_text(encoding="utf-8").partition("\n")
    except OSError:
        return "", ""
    return known, inode.strip()
