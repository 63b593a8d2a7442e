"""Connect to a Ray cluster or start Ray on this machine, and determine its resources."""

from __future__ import annotations

import importlib
import logging
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import ray
import torch

from model.wording import counted
from tuner.autoscaling import HEAD, find_growth
from tuner.capacity import Capacity, Machine
from tuner.config import ResourcesConfig
from tuner.errors import StudyError

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT = 5.0  # seconds for a TCP connection
_GREETING_TIMEOUT = 20.0  # seconds for the head's first answer
_HERE = "local"
_WANTS_A_TOKEN = "InvalidAuthToken"  # in the head's answer to a missing or wrong token


@dataclass(frozen=True)
class Cluster:
    """A connected cluster: its present and possible resources, and its dashboard."""

    description: str
    capacity: Capacity
    dashboard: str | None
    token_file: Path | None
    is_here: bool = False  # whether Ray was started on this machine for this run

    @property
    def n_cpus(self) -> float:
        """CPUs that are present."""
        return self.capacity.now(lambda machine: machine.cpus)

    @property
    def n_gpus(self) -> float:
        """GPUs that are present."""
        return self.capacity.now(lambda machine: machine.gpus)

    @property
    def n_gpus_possible(self) -> float:
        """GPUs that may become available, as far as is known."""
        return self.capacity.possible(lambda machine: machine.gpus)

    @property
    def has_several_nodes(self) -> bool:
        """Whether trials may run on more than one machine."""
        one_each = self.capacity.possible(lambda machine: 1.0)
        return one_each > 1 or not self.capacity.known

    @property
    def words(self) -> str:
        """Present and possible resources as text."""
        there = f"{counted(self.n_cpus, 'CPU')}, {counted(self.n_gpus, 'GPU')}"
        growth = self.capacity.growth
        if growth is None:
            return there
        cpus = self.capacity.possible(lambda machine: machine.cpus)
        may = f"up to {counted(cpus, 'CPU')}, {counted(self.n_gpus_possible, 'GPU')}"
        if growth.known:
            return f"{there} now, {may} with its autoscaler"
        return f"{there} now; what its autoscaler may add is not known"


@contextmanager
def connected(
    address: str | None, *, start: bool = True, plugins: Sequence[str] = ()
) -> Iterator[Cluster]:
    """Connect to the named or a detected cluster, or else start Ray on this machine.

    Args:
        address: ``host:port``, ``auto``, ``local`` (always start Ray here), or None for
            RAY_ADDRESS, then a head that `ray start` started on this machine, then ``local``.
        start: False starts nothing: the resources that Ray would detect here are looked up, and a
            cluster is only queried for its resources.

        plugins: import paths of user code, which is sent to other machines too.

    Raises:
        StudyError: a named cluster does not answer within a bounded time.
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
        # Other machines run this version of the code, whatever is installed there.
        options |= {"address": target, "runtime_env": {"py_modules": _packages(plugins)}}
    try:
        context = ray.init(**options)
    except Exception as error:  # raised for a node that does not start in half a minute
        line = " ".join(str(error).split())[:300]
        where = f"connect to Ray at {target}" if target else "start Ray here"
        advice = "" if target else "; try again when less runs here, or --local, which needs no Ray"
        raise StudyError(f"--address: cannot {where}: {line}{advice}") from error
    try:
        yield _look(description, context.dashboard_url, may_grow=target is not None)
    finally:
        ray.shutdown()


def trial_resources(cluster: Cluster, wanted: ResourcesConfig, trials: int) -> tuple[float, int]:
    """Return the GPUs per trial and the number of concurrent trials.

    If an autoscaler may add unknown resources, the requested resources are accepted unchecked, and
    the number of concurrent trials is what fits now unless it is set.

    Raises:
        StudyError: the requested resources can never be available.
    """
    gpus = wanted.gpus_per_trial
    if gpus is None:
        gpus = 1.0 if cluster.n_gpus_possible else 0.0
    cpus = wanted.cpus_per_trial or 1
    places = cluster.capacity.possible(lambda machine: machine.places(cpus, gpus))
    if not places and cluster.capacity.known:
        _refuse(cluster, cpus, gpus)
    return gpus, wanted.concurrent or max(1, int(min(places, trials)))


def _refuse(cluster: Cluster, cpus: int, gpus: float) -> NoReturn:
    if gpus and not cluster.n_gpus_possible:
        raise StudyError(
            f"resources.gpus_per_trial: {gpus:g} GPU a trial asked, but {cluster.description} has "
            "0; ask for 0 to run the trials on the CPU"
        )
    largest = cluster.capacity.largest(lambda m: m.cpus if m.gpus or not gpus else 0.0)
    kind = "node with a GPU" if gpus else "node"
    raise StudyError(
        f"resources.cpus_per_trial: {cpus} CPUs a trial asked, but the largest {kind} of "
        f"{cluster.description} has {largest:g}"
    )


def _choose(address: str | None) -> tuple[str | None, str]:
    """Return the address to connect to (None: start Ray here) and a description of it."""
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
    if noted and problem and _WANTS_A_TOKEN in problem:  # report it instead of starting Ray here
        raise StudyError(
            f"the Ray cluster at {noted} asks for a token that this command does not show: "
            "export RAY_AUTH_MODE=token, with the cluster's token in ~/.ray/auth_token; or "
            "--address local, which starts a Ray of its own"
        )
    if noted:
        logger.info("a Ray head at %s is noted but does not answer: %s", noted, problem)
    return None, here


def _noted_head() -> str | None:
    """Return the head address recorded by the last `ray start` on this machine, running or not."""
    from ray._private.utils import read_ray_address

    try:
        return read_ray_address() or None
    except OSError:
        return None


def _problem(address: str) -> str | None:
    """Return why no Ray head answers at an address, within a bounded time; None if one does."""
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


def _look(description: str, dashboard: str | None, *, may_grow: bool) -> Cluster:
    alive = [node for node in ray.nodes() if node["Alive"]]
    machines = {node["NodeID"]: Machine.of(node["Resources"]) for node in alive}
    heads = [machines.pop(node["NodeID"]) for node in alive if HEAD in node["Resources"]]
    return Cluster(
        description=description,
        capacity=Capacity(
            head=heads[0] if heads else None,
            workers=tuple(machines.values()),
            growth=find_growth(alive) if may_grow else None,
        ),
        dashboard=f"http://{dashboard}" if dashboard else None,
        token_file=_token_file(),
    )


def _here() -> Cluster:
    """Return the resources that Ray would detect on this machine."""
    from ray._private.utils import get_num_cpus

    n_cpus, n_gpus = float(get_num_cpus()), float(torch.cuda.device_count())
    return Cluster(
        description="a Ray that would be started on this machine",
        capacity=Capacity(Machine(n_cpus, n_gpus)),
        dashboard=None,
        token_file=None,
        is_here=True,
    )


def _token_file() -> Path | None:
    """Return the file with the dashboard's token; None if it needs none."""
    if os.environ.get("RAY_AUTH_MODE", "token") != "token":
        return None
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path if path.exists() else None


def _packages(plugins: Sequence[str]) -> list[str]:
    """Return the packages to send to other machines: ristune and the user's modules."""
    import model
    import physics
    import tuner

    folders = []
    for package in (physics, model, tuner):
        assert package.__file__ is not None
        folders.append(str(Path(package.__file__).parent))
    for path in plugins:
        top = importlib.import_module(path.partition(":")[0].partition(".")[0])
        places = [*getattr(top, "__path__", ())] or [top.__file__]
        folders += [str(place) for place in places if place]
    return list(dict.fromkeys(folders))


def quiet_ray() -> None:
    """Keep Ray's log records off the terminal; they go to the tuner's log."""
    root = logging.getLogger("ray")
    for handler in list(root.handlers):
        if isinstance(handler, logging.StreamHandler) and not isinstance(
            handler, logging.FileHandler
        ):
            root.removeHandler(handler)
    root.setLevel(logging.WARNING)
