"""What a cluster's autoscaler may add, from the configuration that it works by.

Ray tells nobody: `state.get_max_resources_from_cluster_config` reads what only managed
platforms report. But the autoscaler's own configuration lies on the head, as a file that
its monitor was started with, or with KubeRay as the RayCluster that the operator made the
pods from. A task that is bound to the head reads it there, wherever the driver runs.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tuner.capacity import Growth, Machine

logger = logging.getLogger(__name__)

HEAD = "node:__internal_head__"  # a resource that the head alone has
_ANSWER_TIMEOUT = 60.0  # seconds for the head to set up this code and read
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_MONITORS = ("_private/monitor.py", "v2/monitor.py")


def find_growth(nodes: Sequence[Mapping[str, Any]]) -> Growth | None:
    """How far the connected cluster may grow; None where it has no autoscaler.

    Args:
        nodes: that are alive, as `ray.nodes` lists them.
    """
    reported = _reported()
    if reported is not None:
        return reported
    head = next((node["NodeID"] for node in nodes if HEAD in node["Resources"]), None)
    if head is None:
        return None
    try:
        config = ray.get(on_node(head, _config_here), timeout=_ANSWER_TIMEOUT)
    except RayError as error:
        # Whatever keeps the head from reading it: that there is an autoscaler is likely.
        logger.warning("what the autoscaler may add is not known: %s", _line(error))
        return Growth.unknown()
    return None if config is None else Growth.of(config, n_workers=len(nodes) - 1)


def on_node(node: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on one node, which need not have anything to spare; a reference to it."""
    bound = NodeAffinitySchedulingStrategy(node, soft=False)
    task: Any = ray.remote(num_cpus=0, max_retries=0)(function)
    return task.options(scheduling_strategy=bound).remote(*arguments)


def _config_here() -> dict[str, Any] | None:
    # The head's own name for the cluster: a driver elsewhere may know it by another.
    return autoscaling_config(ray.get_runtime_context().gcs_address)


def autoscaling_config(gcs_address: str) -> dict[str, Any] | None:
    """On the head: the configuration of the cluster's autoscaler, None where there is none.

    Args:
        gcs_address: tells this cluster's monitor from those of others on the machine.

    Raises:
        OSError: there is an autoscaler whose configuration cannot be read.
    """
    for arguments in _command_lines():
        if f"--gcs-address={gcs_address}" in arguments and any(
            argument.endswith(_MONITORS) for argument in arguments
        ):
            given = [a.partition("=")[2] for a in arguments if a.startswith("--autoscaling-config")]
            # Without one it only watches nodes that come and go by hand.
            return yaml.safe_load(Path(given[0]).expanduser().read_text()) if given else None
    cluster = os.environ.get("RAY_CLUSTER_NAME")
    # KubeRay's autoscaler is no child of the head's: it lives in a container beside it.
    return _from_kubernetes(cluster) if cluster else None


def _from_kubernetes(cluster: str) -> dict[str, Any]:
    """The autoscaling configuration that KubeRay derives from the RayCluster."""
    from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer

    namespace = os.environ.get("RAY_CLUSTER_NAMESPACE") or _NAMESPACE.read_text().strip()
    return AutoscalingConfigProducer(cluster, namespace)()


def _command_lines() -> list[list[str]]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                text = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:  # it has ended
                continue
            found.append(text.split("\0"))
    return found


def _reported() -> Growth | None:
    """What a managed platform has reported to Ray, if it has."""
    from ray._private.state import state

    try:
        config = state.get_cluster_config()
    except Exception as error:  # noqa: BLE001 - a private door of Ray; there are others
        logger.debug("no cluster configuration was reported: %s", error)
        return None
    groups = config.node_group_configs if config else []
    machines = [
        Machine.of(group.resources, math.inf if group.max_count < 0 else group.max_count)
        for group in groups
    ]
    return Growth(tuple(machines)) if machines else None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[-300:]
