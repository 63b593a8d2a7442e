"""What a network costs to use, as a number that is the same on every machine."""

from __future__ import annotations

import json

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.adjustment import lasting
from model.config import TrialConfig
from model.features import Features
from model.prediction import SourceNetwork

_COUNTED: dict[str, int] = {}  # by what gives a network its shape


def trial_flops(config: TrialConfig, network: SourceNetwork, features: Features) -> int:
    """:func:`forward_flops` of a trial's network, counted once for all of its shape.

    The counting takes some forward passes' time, and an actor takes one trial after another.

    Args:
        config: of the trial.
        network: its own.
        features: of a batch.
    """
    fixed = lasting(config)
    shape = json.dumps([fixed[part] for part in ("network", "scene", "array")], default=str)
    if shape not in _COUNTED:
        _COUNTED[shape] = forward_flops(network, features)
    return _COUNTED[shape]


def forward_flops(network: SourceNetwork, features: Features) -> int:
    """Floating-point operations of one scene's forward pass.

    Matrix products and convolutions are counted, two operations a multiply-add, those of complex
    numbers like those of real ones; what is done element by element is not, nor what precedes the
    network (ridge solutions, spectra, candidates). The number follows from shapes alone: neither
    from weights, scenes and precision, nor from the device.

    Args:
        network: left as it was; its dropout draws nothing here.
        features: of a batch of B scenes, B at least 1.
    """
    was_training = network.training
    network.eval()
    # Attention's fused kernels are opaque to the counter: without gradients the encoder takes
    # one for a whole layer, and on a CPU one for the attention.
    try:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as n:
            network(features)
    finally:
        network.train(was_training)
    return n.get_total_flops() // len(features.snr_db)
