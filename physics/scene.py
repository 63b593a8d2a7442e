"""Scenes: measurements with their true sources, and how sources are drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from physics.codebook import Codebook
from physics.config import FrozenModel
from physics.covariance import LowRankCovariance, source_covariance
from physics.geometry import PlanarArray
from physics.rows import Rows
from physics.steering import Wavefront, steering_vector
from physics.transfer import sent

SourceMode = Literal["fluctuating", "constant"]


class SceneConfig(FrozenModel):
    """How scenes are drawn. Angles in degrees and levels in dB, as their names say."""

    n_antennas: int = Field(16, ge=1, description="antennas of the base station, M")
    n_snapshots: int = Field(16, ge=1, description="phase codes per scene, L")
    min_sources: int = Field(1, ge=0, description="fewest sources in a scene")
    max_sources: int = Field(5, ge=1, description="most sources in a scene, K")
    azimuth_deg: tuple[float, float] = Field(
        (-60.0, 60.0), description="bounds of the sources' azimuth [deg]"
    )
    elevation_deg: tuple[float, float] = Field(
        (-30.0, 30.0), description="bounds of the sources' elevation [deg]"
    )
    range_m: tuple[float, float] = Field(
        (0.5, 10.0), description="bounds of the sources' distance from the surface's centre [m]"
    )
    snr_db: tuple[float, float] = Field(
        (-5.0, 20.0), description="bounds of the SNR, mean |clean y|^2 / sigma^2 [dB]"
    )
    wavefront: Wavefront = Field(
        "spherical",
        description="wave model; spherical: exact; fresnel: second order; paraxial: (x^2 + y^2) "
        "/ 2r only; planar: plane waves",
    )
    source_mode: SourceMode = Field(
        "fluctuating",
        description="fluctuating: new symbols in every snapshot; constant: one symbol for all "
        "snapshots of a scene",
    )
    path_loss_exponent: float = Field(1.0, ge=0, description="amplitude falls as range^-exponent")
    codebook: Codebook = Field("random", description="kind of phase codes of the snapshots")
    code_bits: int | None = Field(
        3, ge=1, le=16, description="phase bits of the codes; null: continuous phases"
    )
    k_factor_db: float = Field(
        3.0, ge=-100, le=100, description="Rice factor of the BS-RIS channel [dB]"
    )
    base_station_range_m: tuple[float, float] = Field(
        (20.0, 50.0), description="bounds of the base station's distance from the surface [m]"
    )
    element_jitter: float = Field(
        0.0, ge=0, description="standard deviation of the element displacement [m]"
    )
    phase_error_deg: float = Field(
        0.0, ge=0, description="standard deviation of the element phase error [deg]"
    )
    amplitude_error_db: float = Field(
        0.0, ge=0, description="standard deviation of the element amplitude [dB]"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="probability that an element is dead")
    true_wavefront: Wavefront | None = Field(
        None,
        description="wave model of the measurements, while all methods assume that of "
        "wavefront; null: the same",
    )
    error_levels: Literal["fixed", "varied"] = Field(
        "fixed",
        description="fixed: every scene has the five errors above as configured; varied: in "
        "each scene an error is, with equal probability, absent or at a level of "
        "its own up to the configured one (domain randomisation)",
    )

    faultless_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="with error_levels varied: share of scenes whose array is set to have no "
        "error at all, in addition to those that have none by chance",
    )

    @property
    def extent(self) -> tuple[float, float, float]:
        """Largest separation of sources in azimuth, elevation [rad] and range [m]."""
        azimuth, elevation, distance = (
            high - low for low, high in (self.azimuth_deg, self.elevation_deg, self.range_m)
        )
        return math.radians(azimuth), math.radians(elevation), distance

    @field_validator("azimuth_deg", "elevation_deg", "range_m", "snr_db", "base_station_range_m")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"lower bound {value[0]} is above upper bound {value[1]}")
        return value

    @field_validator("range_m", "base_station_range_m")
    @classmethod
    def _positive(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] <= 0:
            raise ValueError(f"range starts at {value[0]} m; it must be above 0")
        return value

    @field_validator("azimuth_deg", "elevation_deg")
    @classmethod
    def _in_front(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] < -90 or value[1] > 90:
            raise ValueError(f"{value} leaves the half space in front, -90..90 degrees")
        return value

    @model_validator(mode="after")
    def _faultless_where_levels_vary(self) -> Self:
        if self.faultless_share and self.error_levels == "fixed":
            raise ValueError(
                f"faultless_share is {self.faultless_share} with error_levels fixed, where all "
                "scenes have the same errors; set error_levels to varied, or the share to 0"
            )
        return self

    @model_validator(mode="after")
    def _counts(self) -> Self:
        if self.min_sources > self.max_sources:
            raise ValueError(
                f"min_sources {self.min_sources} is above max_sources {self.max_sources}"
            )
        return self


@dataclass(frozen=True)
class Scenes(Rows):
    """A batch of scenes with their true sources.

    ``position`` holds azimuth, elevation [rad] and range [m]. Slots from ``n_sources`` on have
    power 0 and any position, including a padding of zeros or NaN. It is replaced by (1, 1, 1),
    which has a finite steering vector, so that its product with the power is 0. ``power`` is the
    incoherent power p_k of ``R = sum p_k a_k a_k^H`` on an arbitrary common scale. NumPy arrays
    are converted to tensors.
    """

    y: Tensor  # (B, L, M) complex
    H: Tensor  # (B, M, N) complex
    codes: Tensor  # (B, L, N) complex
    position: Tensor  # (B, K, 3) real
    power: Tensor  # (B, K) real
    n_sources: Tensor  # (B,) int64
    snr_db: Tensor  # (B,) real; NaN where it is unknown

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                object.__setattr__(self, name, torch.as_tensor(value))
        # Mismatched shapes are left for the later checks to report.
        if self.position.ndim == 3 and self.n_sources.shape == self.position.shape[:1]:
            safe = torch.where(self.present.unsqueeze(-1), self.position, 1.0)
            object.__setattr__(self, "position", safe)

    @property
    def present(self) -> Tensor:
        """(B, K) bool: which slots hold a source."""
        slots = torch.arange(self.position.shape[-2], device=self.n_sources.device)
        return slots < self.n_sources.unsqueeze(-1)

    @property
    def known_snr_db(self) -> Tensor:
        """SNR (B,) [dB] as given to an estimator: -inf without sources, whatever was drawn."""
        return torch.where(self.n_sources > 0, self.snr_db, -torch.inf)

    def covariance(self, array: PlanarArray, wavefront: Wavefront) -> LowRankCovariance:
        """R_true = sum p_k a_k a_k^H on the nominal manifold, trace N; identity without sources."""
        return source_covariance(steering_vector(self.position, array, wavefront), self.power)


def draw_sources(
    config: SceneConfig,
    n_scenes: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Draw source positions and counts.

    K is uniform on min_sources..max_sources; azimuth, elevation and range are uniform on their
    intervals, independently.

    Returns:
        position (B, max_sources, 3) [rad, rad, m] and n_sources (B,) int64.
    """
    n_sources = torch.randint(
        config.min_sources, config.max_sources + 1, (n_scenes,), generator=generator, device=device
    )
    unit = torch.rand(
        (n_scenes, config.max_sources, 3), generator=generator, device=device, dtype=dtype
    )
    limits = [
        [
            math.radians(config.azimuth_deg[side]),
            math.radians(config.elevation_deg[side]),
            config.range_m[side],
        ]
        for side in (0, 1)
    ]
    low, high = sent(torch.tensor(limits, dtype=dtype), unit.device)
    return low + (high - low) * unit, n_sources
