"""The cost of running a network, as a number that is the same on every machine."""

from __future__ import annotations

import json

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.adjustment import lasting
from model.config import TrialConfig
from model.features import Features
from model.prediction import SourceNetwork

_COUNTED: dict[str, int] = {}  # by the configuration that determines a network's shape


def trial_flops(config: TrialConfig, network: SourceNetwork, features: Features) -> int:
    """:func:`forward_flops` of a trial's network, cached by the network's shape.

    Counting takes the time of some forward passes, and an actor runs one trial after another.

    Args:
        config: of the trial.
        network: of the trial.
        features: of a batch.
    """
    fixed = lasting(config)
    shape = json.dumps([fixed[part] for part in ("network", "scene", "array")], default=str)
    if shape not in _COUNTED:
        _COUNTED[shape] = forward_flops(network, features)
    return _COUNTED[shape]


def forward_flops(network: SourceNetwork, features: Features) -> int:
    """Floating-point operations of one scene's forward pass.

    Matrix products and convolutions are counted, with two operations per multiply-add and complex
    operations counted like real ones. Element-wise operations are not counted, nor is the
    computation before the network (ridge solutions, spectra, candidates). The number depends on
    shapes only, not on weights, scenes, precision or device.

    Args:
        network: left unchanged; its dropout draws nothing here.
        features: of a batch of B scenes, B at least 1.
    """
    was_training = network.training
    network.eval()
    # The counter cannot see into fused attention kernels: without gradients the encoder uses one
    # for a whole layer, and on a CPU one for the attention.
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as n:
            network(features)
    finally:
        network.train(was_training)
    return n.get_total_flops() // len(features.snr_db)
