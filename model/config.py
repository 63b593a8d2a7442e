"""One trial's whole configuration, composed of the sections of physics and model."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from model.data import DataConfig
from model.loss import LossConfig
from model.network import NetworkConfig
from model.optimizer import TrainingConfig
from model.precision import PrecisionConfig
from physics.config import FrozenModel
from physics.covariance import BlendConfig
from physics.geometry import ArrayConfig
from physics.scene import SceneConfig
from physics.tikhonov import TikhonovConfig


class TrialConfig(FrozenModel):
    """Everything that decides the result of one training."""

    seed: int = Field(0, ge=0, description="weights, dropout, shuffling and jitter")
    array: ArrayConfig = ArrayConfig()
    scene: SceneConfig = SceneConfig()
    tikhonov: TikhonovConfig = TikhonovConfig()
    blend: BlendConfig = BlendConfig()
    network: NetworkConfig = NetworkConfig()
    loss: LossConfig = LossConfig()
    precision: PrecisionConfig = PrecisionConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _a_slot_for_every_source(self) -> Self:
        if self.network.rank < self.scene.max_sources:
            raise ValueError(
                f"network.rank {self.network.rank} is below scene.max_sources "
                f"{self.scene.max_sources}; every source needs a slot"
            )
        return self
