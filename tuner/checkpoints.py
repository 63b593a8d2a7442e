"""Where the trials' checkpoints lie: the run folder, a shared folder, or a URI.

A URI is one that pyarrow opens (file, s3, gs, abfs, hdfs), with its options: an S3 store of
one's own is `s3://bucket/runs?endpoint_override=http://10.0.0.5:9000`. The ledger names a
checkpoint by a location that stands alone, so that any machine finds it again: a path, or a
URI that keeps those options.
"""

from __future__ import annotations

import logging
import re
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
from tuner.folder import RunFolder

logger = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds that a storage may be silent
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 15.0  # seconds between two attempts: doubled each time

_T = TypeVar("_T")


class StorageOut(OSError):
    """A storage that does not answer, or not as it should: no fault of who asks it."""


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
        name = f"{folder.path.name}-{folder.identity}-{folder.trials.name}"
        return cls(resources.storage, name)

    def trial(self, number: int) -> str:
        """Where a trial's checkpoints go."""
        filesystem, root = open_location(self.root)
        return self.location(filesystem, f"{root}/{self.name}/{number:04d}")

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
    base, mark, options = location.partition("?") if "://" in location else (location, "", "")
    return f"{base.rstrip('/')}/{inside}{mark}{options}"


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
def fetched(location: str) -> Iterator[Path]:
    """A checkpoint's folder on this machine: itself, or a copy for as long as the block lasts.

    Raises:
        FileNotFoundError: it is not there.
        StorageOut: nobody can tell.
    """
    filesystem, path = open_location(location)

    def look() -> None:
        if filesystem.get_file_info(path).type != FileType.Directory:
            raise FileNotFoundError(f"{location}: no such checkpoint")

    _patiently(location, look)
    if filesystem.type_name == "local":
        yield Path(path)
        return
    with TemporaryDirectory(prefix="ristune-checkpoint-") as copy:
        _patiently(location, lambda: copy_files(path, copy, source_filesystem=filesystem))
        yield Path(copy)


def _patiently(location: str, work: Callable[[], _T]) -> _T:
    """What `work` returns, tried again as long as the storage does not answer.

    Raises:
        FileNotFoundError: it has answered that there is no such thing.
        StorageOut: it has not, for PATIENCE.
    """
    begun, pause = time.monotonic(), _FIRST_PAUSE
    while True:
        try:
            return work()
        except FileNotFoundError:
            raise
        except OSError as error:
            left = PATIENCE - (time.monotonic() - begun)
            if left <= 0:
                line = " ".join(str(error).split())[:300]
                raise StorageOut(f"{location}: the storage does not answer: {line}") from error
            logger.warning("%s: trying again: %s", location, error)
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE)


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
        home: folder or URI of the trial.
        previous: what the trial goes on from, unless others begin there too.
    """

    def __init__(self, home: str, previous: str | None = None) -> None:
        self._home = home
        self._kept = [previous] if previous else []

    def write(self, epoch: int, save: Callable[[Path], object]) -> str:
        """Keep the state after an epoch; it is whole and on disk when this returns.

        Args:
            epoch: names the checkpoint.
            save: fills a folder.

        Returns:
            Its location.

        Raises:
            OSError: it cannot be written.
        """
        location = _below(self._home, f"checkpoint-{epoch:05d}")
        filesystem, path = open_location(location)
        if filesystem.type_name == "local":
            save(Path(path))
            for folder in Path(path).parents[: 1 if self._kept else 3]:
                sync(folder)  # a power cut may follow, and they may be new
        else:
            with TemporaryDirectory(prefix="ristune-checkpoint-") as fresh:
                save(Path(fresh))

                def copy() -> None:
                    filesystem.create_dir(path, recursive=True)
                    copy_files(fresh, path, destination_filesystem=filesystem)

                _patiently(location, copy)
        if location not in self._kept:
            self._kept.append(location)
        return location

    def forget(self) -> None:
        """Delete all but the newest, now that the ledger names it."""
        while len(self._kept) > 1:
            drop(self._kept.pop(0))


def drop(location: str) -> None:
    """Delete a checkpoint; one that cannot be deleted costs room and no more."""
    try:
        filesystem, path = open_location(location)
        filesystem.delete_dir(path)
    except OSError as error:
        logger.warning("checkpoint %s was not deleted: %s", location, error)
