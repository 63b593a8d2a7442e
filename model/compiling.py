"""A network's training step, compiled by TorchInductor."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from model.features import Features
from model.prediction import Prediction, SourceNetwork


def compiled(network: SourceNetwork, threads: int) -> Callable[[Features], Prediction]:
    """The network's forward and backward pass as compiled code, with the same weights.

    It is made at the first call, which needs a C++ compiler on a CPU and Triton on a GPU, and again
    for a batch of another size. What is drawn for dropout is what the network itself would draw.
    Physics and complex operations stay as they are. One network at a time is compiled in a process:
    what was compiled before is let go, or its cache would fill after some trials.

    Args:
        network: in training mode when it is called.
        threads: of the compilation.
    """
    torch.compiler.reset()
    torch._inductor.config.compile_threads = threads
    # Complex, and steering vectors ask for the array's elements on their device, which are kept.
    network.manifold_factor = torch.compiler.disable(network.manifold_factor)  # type: ignore[method-assign]
    for said in (
        "Torchinductor does not support code generation",
        "Dynamo does not know how to trace",
        "`torch._prims_common.check` is deprecated",
    ):
        warnings.filterwarnings("ignore", said)
    # Dropout is drawn as by the network itself, which on a CPU it was found to be in any case.
    made: Callable[[Features], Prediction] = torch.compile(
        network, dynamic=False, options={"fallback_random": True}
    )
    return made
