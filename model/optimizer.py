"""Optimiser, learning-rate schedule and averaged weights."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from physics.config import Adjustable, FrozenModel


class TrainingConfig(FrozenModel):
    """Optimiser, schedule and stopping rules."""

    epochs: int = Field(10, ge=1, description="epochs of a trial, its budget")
    batch_size: int = Field(64, ge=1, description="scenes per optimiser step")
    accumulation: int = Field(
        1,
        ge=1,
        description="parts in which a step's gradient is computed: less memory, same step (but "
        "dropout is drawn per part)",
    )
    learning_rate: Adjustable[float] = Field(
        1e-3, gt=0, description="peak learning rate of the schedule"
    )
    weight_decay: Adjustable[float] = Field(1e-4, ge=0, description="weight decay of AdamW")
    warmup_fraction: Adjustable[float] = Field(
        0.05, ge=0, lt=1, description="share of optimiser steps used for warm-up"
    )
    final_learning_rate: Adjustable[float] = Field(
        0.01, ge=0, le=1, description="final learning rate, as a share of the peak"
    )
    gradient_clip: Adjustable[float] = Field(
        1.0, gt=0, description="largest gradient norm of a step"
    )
    ema_decay: Adjustable[float] = Field(
        0.999, ge=0, lt=1, description="decay of the averaged weights"
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="epochs without improvement after which a training stops; null: no early stop",
    )
    max_skipped_steps: int = Field(
        20, ge=1, description="consecutive non-finite steps after which a trial fails"
    )
    snr_dropout: Adjustable[float] = Field(
        0.1, ge=0, le=1, description="share of training scenes whose SNR is hidden"
    )
    threads: int = Field(1, ge=1, description="CPU threads of a trial")
    compile: bool = Field(
        False,
        description="compile the network's part of a step before the first one, which can take "
        "more than a minute: for long trainings",
    )

    def warmup_steps(self, total_steps: int) -> int:
        """Optimiser steps of the warm-up."""
        return round(self.warmup_fraction * total_steps)


def make_optimizer(
    network: nn.Module, config: TrainingConfig, device: torch.device
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and kernels, but not on biases, gains and norms.

    Source: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        fused=device.type != "cpu",
    )


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Rate of optimiser step ``step`` (from 0): linear warm-up, then a cosine to the final rate.

    The schedule counts optimiser steps, and is evaluated before each of them.
    """
    warmup = config.warmup_steps(total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    low = config.final_learning_rate
    return config.learning_rate * (low + (1.0 - low) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class WeightAverage:
    """Exponential moving average of a network's weights over optimiser steps.

    The decay of step t is ``min(decay, (1 + t) / (10 + t))``, so that short trainings are not
    pulled back to the initial weights. Skipped steps count like the others, so that the host need
    not know about them.

    Args:
        network: network with the weights to average.
        decay: decay after warm-up; 0 copies the weights exactly.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.steps = 0
        self.weights = {name: p.detach().clone() for name, p in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Update the average after an optimiser step."""
        self.steps += 1
        decay = min(self.decay, (1.0 + self.steps) / (10.0 + self.steps))
        current = [p.detach() for _, p in network.named_parameters()]
        torch._foreach_lerp_(list(self.weights.values()), current, 1.0 - decay)

    def load(self, weights: dict[str, Tensor], steps: int) -> None:
        """Restore saved averages."""
        self.steps = steps
        for name, value in self.weights.items():
            value.copy_(weights[name])
