"""The run folder: where everything of one study lies, and who may write to it."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

from tuner.errors import StudyError


class RunFolder:
    """Paths of one study's files, and the lock that keeps a second driver out."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        self._lock: int | None = None

    @property
    def config(self) -> Path:
        """The study's whole configuration."""
        return self.path / "config.yaml"

    @property
    def database(self) -> Path:
        """The ledger: an Optuna study in SQLite."""
        return self.path / "study.db"

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
        return self.path / "tensorboard"

    @property
    def trials(self) -> Path:
        """Checkpoints and tracebacks, a folder a trial."""
        return self.path / "trials"

    def trial(self, number: int) -> Path:
        """The folder of one trial."""
        return self.trials / f"{number:04d}"

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
            raise StudyError(
                f"--out: cannot write to {folder.path}: {error.strerror or error}"
            ) from error
        if folder.holds_study:
            folder.release()
            raise StudyError(
                f"--out: {folder.path} already holds a study; go on with --resume "
                f"{folder.path}, or choose another folder"
            )
        return folder

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
        return folder

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

    def _acquire(self) -> None:
        handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(handle, 100).decode(errors="replace").strip()
            os.close(handle)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            by = f" (process {holder})" if holder else ""
            raise StudyError(f"{self.path}: another run{by} is at work on this study") from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        self._lock = handle

    def release(self) -> None:
        """Let another driver in."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
