"""The resources of a cluster by node, those its autoscaler may add, and room for trials.

A trial runs on one node, and a fraction of a GPU belongs to one GPU. Sums over a cluster
overestimate its capacity: 8 nodes of 8 CPUs have room for 16 trials of 3 CPUs, not 21.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SHARES = 1e-6  # thirds and tenths of a GPU are not exact


@dataclass(frozen=True)
class Machine:
    """A type of node: its resources, and how many such nodes exist or may be added."""

    cpus: float
    gpus: float = 0.0
    count: float = 1

    @classmethod
    def of(cls, resources: Mapping[str, Any], count: float = 1) -> Machine:
        """Create a machine from Ray's resource names."""
        return cls(float(resources.get("CPU", 0)), float(resources.get("GPU", 0)), count)

    def places(self, cpus: float, gpus: float) -> int:
        """Return the number of trials that one such node can run in parallel.

        Args:
            cpus: CPUs per trial, more than 0.
            gpus: GPUs per trial, 0 to 1.
        """
        places = math.floor(self.cpus / cpus)
        if gpus:
            places = min(places, math.floor(self.gpus) * math.floor(1 / gpus + _SHARES))
        return places


@dataclass(frozen=True)
class Growth:
    """The limits of an autoscaler.

    Attributes:
        machines: worker types; ``count`` is the maximum of that type, including running workers.
        most: maximum number of workers of all types.
        known: False if there may be further workers with unknown resources.
    """

    machines: tuple[Machine, ...] = ()
    most: float = math.inf
    known: bool = True

    @classmethod
    def unknown(cls) -> Growth:
        """Return the limits of an autoscaler whose configuration is unknown."""
        return cls(known=False)

    @classmethod
    def of(cls, config: Mapping[str, Any], n_workers: int) -> Growth:
        """Read an autoscaling configuration written by the cluster launcher or KubeRay.

        The resources of a node type without ``resources`` (on-premise machines) are unknown until
        its nodes join, so the limits are known only when all such nodes are present.

        Args:
            config: ``available_node_types``, ``head_node_type`` and ``max_workers``.
            n_workers: number of nodes present, without the head.
        """
        kinds = config.get("available_node_types") or {}
        most = math.inf if config.get("max_workers") is None else config["max_workers"]
        machines, unsized = [], 0.0
        for name, kind in kinds.items():
            count = kind.get("max_workers")
            if count is None:
                count = 0 if name == config.get("head_node_type") else most
            if not kind.get("resources"):
                unsized += count
            elif count:
                machines.append(Machine.of(kind["resources"], count))
        return cls(tuple(machines), most, known=unsized <= n_workers)

    def total(self, amount: Callable[[Machine], float]) -> float:
        """Return the maximum total of a resource over all workers."""
        left, found = self.most, 0.0
        for machine in sorted(self.machines, key=amount, reverse=True):
            count = min(machine.count, left)
            left -= count
            if amount(machine) > 0:
                found += amount(machine) * count
        return found


@dataclass(frozen=True)
class Capacity:
    """The nodes that are present, and those that an autoscaler may add.

    Attributes:
        head: the head node, which stays when nothing runs; None if it is not among the nodes.
        workers: the other nodes.
        growth: limits of the autoscaler; None if there is none.
    """

    head: Machine | None
    workers: Sequence[Machine] = ()
    growth: Growth | None = None

    @property
    def known(self) -> bool:
        """Whether the resources of all nodes that may be added are known."""
        return self.growth is None or self.growth.known

    def now(self, amount: Callable[[Machine], float]) -> float:
        """Return the current total of a resource."""
        return sum(amount(machine) for machine in self._nodes)

    def possible(self, amount: Callable[[Machine], float]) -> float:
        """Return the largest known total of a resource, with nodes that may be added."""
        if self.growth is None:
            return self.now(amount)
        stays = amount(self.head) if self.head else 0.0
        return max(self.now(amount), stays + self.growth.total(amount))

    def largest(self, amount: Callable[[Machine], float]) -> float:
        """Return the largest amount of a resource on any present or possible node."""
        grown = self.growth.machines if self.growth else ()
        return max((amount(machine) for machine in [*self._nodes, *grown]), default=0.0)

    @property
    def _nodes(self) -> list[Machine]:
        return [*([self.head] if self.head else []), *self.workers]
