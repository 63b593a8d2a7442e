"""The network, its losses, data and training; knows physics, not Ray."""

from model.checkpoint import CheckpointError, export_best
from model.config import TrialConfig
from model.data import DataConfig, check_data
from model.localizer import Localizer, Source
from model.loss import LossConfig, ScenesLoss
from model.network import NetworkConfig, Prediction, SnapshotNetwork
from model.optimizer import TrainingConfig
from model.precision import PrecisionConfig
from model.shards import DataError, ShardSplit, refuse_leaks, write_shards
from model.training import Trainer, TrialDiverged, train

__all__ = [
    "CheckpointError",
    "DataConfig",
    "DataError",
    "Localizer",
    "LossConfig",
    "NetworkConfig",
    "PrecisionConfig",
    "Prediction",
    "ScenesLoss",
    "ShardSplit",
    "SnapshotNetwork",
    "Source",
    "Trainer",
    "TrainingConfig",
    "TrialConfig",
    "TrialDiverged",
    "check_data",
    "export_best",
    "refuse_leaks",
    "train",
    "write_shards",
]
