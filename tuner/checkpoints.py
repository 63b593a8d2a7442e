"""Storage of the trials' checkpoints: the run folder, a shared folder, or a URI.

A URI is one that pyarrow opens (file, s3, gs, abfs, hdfs), with its options: a self-hosted S3 store
is `s3://bucket/runs?endpoint_override=http://10.0.0.5:9000`. The ledger stores a checkpoint's
location as a full path, or a URI with these options, so that any machine can find it.
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

PATIENCE = 60.0  # seconds for which an unresponsive storage is retried
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 15.0  # seconds between retries: doubled each time

_T = TypeVar("_T")


class StorageOut(OSError):
    """The storage does not answer, or not as expected; the trial is not at fault."""


def storage_error(folder: Path, said: str, mode: str = "") -> StudyError:
    """Return the error that ends a session whose trials cannot be saved or resumed."""
    return StudyError(
        f"{said}; nothing that was finished is lost: go on with: python -m tuner.run --resume "
        f"{shlex.quote(str(folder))}{mode}"
    )


@dataclass(frozen=True)
class Storage:
    """The folder of a study's checkpoints.

    Attributes:
        root: a folder or a URI, which may be shared with other runs.
        name: the study's subfolder.
    """

    root: str
    name: str

    @classmethod
    def of(cls, folder: RunFolder, resources: ResourcesConfig) -> Storage:
        """Return the storage that the study names, or the run folder."""
        if resources.storage is None:
            return cls(str(folder.path), folder.trials.name)
        # Other runs of this name may be stored there.
        return cls(resources.storage, f"{folder.identity}-{folder.trials.name}")

    def trial(self, number: int) -> str:
        """Return the folder or URI of a trial's checkpoints without accessing the storage."""
        inside = f"{self.name}/{number:04d}"
        if "://" in self.root and not self.root.startswith("file:"):
            return _below(self.root, inside)
        return _below(open_location(self.root)[1], inside)

    def make(self) -> None:
        """Create the study's folder, by which machines check that they see the storage.

        Raises:
            StorageOut: it cannot be created.
        """
        where = _below(self.root, self.name)

        def create() -> None:
            filesystem, path = open_location(where)
            filesystem.create_dir(path, recursive=True)
            if filesystem.type_name == "local":
                sync(Path(path).parent)

        _patiently(where, create)

    def location(self, filesystem: FileSystem, path: str) -> str:
        """Return the full location for a path below the root.

        Args:
            filesystem: the root's file system.
            path: the path on that file system.
        """
        if filesystem.type_name == "local":
            return path
        inside = PurePosixPath(path).relative_to(open_location(self.root)[1])
        return _below(self.root, str(inside))

    def checkpoints(self) -> Iterator[tuple[int, str]]:
        """Yield the trial and location of every checkpoint.

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
    """Return a path or URI below another one, with its options."""
    base, options = _split(location)
    return f"{base}/{inside}{options}"


def _split(location: str) -> tuple[str, str]:
    """Split a location into the part without a trailing slash and a URI's options."""
    base, mark, options = location.partition("?") if "://" in location else (location, "", "")
    return base.rstrip("/"), mark + options


def open_location(location: str) -> tuple[Any, str]:
    """Return the file system of a path or URI, and the path on it.

    Raises:
        StorageOut: it cannot be opened here.
    """
    try:
        return FileSystem.from_uri(location)
    except (OSError, ValueError) as error:  # ValueError for unknown schemes and options
        raise StorageOut(f"{location}: {error}") from error


@contextmanager
def fetched(location: str, patience: float | None = None) -> Iterator[Path]:
    """Yield a checkpoint's folder on this machine: the original, or a copy during the block.

    Args:
        location: location of the checkpoint.
        patience: seconds for which an unresponsive storage is retried; None means PATIENCE.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        StorageOut: the storage does not answer.
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
    """Call `work` and retry while the storage does not answer.

    Raises:
        FileNotFoundError: the storage reports that the location does not exist.
        StorageOut: the storage did not answer for PATIENCE seconds, or refused access.
        OSError: a disk is full, which is not retried.
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
            # pyarrow raises ValueError for unknown schemes and options.
            refused = isinstance(error, PermissionError) or isinstance(error.__cause__, ValueError)
            if refused or left <= 0:
                line = " ".join(str(error).split())[:300]
                raise StorageOut(f"the storage cannot be used: {location}: {line}") from error
            logger.warning("%s: trying again: %s", location, error)
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE)


def see_data(folder: Path) -> None:
    """Check that this machine sees the recorded scenes, which may be on shared storage.

    Raises:
        StorageOut: it did not see them for PATIENCE seconds.
    """

    def look() -> None:
        if not os.path.isdir(folder / "train"):  # noqa: PTH112 - of what cannot be asked, too
            raise OSError(f"no such data folder on {platform.node()}")

    _patiently(str(folder), look)


@contextmanager
def reachable(location: str | None) -> Iterator[Path | None]:
    """Yield the checkpoint to resume from; None, with a log record, if it no longer exists.

    Raises:
        StorageOut: the storage does not answer.
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
    """Yield the checkpoints that a trial may start from, valid during the block.

    Yields:
        Its own checkpoint, as from :func:`reachable`, and that of its donor, which is fetched if
        the trial has no checkpoint of its own yet. If the donor's no longer exists, its path does
        not exist either, so that the trial fails when it tries to load it.

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
    """The checkpoints of one running trial, each written before the last one is deleted.

    The ledger records a complete checkpoint together with its epoch. Until then, a trial whose
    machine is lost resumes from the previous checkpoint, which is therefore deleted one epoch
    later.

    Args:
        home: folder or URI of the trial, within the study's folder (:meth:`Storage.make`).
    """

    def __init__(self, home: str) -> None:
        self._home = home
        self._kept: list[str] = []
        self._spared: set[str] = set()
        self._is_new = True  # whether this object has yet to write to the trial's folder
        self._opened: tuple[Any, str] | None = None

    def follow(self, previous: str | None) -> None:
        """Register the checkpoint that the trial resumed from, to be deleted after a newer one.

        A checkpoint elsewhere is kept: the run folder is then a copy, and it belongs to the
        original.
        """
        inside = previous is not None and previous.startswith(f"{_split(self._home)[0]}/")
        self._kept = [previous] if previous and inside else []

    def spare(self) -> None:
        """Keep all existing checkpoints, even if rewritten, as other trials may start from them.

        Raises:
            StorageOut: the storage cannot list them.
        """

        def look() -> set[str]:
            filesystem, home = open_location(self._home)
            found = filesystem.get_file_info(FileSelector(home, allow_not_found=True))
            return {info.base_name for info in found}

        self._spared = _patiently(self._home, look)

    def reach(self) -> None:
        """Check that this machine sees the storage.

        Raises:
            StorageOut: it does not, so that new checkpoints would be lost and existing ones not
                found.
        """
        _patiently(self._home, self._open)

    def write(self, epoch: int, save: Callable[[Path], object]) -> str:
        """Write the state after an epoch; it is complete and on disk on return.

        Args:
            epoch: the epoch, which names the checkpoint.
            save: writes the state to a folder.

        Returns:
            The checkpoint's location.

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
        """Delete all but the newest checkpoint, after the ledger has recorded it."""
        while len(self._kept) > 1:
            drop(self._kept.pop(0))

    def _open(self) -> tuple[Any, str]:
        """Return the home's file system and path, after checking that the study's folder exists."""
        filesystem, home = self._opened = self._opened or open_location(self._home)
        study = Path(home).parent
        if filesystem.type_name == "local" and not study.is_dir():
            raise OSError(f"{study} is not here; is it on storage that all machines share?")
        return filesystem, home


def drop(location: str) -> None:
    """Delete a checkpoint; a failure is only logged, as it merely wastes space."""
    try:
        filesystem, path = open_location(location)
        filesystem.delete_dir(path)
    except OSError as error:
        logger.warning("checkpoint %s was not deleted: %s", location, error)
