"""The complete configuration of a trial, composed of the sections of physics and model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from model.data import DataConfig
from model.decision import DecisionConfig
from model.loss import LossConfig
from model.network import NetworkConfig
from model.optimizer import TrainingConfig
from model.precision import PrecisionConfig
from model.snapshot import SnapshotConfig
from physics.blend import BlendConfig
from physics.config import FrozenModel
from physics.geometry import ArrayConfig
from physics.pursuit import resolvable_sources
from physics.scene import SceneConfig
from physics.tikhonov import TikhonovConfig

Objective = Literal["nmse", "f1", "gospa", "nll"]
OBJECTIVES: dict[Objective, str] = {
    "nmse": "validation NMSE of R_pred",
    "f1": "1 - F1 on the validation scenes",
    "gospa": "validation GOSPA [m]",
    "nll": "validation negative log-likelihood [nat]",
}
_METRICS: dict[Objective, str] = {"nmse": "nmse_pred", "gospa": "gospa", "nll": "nll"}


def score(objective: Objective, metrics: Mapping[str, Any]) -> float:
    """The value to minimise, computed from an epoch's validation metrics."""
    if objective == "f1":
        return 1.0 - metrics["f1"]
    return metrics[_METRICS[objective]]


class TrialConfig(FrozenModel):
    """Everything that decides the result of one training."""

    objective: Objective = Field(
        "nmse",
        description="what is minimised; nmse: NMSE of R_pred; f1: 1 - F1; gospa: GOSPA [m]; "
        "nll: negative log-likelihood of the sources [nat]",
    )
    seed: int = Field(0, ge=0, description="seed of weights, dropout, shuffling and jitter")
    array: ArrayConfig = ArrayConfig()
    scene: SceneConfig = SceneConfig()
    tikhonov: TikhonovConfig = TikhonovConfig()
    blend: BlendConfig = BlendConfig()
    network: NetworkConfig = SnapshotConfig()
    loss: LossConfig = LossConfig()
    precision: PrecisionConfig = PrecisionConfig()
    decision: DecisionConfig = DecisionConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()

    @model_validator(mode="after")
    def _candidates_can_be_told_apart(self) -> Self:
        wanted, scene = self.network.front_end, self.scene
        if wanted is None:
            return self
        wanted.check_waves(scene.wavefront)
        most = resolvable_sources(scene.source_mode, scene.n_snapshots, scene.n_antennas)
        if wanted.count > most:
            raise ValueError(
                f"network.candidates.count is {wanted.count}; {scene.n_snapshots} snapshots of "
                f"{scene.n_antennas} antennas tell at most {most} {scene.source_mode} sources apart"
            )
        return self

    @model_validator(mode="after")
    def _a_slot_for_every_source(self) -> Self:
        self.network.check_slots(self.scene)
        return self
