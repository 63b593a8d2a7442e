"""Reads the limits of a cluster's autoscaler from its configuration.

Ray has no general API for this: `state.get_max_resources_from_cluster_config` reads what only
managed platforms report. The autoscaler's configuration is available on the head, as a file passed
to its monitor, or with KubeRay as the RayCluster from which the operator created the pods. A task
that is pinned to the head reads it there, wherever the driver runs.
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

HEAD = "node:__internal_head__"  # a resource that only the head has
_ANSWER_TIMEOUT = 60.0  # seconds for the head to set up this code and read the configuration
_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_MONITORS = ("_private/monitor.py", "v2/monitor.py")


def find_growth(nodes: Sequence[Mapping[str, Any]]) -> Growth | None:
    """Return the limits of the connected cluster's autoscaler; None if it has none.

    Args:
        nodes: nodes that are alive, as listed by `ray.nodes`.
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
        # Whatever the error on the head is, there probably is an autoscaler.
        logger.warning("what the autoscaler may add is not known: %s", _line(error))
        return Growth.unknown()
    return None if config is None else Growth.of(config, n_workers=len(nodes) - 1)


def on_node(node: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on one node without reserving resources; return an object reference."""
    bound = NodeAffinitySchedulingStrategy(node, soft=False)
    task: Any = ray.remote(num_cpus=0, max_retries=0)(function)
    return task.options(scheduling_strategy=bound).remote(*arguments)


def _config_here() -> dict[str, Any] | None:
    # Use the head's own address: a driver elsewhere may use a different one.
    return autoscaling_config(ray.get_runtime_context().gcs_address)


def autoscaling_config(gcs_address: str) -> dict[str, Any] | None:
    """Return, on the head, the configuration of the cluster's autoscaler; None if it has none.

    Args:
        gcs_address: distinguishes this cluster's monitor from others on the machine.

    Raises:
        OSError: there is an autoscaler whose configuration cannot be read.
    """
    for arguments in _command_lines():
        if f"--gcs-address={gcs_address}" in arguments and any(
            argument.endswith(_MONITORS) for argument in arguments
        ):
            given = [a.partition("=")[2] for a in arguments if a.startswith("--autoscaling-config")]
            # Without a configuration the monitor only watches manually added nodes.
            return yaml.safe_load(Path(given[0]).expanduser().read_text()) if given else None
    cluster = os.environ.get("RAY_CLUSTER_NAME")
    # KubeRay's autoscaler is not a child process of the head: it runs in a sidecar container.
    return _from_kubernetes(cluster) if cluster else None


def _from_kubernetes(cluster: str) -> dict[str, Any]:
    """Return the autoscaling configuration that KubeRay derives from the RayCluster."""
    from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer

    namespace = os.environ.get("RAY_CLUSTER_NAMESPACE") or _NAMESPACE.read_text().strip()
    return AutoscalingConfigProducer(cluster, namespace)()


def _command_lines() -> list[list[str]]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                text = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:  # the process has ended
                continue
            found.append(text.split("\0"))
    return found


def _reported() -> Growth | None:
    """Return the limits that a managed platform has reported to Ray, if any."""
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
