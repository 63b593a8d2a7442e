"""What a cluster holds, node by node, and what its autoscaler may add: places for trials.

A trial lies on one node, and a share of a GPU on one GPU. Sums over a cluster say too
much: 8 nodes of 8 CPUs have 16 places for trials of 3 CPUs, not 21.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_SHARES = 1e-6  # thirds and tenths of a GPU are not exact


@dataclass(frozen=True)
class Machine:
    """A kind of node: what one has, and how many there are or may be."""

    cpus: float
    gpus: float = 0.0
    count: float = 1

    @classmethod
    def of(cls, resources: Mapping[str, Any], count: float = 1) -> Machine:
        """A machine in Ray's names of resources."""
        return cls(float(resources.get("CPU", 0)), float(resources.get("GPU", 0)), count)

    def places(self, cpus: float, gpus: float) -> int:
        """Trials that one such node holds side by side.

        Args:
            cpus: CPUs a trial, more than 0.
            gpus: GPUs a trial, 0 to 1.
        """
        places = math.floor(self.cpus / cpus)
        if gpus:
            places = min(places, math.floor(self.gpus) * math.floor(1 / gpus + _SHARES))
        return places


@dataclass(frozen=True)
class Growth:
    """How far an autoscaler may go.

    Attributes:
        machines: kinds of workers; ``count`` is the most of that kind, those that run included.
        most: workers of all kinds together.
        known: False where there may be workers besides of which nothing is known.
    """

    machines: tuple[Machine, ...] = ()
    most: float = math.inf
    known: bool = True

    @classmethod
    def unknown(cls) -> Growth:
        """An autoscaler of which nothing is known."""
        return cls(known=False)

    @classmethod
    def of(cls, config: Mapping[str, Any], n_workers: int) -> Growth:
        """Read an autoscaling configuration, as the cluster launcher or KubeRay leaves it.

        A kind without ``resources`` (machines of one's own) shows what it has when it joins: only
        when all such machines are there is everything known.

        Args:
            config: ``available_node_types``, ``head_node_type`` and ``max_workers``.
            n_workers: nodes beside the head that are there.
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
        """The most of something that the workers may have together."""
        left, found = self.most, 0.0
        for machine in sorted(self.machines, key=amount, reverse=True):
            count = min(machine.count, left)
            left -= count
            if amount(machine) > 0:
                found += amount(machine) * count
        return found


@dataclass(frozen=True)
class Capacity:
    """The nodes that are there, and those that an autoscaler may add.

    Attributes:
        head: the node that stays when nothing runs, if it is among the nodes.
        workers: the others.
        growth: None where nodes come and go by hand alone.
    """

    head: Machine | None
    workers: Sequence[Machine] = ()
    growth: Growth | None = None

    @property
    def known(self) -> bool:
        """Whether nothing may come of which nothing is known."""
        return self.growth is None or self.growth.known

    def now(self, amount: Callable[[Machine], float]) -> float:
        """How much of something there is."""
        return sum(amount(machine) for machine in self._nodes)

    def possible(self, amount: Callable[[Machine], float]) -> float:
        """How much of something there may be, as far as is known."""
        if self.growth is None:
            return self.now(amount)
        stays = amount(self.head) if self.head else 0.0
        return max(self.now(amount), stays + self.growth.total(amount))

    def largest(self, amount: Callable[[Machine], float]) -> float:
        """The most of something that one node has or may have."""
        grown = self.growth.machines if self.growth else ()
        return max((amount(machine) for machine in [*self._nodes, *grown]), default=0.0)

    @property
    def _nodes(self) -> list[Machine]:
        return [*([self.head] if self.head else []), *self.workers]
