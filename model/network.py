"""The families of networks, chosen by configuration."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from model.candidate import CandidateNetwork, CandidateNetworkConfig
from model.image import ImageConfig, ImageNetwork
from model.prediction import SourceNetwork
from model.snapshot import SnapshotConfig, SnapshotNetwork
from physics.geometry import PlanarArray
from physics.scene import SceneConfig

FAMILIES = ("snapshot", "image", "candidate")


def dotted(location: tuple[int | str, ...]) -> str:
    """Path of a field that pydantic names, without the family that it puts in between."""
    parts = [
        str(part)
        for index, part in enumerate(location)
        if not (part in FAMILIES and location[max(0, index - 1)] == "network")
    ]
    return ".".join(parts)


def _with_family(value: Any) -> Any:
    """``network.family`` may be left out: it is then ``snapshot``."""
    return {"family": "snapshot"} | value if isinstance(value, dict) else value


AnyConfig = SnapshotConfig | ImageConfig | CandidateNetworkConfig
NetworkConfig = Annotated[
    Annotated[AnyConfig, Field(discriminator="family")],
    BeforeValidator(_with_family),
]


def build_network(config: AnyConfig, scene: SceneConfig, array: PlanarArray) -> SourceNetwork:
    """The network that a configuration asks for, with fresh weights."""
    if isinstance(config, CandidateNetworkConfig):
        return CandidateNetwork(config, scene, array)
    if isinstance(config, ImageConfig):
        return ImageNetwork(config, scene, array)
    return SnapshotNetwork(config, scene, array)
