"""Finding a Ray cluster or starting Ray here, and what it has to give."""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from tuner.config import ResourcesConfig
from tuner.errors import StudyError

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT = 5.0  # seconds for a TCP connection
_GREETING_TIMEOUT = 20.0  # seconds for the head's first answer
_HERE = "local"


@dataclass(frozen=True)
class Cluster:
    """What is connected: present and possible resources, and the dashboard."""

    description: str
    n_cpus: float
    n_gpus: float
    n_cpus_possible: float
    n_gpus_possible: float
    largest_node_cpus: float
    n_nodes_possible: float
    dashboard: str | None
    token_file: Path | None
    is_here: bool = False  # Ray is started on this machine, for this run


@contextmanager
def connected(address: str | None, *, start: bool = True) -> Iterator[Cluster]:
    """Connect to the cluster that is named or found, else start Ray here.

    Args:
        address: ``host:port``, ``auto``, ``local`` (always start Ray here), or None for
            RAY_ADDRESS, then a head that `ray start` left on this machine, then ``local``.
        start: False starts nothing: what Ray would find here is looked up, and a cluster is asked
            for its resources only.

    Raises:
        StudyError: a named cluster that does not answer, in bounded time.
    """
    target, description = _choose(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if target is None and not start:
        yield _here()
        return
    if target is None:
        os.environ.pop("RAY_ADDRESS", None)
        options |= {"address": _HERE, "include_dashboard": True}
    elif not start:
        options |= {"address": target}
    else:
        # Other machines run this very code, whatever lies on their disks.
        options |= {"address": target, "runtime_env": {"py_modules": _own_packages()}}
    try:
        context = ray.init(**options)
    except (ConnectionError, RuntimeError, OSError, ValueError) as error:
        line = " ".join(str(error).split())[:300]
        where = f"connect to Ray at {target}" if target else "start Ray here"
        raise StudyError(f"--address: cannot {where}: {line}") from error
    try:
        yield _look(description, context.dashboard_url)
    finally:
        ray.shutdown()


def trial_resources(cluster: Cluster, wanted: ResourcesConfig, trials: int) -> tuple[float, int]:
    """GPUs a trial and trials side by side.

    Raises:
        StudyError: what is asked for can never be given.
    """
    gpus = wanted.gpus_per_trial
    if gpus is None:
        gpus = 1.0 if cluster.n_gpus_possible else 0.0
    if gpus > cluster.n_gpus_possible:
        raise StudyError(
            f"resources.gpus_per_trial: {gpus:g} GPU a trial asked, but {cluster.description} has "
            f"{cluster.n_gpus_possible:g}; ask for 0 to run the trials on the CPU"
        )
    cpus = wanted.cpus_per_trial or 1
    if cpus > cluster.largest_node_cpus:
        raise StudyError(
            f"resources.cpus_per_trial: {cpus} CPUs a trial asked, but the largest node of "
            f"{cluster.description} has {cluster.largest_node_cpus:g}"
        )
    places = cluster.n_cpus_possible / cpus
    if gpus:
        places = min(places, cluster.n_gpus_possible / gpus)
    concurrent = wanted.concurrent or max(1, int(min(places, trials)))
    return gpus, concurrent


def _choose(address: str | None) -> tuple[str | None, str]:
    """The address to connect to (None: start here) and words for it."""
    here = "Ray started on this machine"
    named = address or os.environ.get("RAY_ADDRESS") or None
    if named == _HERE:
        return None, here
    if named and named.startswith("ray://"):
        raise StudyError(
            f"--address: {named} is a Ray client address; run this command on a node of the "
            "cluster (ray exec cluster.yaml ...) or give host:port of its head"
        )
    if named and named != "auto":
        problem = _problem(named)
        if problem:
            raise StudyError(f"--address: no Ray cluster at {named}: {problem}")
        return named, f"the Ray cluster at {named}"
    noted = _noted_head()
    problem = _problem(noted) if noted else "no head was started on this machine"
    if noted and not problem:
        return noted, f"the Ray cluster at {noted}"
    if named == "auto":
        raise StudyError(f"--address: no Ray cluster found: {problem}")
    if noted:
        logger.info("a Ray head at %s is noted but does not answer: %s", noted, problem)
    return None, here


def _noted_head() -> str | None:
    """The head that the last `ray start` on this machine left, dead or alive."""
    from ray._private.utils import read_ray_address

    try:
        return read_ray_address() or None
    except OSError:
        return None


def _problem(address: str) -> str | None:
    """Why no Ray head answers at the address, found out in bounded time."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return "expected host:port, auto or local"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT):
            pass
    except (OSError, OverflowError) as error:
        return str(getattr(error, "strerror", None) or error)
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled

    answers: list[Any] = []

    def greet() -> None:
        try:
            answers.append(GcsClient(address=address))
        except Exception as error:  # noqa: BLE001 - whatever keeps it from answering
            answers.append(error)

    thread = threading.Thread(target=greet, daemon=True)
    thread.start()
    thread.join(_GREETING_TIMEOUT)
    if not answers:
        return f"it does not speak Ray (no answer in {_GREETING_TIMEOUT:g} s)"
    if isinstance(answers[0], Exception):
        return " ".join(str(answers[0]).split())[:200]
    return None


def _look(description: str, dashboard: str | None) -> Cluster:
    present = ray.cluster_resources()
    possible = _possible_resources()
    alive = [node for node in ray.nodes() if node["Alive"]]
    largest = max((node["Resources"].get("CPU", 0.0) for node in alive), default=0.0)
    return Cluster(
        description=description,
        n_cpus=present.get("CPU", 0.0),
        n_gpus=present.get("GPU", 0.0),
        n_cpus_possible=max(present.get("CPU", 0.0), possible.get("CPU", 0.0)),
        n_gpus_possible=max(present.get("GPU", 0.0), possible.get("GPU", 0.0)),
        # What an autoscaler may add is not known node by node: nothing is ruled out.
        largest_node_cpus=math.inf if possible else largest,
        n_nodes_possible=math.inf if possible else len(alive),
        dashboard=f"http://{dashboard}" if dashboard else None,
        token_file=_token_file(),
    )


def _here() -> Cluster:
    """What Ray would find on this machine."""
    from ray._private.utils import get_num_cpus

    n_cpus, n_gpus = float(get_num_cpus()), float(torch.cuda.device_count())
    return Cluster(
        description="Ray on this machine, which would be started",
        n_cpus=n_cpus,
        n_gpus=n_gpus,
        n_cpus_possible=n_cpus,
        n_gpus_possible=n_gpus,
        largest_node_cpus=n_cpus,
        n_nodes_possible=1,
        dashboard=None,
        token_file=None,
        is_here=True,
    )


def _token_file() -> Path | None:
    """Where the token lies for which the dashboard asks, if it asks."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return None
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path if path.exists() else None


def _possible_resources() -> dict[str, float]:
    """What an autoscaler may add up to; empty where there is none."""
    from ray._private.state import state

    try:
        found = state.get_max_resources_from_cluster_config()
    except Exception as error:  # noqa: BLE001 - a private door of Ray; what is present counts
        logger.debug("autoscaler limits are not known: %s", error)
        return {}
    return {key: float(value) for key, value in (found or {}).items()}


def _own_packages() -> list[str]:
    import model
    import physics
    import tuner

    folders = []
    for package in (physics, model, tuner):
        assert package.__file__ is not None
        folders.append(str(Path(package.__file__).parent))
    return folders


def quiet_ray() -> None:
    """Keep Ray's own log lines off the user's terminal; the tuner's log takes them."""
    root = logging.getLogger("ray")
    for handler in list(root.handlers):
        if isinstance(handler, logging.StreamHandler) and not isinstance(
            handler, logging.FileHandler
        ):
            root.removeHandler(handler)
    root.setLevel(logging.WARNING)
