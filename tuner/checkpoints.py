"""Where the trials' checkpoints lie: the run folder, a shared folder, or a URI.

A URI is one that pyarrow opens (file, s3, gs, abfs, hdfs), with its options: an S3 store of
one's own is `s3://bucket/runs?endpoint_override=http://10.0.0.5:9000`. The ledger names a
checkpoint by a location that stands alone, so that any machine finds it again: a path, or a
URI that keeps those options.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from pyarrow.fs import FileSelector, FileSystem, FileType, copy_files

from model.files import sync
from tuner.config import ResourcesConfig
from tuner.disk import full_disk
from tuner.errors import StudyError
from tuner.folder import RunFolder, checkpoint_name

logger = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds that a storage may be silent
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 15.0  # seconds between two attempts: doubled each time

_T = TypeVar("_T")


class StorageOut(OSError):
    """A storage that does not answer, or not as it should: no fault of who asks it."""


def storage_error(folder: Path, said: str, mode: str = "") -> StudyError:
    """The line that ends a session whose trials cannot be saved, or not be gone on with."""
    return StudyError(
        f"{said}; nothing that was finished is lost: go on with: python -m tuner.run --resume "
        f"{shlex.quote(str(folder))}{mode}"
    )


@dataclass(frozen=True)
class Storage:
    """The folder of a study's checkpoints.

    Attributes:
        root: a folder or a URI, to which others may write too.
        name: the study's part of it.
    """

    root: str
    name: str

    @classmethod
    def of(cls, folder: RunFolder, resources: ResourcesConfig) -> Storage:
        """What the study names, or the run folder."""
        if resources.storage is None:
            return cls(str(folder.path), folder.trials.name)
        # Others may keep a run of this name there.
        return cls(resources.storage, f"{folder.identity}-{folder.trials.name}")

    def trial(self, number: int) -> str:
        """Where a trial's checkpoints go; nobody is asked."""
        inside = f"{self.name}/{number:04d}"
        if "://" in self.root and not self.root.startswith("file:"):
            return _below(self.root, inside)
        return _below(open_location(self.root)[1], inside)

    def make(self) -> None:
        """Make the study's folder; machines that do not see it do not see the storage.

        Raises:
            StorageOut: it cannot be made.
        """
        where = _below(self.root, self.name)

        def create() -> None:
            filesystem, path = open_location(where)
            filesystem.create_dir(path, recursive=True)
            if filesystem.type_name == "local":
                sync(Path(path).parent)

        _patiently(where, create)

    def location(self, filesystem: FileSystem, path: str) -> str:
        """A path below the root, as a location that stands alone.

        Args:
            filesystem: of the root.
            path: as that file system names it.
        """
        if filesystem.type_name == "local":
            return path
        inside = PurePosixPath(path).relative_to(open_location(self.root)[1])
        return _below(self.root, str(inside))

    def checkpoints(self) -> Iterator[tuple[int, str]]:
        """Trial and location of every checkpoint there is.

        Raises:
            OSError: the storage does not answer.
        """
        filesystem, root = open_location(self.root)
        found = FileSelector(f"{root}/{self.name}", recursive=True, allow_not_found=True)
        for info in filesystem.get_file_info(found):
            parts = re.search(r"/(\d{4,})[^/]*/checkpoint[^/]*$", info.path)
            if parts and info.type == FileType.Directory:
                yield int(parts[1]), self.location(filesystem, info.path)


def _below(location: str, inside: str) -> str:
    """A path or URI below another, which keeps its options."""
    base, options = _split(location)
    return f"{base}/{inside}{options}"


def _split(location: str) -> tuple[str, str]:
    """A location without its last slash, and a URI's options."""
    base, mark, options = location.partition("?") if "://" in location else (location, "", "")
    return base.rstrip("/"), mark + options


def open_location(location: str) -> tuple[Any, str]:
    """The file system of a path or URI, and the path on it.

    Raises:
        StorageOut: it is none that can be opened here.
    """
    try:
        return FileSystem.from_uri(location)
    except (OSError, ValueError) as error:  # the latter for unknown schemes and options
        raise StorageOut(f"{location}: {error}") from error


@contextmanager
def fetched(location: str, patience: float | None = None) -> Iterator[Path]:
    """A checkpoint's folder on this machine: itself, or a copy for as long as the block lasts.

    Args:
        location: of the checkpoint.
        patience: seconds that the storage may be silent, PATIENCE if left out.

    Raises:
        FileNotFoundError: it is not there.
        StorageOut: nobody can tell.
    """

    def look() -> tuple[Any, str]:
        filesystem, path = open_location(location)
        if filesystem.get_file_info(path).type != FileType.Directory:
            raise FileNotFoundError(f"{location}: no such checkpoint")
        return filesystem, path

    filesystem, path = _patiently(location, look, patience)
    if filesystem.type_name == "local":
        yield Path(path)
        return
    with TemporaryDirectory(prefix="ristune-checkpoint-") as copy:
        _patiently(location, lambda: copy_files(path, copy, source_filesystem=filesystem), patience)
        yield Path(copy)


def _patiently(location: str, work: Callable[[], _T], patience: float | None = None) -> _T:
    """What `work` returns, tried again as long as the storage does not answer.

    Raises:
        FileNotFoundError: it has answered that there is no such thing.
        StorageOut: it has not, for PATIENCE, or refuses.
        OSError: a disk is full, for which nobody waits.
    """
    begun, pause = time.monotonic(), _FIRST_PAUSE
    while True:
        try:
            return work()
        except FileNotFoundError:
            raise
        except OSError as error:
            if full_disk(error) is not None:
                raise
            left = (PATIENCE if patience is None else patience) - (time.monotonic() - begun)
            # The cause is pyarrow's of schemes and options that it does not know.
            refused = isinstance(error, PermissionError) or isinstance(error.__cause__, ValueError)
            if refused or left <= 0:
                line = " ".join(str(error).split())[:300]
                raise StorageOut(f"the storage cannot be used: {location}: {line}") from error
            logger.warning("%s: trying again: %s", location, error)
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE)


def see_data(folder: Path) -> None:
    """Make sure that this machine sees the recorded scenes, which may lie on shared storage too.

    Raises:
        StorageOut: it does not, for PATIENCE.
    """

    def look() -> None:
        if not os.path.isdir(folder / "train"):  # noqa: PTH112 - of what cannot be asked, too
            raise OSError(f"no such data folder on {platform.node()}")

    _patiently(str(folder), look)


@contextmanager
def reachable(location: str | None) -> Iterator[Path | None]:
    """The checkpoint to go on from; None, said in the log, where it is no more.

    Raises:
        StorageOut: whether it is cannot be told.
    """
    with ExitStack() as stack:
        folder = None
        try:
            folder = stack.enter_context(fetched(location)) if location else None
        except FileNotFoundError as error:
            logger.warning("starting from the beginning: %s", error)
        yield folder


@contextmanager
def starting_points(
    checkpoint: str | None, donor: str | None
) -> Iterator[tuple[Path | None, Path | None]]:
    """What a trial may go on from, each for as long as the block lasts.

    Yields:
        Its own checkpoint, as :func:`reachable` has it, and that of its donor, which is brought
        here where the trial has none of its own yet. One that is no more is a path that does
        not exist: a trial without what it should begin with has failed.

    Raises:
        StorageOut: the storage does not answer.
    """
    with ExitStack() as stack:
        own = stack.enter_context(reachable(checkpoint))
        theirs = Path(donor) if donor else None
        if donor and checkpoint is None:
            try:
                theirs = stack.enter_context(fetched(donor))
            except FileNotFoundError as error:
                logger.warning("a donor's checkpoint cannot be had: %s", error)
        yield own, theirs


class TrialCheckpoints:
    """Those of one trial while it runs: each new one beside the last.

    The ledger names a checkpoint once it is whole, together with its epoch. Until it does, a trial
    whose machine is lost goes on from the one before, which therefore goes an epoch later.

    Args:
        home: folder or URI of the trial, in the study's folder (:meth:`Storage.make`).
    """

    def __init__(self, home: str) -> None:
        self._home = home
        self._kept: list[str] = []
        self._spared: set[str] = set()
        self._is_new = True  # the trial's folder, as far as is known here
        self._opened: tuple[Any, str] | None = None

    def follow(self, previous: str | None) -> None:
        """Take over the checkpoint that the trial went on from: it goes after a newer one.

        One that lies elsewhere stays: the run folder is a copy, and it is the original's.
        """
        inside = previous is not None and previous.startswith(f"{_split(self._home)[0]}/")
        self._kept = [previous] if previous and inside else []

    def spare(self) -> None:
        """Leave those that there are, also where they are written anew: others may begin there.

        Raises:
            StorageOut: the storage does not say which there are.
        """

        def look() -> set[str]:
            filesystem, home = open_location(self._home)
            found = filesystem.get_file_info(FileSelector(home, allow_not_found=True))
            return {info.base_name for info in found}

        self._spared = _patiently(self._home, look)

    def reach(self) -> None:
        """Make sure that this machine sees the storage.

        Raises:
            StorageOut: it does not; what were written here would be lost, and what is there seems
                not to be.
        """
        _patiently(self._home, self._open)

    def write(self, epoch: int, save: Callable[[Path], object]) -> str:
        """Keep the state after an epoch; it is whole and on disk when this returns.

        Args:
            epoch: names the checkpoint.
            save: fills a folder.

        Returns:
            Its location.

        Raises:
            StorageOut: it cannot be written.
            OSError: a disk is full.
        """
        name = checkpoint_name(epoch)
        location = _below(self._home, name)

        def keep() -> None:
            filesystem, home = self._open()
            if filesystem.type_name == "local":
                save(Path(home) / name)
                for folder in [Path(home), *Path(home).parents[:1]][: 2 if self._is_new else 1]:
                    sync(folder)  # a power cut may follow
                return
            with TemporaryDirectory(prefix="ristune-checkpoint-") as fresh:
                save(Path(fresh))
                filesystem.create_dir(f"{home}/{name}", recursive=True)
                copy_files(fresh, f"{home}/{name}", destination_filesystem=filesystem)

        _patiently(location, keep)
        self._is_new = False
        if name not in self._spared and location not in self._kept:
            self._kept.append(location)
        return location

    def forget(self) -> None:
        """Delete all but the newest, now that the ledger names it."""
        while len(self._kept) > 1:
            drop(self._kept.pop(0))

    def _open(self) -> tuple[Any, str]:
        """The file system of the home, and the path there; the study's folder is there."""
        filesystem, home = self._opened = self._opened or open_location(self._home)
        study = Path(home).parent
        if filesystem.type_name == "local" and not study.is_dir():
            raise OSError(f"{study} is not here; is it on storage that all machines share?")
        return filesystem, home


def drop(location: str) -> None:
    """Delete a checkpoint; one that cannot be deleted costs room and no more."""
    try:
        filesystem, path = open_location(location)
        filesystem.delete_dir(path)
    except OSError as error:
        logger.warning("checkpoint %s was not deleted: %s", location, error)
