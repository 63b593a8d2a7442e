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
    """Dotted path of a field from a pydantic location, without the family inserted by pydantic."""
    parts = [
        str(part)
        for index, part in enumerate(location)
        if not (part in FAMILIES and location[max(0, index - 1)] == "network")
    ]
    return ".".join(parts)


def _with_family(value: Any) -> Any:
    """Set ``network.family`` to ``snapshot`` where it is left out."""
    return {"family": "snapshot"} | value if isinstance(value, dict) else value


AnyConfig = SnapshotConfig | ImageConfig | CandidateNetworkConfig | CustomConfig
NetworkConfig = Annotated[
    Annotated[AnyConfig, Field(discriminator="family")],
    BeforeValidator(_with_family),
]


def build_network(config: AnyConfig, scene: SceneConfig, array: PlanarArray) -> SourceNetwork:
    """Build the network of a configuration, with fresh weights.

    Raises:
        PluginError: a custom network that cannot be built.
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
    """Check the import paths of a configuration before a study starts.

    Raises:
        PluginError: an object that cannot be imported, or that is not a network.
    """
    for path in plugins_of(config):
        load_plugin(path)
    if isinstance(config.network, CustomConfig):
        build_network(config.network, config.scene, config.array.build())
