"""Prediction of a network for a scene, and the base class of all networks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from model.features import Features, Spectrum
from physics.candidates import CandidateConfig
from physics.config import Adjustable, FrozenModel
from physics.covariance import LowRankCovariance
from physics.geometry import PlanarArray
from physics.scene import SceneConfig
from physics.spectrum import PolarGrid
from physics.steering import steering_vector


class FamilyConfig(FrozenModel):
    """Sizes that the networks of every family have."""

    method: ClassVar[str] = ""  # how sources are obtained, in a few words

    width: int = Field(64, ge=8, description="size of a token (d_model)")
    depth: int = Field(2, ge=1, description="encoder layers")
    dropout: Adjustable[float] = Field(0.1, ge=0, lt=1, description="dropout rate")
    azimuth_cells: int = Field(16, ge=2, description="azimuth cells of the position dictionary")
    elevation_cells: int = Field(8, ge=2, description="elevation cells of the position dictionary")
    range_cells: int = Field(
        5, ge=1, description="planes of inverse range of the position dictionary"
    )

    @property
    def front_end(self) -> CandidateConfig | None:
        """Computation on a measurement besides the ridge solutions, whose result is cached."""
        return None

    @property
    def spectra(self) -> tuple[Spectrum, ...]:
        """Spectra over the dictionary that the network reads."""
        return "incoherent", "coherent"

    @property
    def slots(self) -> int:
        """Largest number of sources that the network can predict."""
        raise NotImplementedError

    def check_slots(self, scene: SceneConfig) -> None:
        """Raise ValueError if there may be more sources than slots."""
        if self.slots < scene.max_sources:
            name = "candidates.count" if self.front_end else "rank"
            raise ValueError(
                f"network.{name} {self.slots} is below scene.max_sources "
                f"{scene.max_sources}; every source needs a slot"
            )

    def grid(self, scene: SceneConfig) -> PolarGrid:
        """Cells of the dictionary over a field of view."""
        return PolarGrid.covering(scene, self.azimuth_cells, self.elevation_cells, self.range_cells)


class AttentionConfig(FamilyConfig):
    """Sizes of a network with attention."""

    heads: int = Field(4, ge=1, description="attention heads; width must be a multiple of it")

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not a multiple of heads {self.heads}; "
                "choose a width that the heads divide"
            )
        return self


@dataclass(frozen=True)
class Prediction:
    """Prediction of a network for B scenes, in full precision.

    Slots are an unordered set of possible sources. Each has a probability of holding a source and a
    distribution over position cells: those of the network's dictionary, or cells of its own.
    """

    factor: Tensor  # (B, N, r) complex: factor of R_pred, any scale
    existence: Tensor  # (B, r) logit that a slot holds a source
    log_pointer: Tensor  # (B, r, G) log probability of each cell
    position: Tensor  # (B, r, 3) mean azimuth, elevation [rad], inverse range [1/m]
    cells: Tensor | None = None  # (B, r, G, 3) azimuth, elevation [rad], range [m]; None: shared
    angle_covariance: Tensor | None = None  # (B, r, 2, 2) [rad^2] of the direction's error
    range_spread: Tensor | None = (
        None  # (B, r) factor on the pointer's standard deviation of range; None: 1
    )
    heat: Tensor | None = None  # (B, A, E) logit of a source in each direction of the grid

    @property
    def covariance(self) -> LowRankCovariance:
        """R_pred, trace N; computed once, and again if gradients are needed later."""
        kept: LowRankCovariance | None = self.__dict__.get("_covariance")
        wanted = torch.is_grad_enabled() and self.factor.requires_grad
        if kept is None or (wanted and not kept.requires_grad):
            kept = LowRankCovariance(self.factor).normalized(moderate=True)
            self.__dict__["_covariance"] = kept
        return kept


class SourceNetwork(nn.Module, ABC):
    """A network of any family: features of scenes in, a :class:`Prediction` out.

    Attributes:
        dictionary: (G, N) complex steering vectors of the cells of a coarse grid.
        cells: (G, 3) their azimuth, elevation [rad] and inverse range [1/m].
        cell_size: (3,) [rad, rad, 1/m].
        cell_share: (G,) fraction of the field in each cell, in azimuth, elevation and range.
        directions: (A, E, 2) azimuth and elevation [rad] of the grid.
        gated: whether a source may be too far from all slots to match any.
    """

    gated: ClassVar[bool] = False

    dictionary: Tensor
    cells: Tensor
    cell_size: Tensor
    cell_share: Tensor
    directions: Tensor

    def __init__(self, config: FamilyConfig, scene: SceneConfig, array: PlanarArray) -> None:
        super().__init__()
        self.scene, self.array = scene, array
        self.grid = config.grid(scene)
        positions = self.grid.positions()
        self.register_buffer("directions", positions[:, :, 0, :2].clone(), persistent=False)
        cells = positions.reshape(-1, 3)
        cells[:, 2].reciprocal_()
        self.register_buffer("cells", cells, persistent=False)
        share = self.grid.shares().flatten().to(cells.dtype)
        self.register_buffer("cell_share", share, persistent=False)
        self.register_buffer(
            "dictionary", self.grid.steering(array, scene.wavefront).clone(), persistent=False
        )
        spans = [values[-1] - values[0] for values in (self.grid.azimuth, self.grid.elevation)]
        # A single plane represents all ranges; an axis without extent gets a cell size of 1.
        spans.append(1.0 / scene.range_m[0] - 1.0 / scene.range_m[1])
        cell_size = [s / max(1, n - 1) or 1.0 for s, n in zip(spans, self.grid.shape, strict=True)]
        self.register_buffer("cell_size", torch.tensor(cell_size), persistent=False)

    def manifold_factor(self, cells: Tensor, pointer: Tensor, log_weight: Tensor) -> Tensor:
        """Posterior mean on the manifold: columns ``sqrt(q_i p_i) sum_s w_is a(p_is)``.

        Args:
            cells: (B, r, S, 3) azimuth, elevation [rad], range [m].
            pointer: (B, r, S) weights w of the cells.
            log_weight: (B, r) logarithm of existence times power, on any scale.

        Returns:
            (B, N, r) complex, scaled to a largest weight of 1.
        """
        a = steering_vector(cells, self.array, self.scene.wavefront)  # (B, r, S, N)
        column = (pointer.unsqueeze(-2).to(a.dtype) @ a).squeeze(-2)
        log_weight = log_weight - log_weight.detach().amax(-1, keepdim=True)
        return (column * (0.5 * log_weight).exp().unsqueeze(-1)).mT

    @abstractmethod
    def forward(self, features: Features) -> Prediction:
        """Predict B scenes. Runs under autocast and returns full precision."""
