"""The image network: a CNN on spectra over azimuth, elevation and planes of inverse range."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from model.features import Features, Spectrum, moderate_level
from model.prediction import FamilyConfig, Prediction, SourceNetwork
from physics.config import Adjustable
from physics.geometry import PlanarArray
from physics.precision import full_precision
from physics.scene import SceneConfig

_RARE = -4.0  # initial logit of a source in a direction


class ImageConfig(FamilyConfig):
    """Sizes of the image network."""

    method: ClassVar[str] = "peaks of a map over directions"

    family: Literal["image"] = Field("image", description="reads spectra as an image")
    width: int = Field(48, ge=8, description="channels")
    depth: int = Field(4, ge=1, description="residual blocks")
    dropout: Adjustable[float] = Field(0.0, ge=0, lt=1, description="dropout rate")
    azimuth_cells: int = Field(32, ge=2, description="azimuth cells of the images")
    elevation_cells: int = Field(16, ge=2, description="elevation cells of the images")
    range_cells: int = Field(6, ge=1, description="planes of inverse range, used as channels")
    range_bins: int = Field(24, ge=2, description="bins of the range distribution")
    rank: int = Field(8, ge=1, description="slots: peaks that are considered")

    @property
    def slots(self) -> int:
        """Largest number of sources that the network can predict."""
        return self.rank

    def check_slots(self, scene: SceneConfig) -> None:
        """Raise ValueError if there may be more sources than slots, or than directions."""
        super().check_slots(scene)
        azimuths, elevations, _ = self.grid(scene).shape
        if azimuths * elevations < scene.max_sources:
            raise ValueError(
                f"network.azimuth_cells and elevation_cells make {azimuths} x {elevations} "
                f"directions, fewer than scene.max_sources {scene.max_sources}; every source needs "
                "one of its own as its slot: raise them"
            )

    @property
    def spectra(self) -> tuple[Spectrum, ...]:
        """The matched-filter spectra and the adaptive one."""
        return "incoherent", "coherent", "adaptive"


class ImageNetwork(SourceNetwork):
    """Finds sources as peaks of a map over directions, without search or iteration.

    The network predicts for every direction of the grid a logit that there is a source, an offset
    within its cell with a standard deviation, a distribution over range bins, and a power. The
    slots are the highest local peaks of the map. The factor of R_pred is the posterior mean on the
    manifold, as for candidates.

    Args:
        config: sizes.
        scene: field of view and SNR.
        array: the surface.

    Source: objects as peaks of a map follow Zhou, Wang and Krahenbuhl, "Objects as points", 2019.
    """

    gated = True

    bins: Tensor  # (S,) [m]

    def __init__(self, config: ImageConfig, scene: SceneConfig, array: PlanarArray) -> None:
        super().__init__(config, scene, array)
        self.config = config
        self.register_buffer(
            "bins", torch.linspace(*scene.range_m, config.range_bins), persistent=False
        )
        width = config.width
        self.stem = nn.Conv2d(3 * self.grid.shape[2] + 4, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            _Block(width, 1 + index % 2, config.dropout) for index in range(config.depth)
        )
        self.heat = nn.Conv2d(width, 1, 1)
        nn.init.constant_(self.heat.bias, _RARE)  # type: ignore[arg-type]
        self.detail = nn.Conv2d(width, 5 + config.range_bins, 1)

    def forward(self, features: Features) -> Prediction:
        """Predict B scenes. Runs under autocast and returns full precision."""
        hidden = self.stem(self._images(features))
        for block in self.blocks:
            hidden = block(hidden)
        detail = self.detail(hidden)  # (B, D, A, E)
        with full_precision():
            # In float32: neighbours that are equal to bfloat16's three digits remain distinct.
            heat = self.heat(hidden.float()).squeeze(1)  # (B, A, E)
            detail = detail.float()
            index = self._peaks(heat.detach())  # (B, r)
            existence = heat.flatten(1).gather(1, index)
            chosen = detail.flatten(2).mT.gather(
                1, index.unsqueeze(-1).expand(-1, -1, len(detail[0]))
            )
            offset, log_power, log_spread, log_range_spread, logits = chosen.split(
                [2, 1, 1, 1, self.config.range_bins], dim=-1
            )
            direction = self.directions.flatten(0, 1)[index]
            direction = direction + torch.tanh(offset) * self.cell_size[:2]
            log_pointer = torch.log_softmax(logits, dim=-1)
            pointer = log_pointer.exp()
            shape = (*index.shape, len(self.bins))
            cells = torch.cat(
                [
                    direction.unsqueeze(-2).expand(*shape, 2),
                    self.bins.expand(shape).unsqueeze(-1),
                ],
                dim=-1,
            )
            log_weight = functional.logsigmoid(existence) + log_power.squeeze(-1)
            factor = self.manifold_factor(cells, pointer, log_weight)
            inverse_range = (pointer / self.bins).sum(-1, keepdim=True)
            # Initially a quarter of a cell.
            within = (2.0 * log_spread).exp().unsqueeze(-1) * torch.diag(
                (self.cell_size[:2] / 4.0).square()
            )
        return Prediction(
            factor,
            existence,
            log_pointer,
            torch.cat([direction, inverse_range], dim=-1),
            cells,
            within,
            log_range_spread.squeeze(-1).exp(),
            heat,
        )

    def _images(self, features: Features) -> Tensor:
        """Inputs (B, 3 Q + 4, A, E): spectra of every plane, the directions, and the SNR."""
        spectrum = features.spectrum.unflatten(-1, self.grid.shape).permute(0, 1, 4, 2, 3)
        image = spectrum.flatten(1, 2) / 2.0
        known = ~torch.isnan(features.snr_db)
        level = torch.stack([moderate_level(features.snr_db, known), known.to(image.dtype)], dim=-1)
        size = image.shape[-2:]
        return torch.cat(
            [
                image,
                self.directions.movedim(-1, 0).expand(len(image), -1, -1, -1),
                level[..., None, None].expand(-1, -1, *size),
            ],
            dim=1,
        )

    def _peaks(self, heat: Tensor) -> Tensor:
        """Cells (B, r) int64 of the highest local maxima, padded with others if too few."""
        top = functional.max_pool2d(heat.unsqueeze(1), 3, stride=1, padding=1).squeeze(1)
        span = heat.amax((1, 2), keepdim=True) - heat.amin((1, 2), keepdim=True) + 1.0
        ranked = torch.where(heat >= top, heat, heat - span).flatten(1)
        return ranked.topk(min(self.config.rank, ranked.shape[1]), dim=-1).indices


class _Block(nn.Module):
    """Residual block of two convolutions."""

    def __init__(self, width: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.first = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.gelu(self.first(functional.gelu(self.norm(x))))
        result: Tensor = x + self.dropout(self.second(inner))
        return result
