"""What a network costs to use, as a number that is the same on every machine."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.features import Features
from model.prediction import SourceNetwork


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
