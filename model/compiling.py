"""A network's training step, compiled by TorchInductor."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from model.features import Features
from model.prediction import Prediction, SourceNetwork


def compiled(network: SourceNetwork, threads: int) -> Callable[[Features], Prediction]:
    """The network's forward and backward pass as compiled code, with the same weights.

    Compilation happens at the first call, which needs a C++ compiler on a CPU and Triton on a GPU,
    and again for each new batch size. Dropout draws the same values as in the plain network.
    Physics and complex operations are not compiled. A process holds one compiled network at a time:
    earlier compiled code is discarded, since its cache would otherwise fill after some trials.

    Args:
        network: in training mode when it is called.
        threads: number of compilation threads.
    """
    torch.compiler.reset()
    torch._inductor.config.compile_threads = threads
    # Not compiled: it is complex, and steering vectors use cached element positions on the device.
    network.manifold_factor = torch.compiler.disable(network.manifold_factor)  # type: ignore[method-assign]
    for said in (
        "Torchinductor does not support code generation",
        "Dynamo does not know how to trace",
        "`torch._prims_common.check` is deprecated",
    ):
        warnings.filterwarnings("ignore", said)
    # Draw dropout as the plain network does; on a CPU this was found to be the case anyway.
    made: Callable[[Features], Prediction] = torch.compile(
        network, dynamic=False, options={"fallback_random": True}
    )
    return made
