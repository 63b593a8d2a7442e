"""The network, its losses, data and training; depends on physics, not on Ray."""

from model.candidate import CandidateNetwork, CandidateNetworkConfig
from model.checkpoint import CheckpointError, export_best
from model.config import TrialConfig
from model.data import DataConfig
from model.datacheck import check_data
from model.decision import Decision, DecisionConfig
from model.localizer import Localizer, Source
from model.loss import LossConfig, ScenesLoss
from model.network import NetworkConfig, build_network
from model.optimizer import TrainingConfig
from model.precision import PrecisionConfig
from model.prediction import Prediction, SourceNetwork
from model.recording import write_shards
from model.shards import DataError, ShardSplit, refuse_leaks
from model.snapshot import SnapshotConfig, SnapshotNetwork
from model.training import Trainer, TrialDiverged, train

__all__ = [
    "CandidateNetwork",
    "CandidateNetworkConfig",
    "CheckpointError",
    "DataConfig",
    "DataError",
    "Decision",
    "DecisionConfig",
    "Localizer",
    "LossConfig",
    "NetworkConfig",
    "PrecisionConfig",
    "Prediction",
    "ScenesLoss",
    "ShardSplit",
    "SnapshotConfig",
    "SnapshotNetwork",
    "Source",
    "SourceNetwork",
    "Trainer",
    "TrainingConfig",
    "TrialConfig",
    "TrialDiverged",
    "build_network",
    "check_data",
    "export_best",
    "refuse_leaks",
    "train",
    "write_shards",
]
