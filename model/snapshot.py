"""The snapshot network: convolution and transformer over snapshots, fed with physics."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from model.features import Features, moderate_level
from model.prediction import AttentionConfig, Prediction, SourceNetwork
from physics.geometry import PlanarArray
from physics.precision import full_precision
from physics.scene import SceneConfig


class SnapshotConfig(AttentionConfig):
    """Sizes of the snapshot network; ``depth`` layers over snapshots and as many over slots."""

    method: ClassVar[str] = "MUSIC on R_blend, K by the slots"

    family: Literal["snapshot"] = Field("snapshot", description="reads the snapshots")
    conv_channels: int = Field(
        16, ge=4, description="channels of the convolution over the surface's elements"
    )
    image_channels: int = Field(
        32, ge=4, description="channels of the CNN over the dictionary's cells"
    )
    rank: int = Field(8, ge=1, description="slots: columns of the covariance factor")

    @property
    def slots(self) -> int:
        """Largest number of sources that the network can predict."""
        return self.rank


class SnapshotNetwork(SourceNetwork):
    """Predicts sources and the factor of the covariance from the features of a scene.

    Every snapshot becomes a token: a convolution over the elements reads the ridge solution
    together with its code, and a linear map reads y. The channel and the SNR are added, and a
    transformer encoder lets the snapshots (an unordered set) attend to one another. A small CNN
    reads the matched-filter spectra over azimuth x elevation with one channel per plane of inverse
    range. A fixed number of slots then attends to the snapshots and the cells and to each other.
    Each slot points at cells of the dictionary; its column of the factor is the power-weighted
    sum of the steering vectors that it points at, so every R_pred lies on the array's manifold.

    Slots are an unordered set: the losses match them to sources.

    Args:
        config: sizes.
        scene: field of view and number of antennas.
        array: the surface.

    Source: the slots with set prediction follow Carion et al., "End-to-end object detection with
    transformers", ECCV 2020.
    """

    image_axes: Tensor  # (2, A, E)

    def __init__(self, config: SnapshotConfig, scene: SceneConfig, array: PlanarArray) -> None:
        super().__init__(config, scene, array)
        self.config = config
        width, channels = config.width, config.conv_channels
        self.snapshot_conv = _surface_encoder(4, channels, width, array)
        self.channel_conv = _surface_encoder(2 * scene.n_antennas, channels, width, array)
        self.measurement = nn.Linear(2 * scene.n_antennas, width)
        self.snr = nn.Linear(2, width)
        layer: dict[str, Any] = {
            "d_model": width,
            "nhead": config.heads,
            "dim_feedforward": 4 * width,
            "dropout": config.dropout,
            "activation": "gelu",
            "batch_first": True,
            "norm_first": True,
        }
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**layer),
            config.depth,
            norm=nn.LayerNorm(width),
            enable_nested_tensor=False,
        )
        planes = self.grid.shape[2]
        image = config.image_channels
        self.image_conv = nn.Sequential(
            nn.Conv2d(2 * planes + 2, image, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(image, image, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(image, image, 3, padding=1),
            nn.GELU(),
        )
        axes = torch.stack(
            torch.meshgrid(
                *(torch.linspace(-1, 1, count) for count in self.grid.shape[:2]), indexing="ij"
            )
        )
        self.register_buffer("image_axes", axes, persistent=False)
        self.cell_token = nn.Conv2d(image, width, 1)
        self.cell_key = nn.Conv2d(image, width * planes, 1)
        self.slots = nn.Parameter(torch.randn(config.rank, width))
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(**layer), config.depth, norm=nn.LayerNorm(width)
        )
        self.query = nn.Linear(width, width)
        self.spectrum_gain = nn.Parameter(torch.tensor([1.0, 0.5]))
        self.existence = nn.Linear(width, 1)
        self.log_power = nn.Linear(width, 1)
        self.offset = nn.Linear(width, 3)

    def forward(self, features: Features) -> Prediction:
        """Predict B scenes. Runs under autocast and returns full precision."""
        snapshots = self._snapshot_tokens(features)
        cell_tokens, keys = self._cells(features)
        memory = torch.cat([snapshots, cell_tokens], dim=1)
        slots = self.slots.expand(memory.shape[0], -1, -1)
        slots = self.decoder(slots, memory)

        score = self.query(slots) @ keys.mT / math.sqrt(keys.shape[-1])  # (B, r, G)
        existence = self.existence(slots).squeeze(-1)
        log_power = self.log_power(slots).squeeze(-1)
        offset = self.offset(slots)
        with full_precision():
            gain = self.spectrum_gain.float()
            prior = (gain[:, None] * features.spectrum).sum(1, keepdim=True)
            log_pointer = torch.log_softmax(score.float() + prior, dim=-1)
            pointer = log_pointer.exp()
            column = pointer.to(self.dictionary.dtype) @ self.dictionary  # (B, r, N)
            norm = torch.view_as_real(column).square().sum((-2, -1)).clamp_min(1e-12).rsqrt()
            power = torch.softmax(log_power.float(), dim=-1) * self.array.size
            factor = (column * (norm * power.sqrt()).unsqueeze(-1)).mT
            position = pointer @ self.cells + torch.tanh(offset.float()) * self.cell_size
        return Prediction(factor, existence.float(), log_pointer, position)

    def _snapshot_tokens(self, features: Features) -> Tensor:
        """Encoded tokens (B, L + 1, width) of the snapshots and the channel."""
        ridge = self._as_image(torch.stack([features.ridge, features.codes], dim=2))
        batch, n_snapshots = ridge.shape[:2]
        tokens = self.snapshot_conv(ridge.flatten(0, 1)).unflatten(0, (batch, n_snapshots))
        tokens = tokens + self.measurement(torch.view_as_real(features.y).flatten(-2))
        channel = self.channel_conv(self._as_image(features.H)).unsqueeze(1)
        known = ~torch.isnan(features.snr_db)
        level = torch.stack(
            [moderate_level(features.snr_db, known), known.to(features.snr_db.dtype)], -1
        )
        tokens = torch.cat([tokens, channel], dim=1) + self.snr(level).unsqueeze(1)
        encoded: Tensor = self.encoder(tokens)
        return encoded

    def _cells(self, features: Features) -> tuple[Tensor, Tensor]:
        """Tokens (B, A E, width) of the directions and keys (B, G, width) of the cells."""
        n_azimuth, n_elevation, planes = self.grid.shape
        spectrum = features.spectrum.unflatten(-1, self.grid.shape).permute(0, 1, 4, 2, 3)
        image = spectrum.flatten(1, 2)
        axes = self.image_axes.expand(image.shape[0], -1, -1, -1)
        image = self.image_conv(torch.cat([image, axes], dim=1))
        tokens = self.cell_token(image).flatten(2).mT
        keys = self.cell_key(image).unflatten(1, (planes, -1))  # (B, Q, width, A, E)
        keys = keys.permute(0, 3, 4, 1, 2).reshape(
            -1, n_azimuth * n_elevation * planes, keys.shape[2]
        )
        return tokens, keys

    def _as_image(self, value: Tensor) -> Tensor:
        """Complex (…, C, N) to real (…, 2 C, n_vertical, n_horizontal)."""
        real = torch.cat([value.real, value.imag], dim=-2)
        return real.unflatten(-1, (self.array.n_vertical, self.array.n_horizontal))


def _surface_encoder(
    in_channels: int, channels: int, width: int, array: PlanarArray
) -> nn.Sequential:
    """CNN that maps the elements of the surface to one token."""
    rows, columns = -(-array.n_vertical // 2), -(-array.n_horizontal // 2)
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(channels, channels, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(channels * rows * columns, width),
    )
