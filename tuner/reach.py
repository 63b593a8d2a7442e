"""Checks before any trial starts that all machines see the checkpoint storage and the data.

A run folder that exists only on the driver's machine is the most common mistake with a first
cluster: trials seem to run, but their checkpoints are on disks that are never read. If one machine
lacks the data, every trial that runs there fails.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import ray
from ray.exceptions import RayError, RayTaskError

from tuner.autoscaling import on_node
from tuner.capacity import Machine
from tuner.checkpoints import Storage, open_location
from tuner.errors import StudyError

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT = 60.0  # seconds for a node to set up this code and answer


def check_reach(storage: Storage, cpus: int, gpus: float) -> None:
    """Check that every node that can run a trial sees a file written here.

    Args:
        storage: storage of the study's checkpoints.
        cpus: CPUs per trial.
        gpus: GPUs per trial.

    Raises:
        StudyError: the storage cannot be written, or some nodes do not see it.
    """
    name = f".seen-{uuid.uuid4().hex}"
    try:
        filesystem, root = open_location(storage.root)
        folder = str(PurePosixPath(root) / storage.name)
        filesystem.create_dir(folder, recursive=True)
        marker = f"{folder}/{name}"
        with filesystem.open_output_stream(marker) as stream:
            stream.write(b"seen")
    except OSError as error:
        line = " ".join(str(error).split())[:300]
        raise StudyError(f"resources.storage: cannot write to {storage.root}: {line}") from error
    try:
        blind = _blind(cpus, gpus, sees, storage.location(filesystem, marker))
    finally:
        filesystem.delete_file(marker)
    if blind:
        raise StudyError(
            f"resources.storage: {storage.root} is not seen by {blind}; put the run folder (--out) "
            "on storage that all machines share, or name such a folder or URI here"
        )


def check_data_reach(shards: Path, cpus: int, gpus: float) -> None:
    """Check that every node that can run a trial sees the recorded scenes.

    Args:
        shards: folder of the scenes.
        cpus: CPUs per trial.
        gpus: GPUs per trial.

    Raises:
        StudyError: some nodes do not see it.
    """
    if blind := _blind(cpus, gpus, has_folder, str(shards)):
        raise StudyError(
            f"data.shards (--data): {shards} is not seen by {blind}; put the scenes on storage "
            "that all machines share under one path, or copy them to that path on each"
        )


def has_folder(path: str) -> bool:
    """Return, on a node, whether the folder exists."""
    return Path(path).is_dir()


def sees(location: str) -> bool:
    """Return, on a node, whether the file exists."""
    filesystem, path = open_location(location)
    return bool(filesystem.get_file_info(path).is_file)


def _blind(cpus: int, gpus: float, look: Callable[[str], bool], place: str) -> str:
    """Return the nodes that do not see a location, as text; nodes without an answer are omitted."""
    asked = [
        (
            f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
            on_node(node["NodeID"], look, place),
        )
        for node in ray.nodes()
        if node["Alive"] and Machine.of(node["Resources"]).places(cpus, gpus)
    ]
    answers = [answer for _, answer in asked]
    if answers:
        ray.wait(answers, num_returns=len(answers), timeout=_ANSWER_TIMEOUT)
    blind = []
    for name, answer in asked:
        try:
            if not ray.get(answer, timeout=0):
                blind.append(name)
        except RayTaskError as error:
            logger.warning("%s cannot look at %s: %s", name, place, error.cause)
            blind.append(name)
        except RayError as error:
            logger.warning("%s was not asked: %s", name, str(error)[:200])
    return ", ".join(blind[:5]) + (f" and {len(blind) - 5} more" if len(blind) > 5 else "")
