"""The families of networks, chosen by configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, assert_never

from pydantic import BeforeValidator, Field

from model.candidate import CandidateNetwork, CandidateNetworkConfig
from model.custom import CustomConfig, build_custom
from model.image import ImageConfig, ImageNetwork
from model.plugin import load_plugin, plugins_of
from model.prediction import SourceNetwork
from model.snapshot import SnapshotConfig, SnapshotNetwork
from physics.geometry import PlanarArray
from physics.scene import SceneConfig

if TYPE_CHECKING:
    from model.config import TrialConfig

FAMILIES = ("snapshot", "image", "candidate", "custom")


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


AnyConfig = SnapshotConfig | ImageConfig | CandidateNetworkConfig | CustomConfig
NetworkConfig = Annotated[
    Annotated[AnyConfig, Field(discriminator="family")],
    BeforeValidator(_with_family),
]


def build_network(config: AnyConfig, scene: SceneConfig, array: PlanarArray) -> SourceNetwork:
    """The network that a configuration asks for, with fresh weights.

    Raises:
        PluginError: a custom one that cannot be had.
    """
    match config:
        case SnapshotConfig():
            return SnapshotNetwork(config, scene, array)
        case ImageConfig():
            return ImageNetwork(config, scene, array)
        case CandidateNetworkConfig():
            return CandidateNetwork(config, scene, array)
        case CustomConfig():
            return build_custom(config, scene, array)
        case _:
            assert_never(config)


def check_plugins(config: TrialConfig) -> None:
    """Try what a configuration names by import path, before a study starts.

    Raises:
        PluginError: something that cannot be imported, or a network that is none.
    """
    for path in plugins_of(config):
        load_plugin(path)
    if isinstance(config.network, CustomConfig):
        build_network(config.network, config.scene, config.array.build())
