"""A user-defined network, used instead of a built-in family."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from model.features import Spectrum
from model.plugin import ImportPath, Option, PluginError, load_plugin
from model.prediction import FamilyConfig, SourceNetwork
from physics.candidates import CandidateConfig
from physics.geometry import PlanarArray
from physics.scene import SceneConfig


class CustomConfig(FamilyConfig):
    """Import path and options of a user-defined network."""

    method = "a network of the user's own"

    family: Literal["custom"] = Field("custom", description="a network of your own")
    builder: ImportPath = Field(
        description="package.module:Class, a SourceNetwork, called as (config, scene, array)",
        examples=["examples.extension:SpectrumNetwork"],
    )
    options: dict[str, Option] = Field({}, description="options of the network; can be searched")
    rank: int = Field(
        8, ge=1, description="slots; where candidates are found, candidates.count applies instead"
    )
    candidates: CandidateConfig | None = Field(
        None, description="candidates that matching pursuit finds beforehand; null: none"
    )
    reads: tuple[Spectrum, ...] = Field(
        ("incoherent", "coherent"), description="spectra over the dictionary that the network reads"
    )

    @property
    def front_end(self) -> CandidateConfig | None:
        """The candidate search, if the configuration requests it."""
        return self.candidates

    @property
    def spectra(self) -> tuple[Spectrum, ...]:
        """The spectra that the configuration requests."""
        return self.reads

    @property
    def slots(self) -> int:
        """Largest number of sources that the network can predict."""
        return self.candidates.count if self.candidates else self.rank


def build_custom(config: CustomConfig, scene: SceneConfig, array: PlanarArray) -> SourceNetwork:
    """Build the network named by the import path.

    Raises:
        PluginError: it cannot be imported, is not a SourceNetwork, or holds a persistent buffer:
            only parameters are averaged, saved and exported.
    """
    network = load_plugin(config.builder)(config, scene, array)
    if not isinstance(network, SourceNetwork):
        raise PluginError(
            f"{config.builder}: made {type(network).__name__}; expected a SourceNetwork "
            "(model.prediction), which gives a Prediction"
        )
    parameters = dict(network.named_parameters(remove_duplicate=False))
    kept = [name for name in network.state_dict() if name not in parameters]
    if kept:
        raise PluginError(
            f"{config.builder}: holds the persistent {', '.join(kept[:3])}"
            f"{' and others' if len(kept) > 3 else ''}, which no checkpoint would; expected "
            "parameters alone: take GroupNorm or LayerNorm for BatchNorm, and register_buffer(..., "
            "persistent=False) for constants"
        )
    return network
