"""Mixed precision: the network under autocast, physics and loss in full precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from physics.config import FrozenModel

Amp = Literal["auto", "off", "bf16", "fp16"]


class PrecisionConfig(FrozenModel):
    """Automatic mixed precision."""

    amp: Amp = Field("auto", description="auto: bf16, or fp16 on a GPU without bf16; off on a CPU")


class AmpPolicy:
    """Autocast of the network and loss scaling for one device.

    ``auto`` uses bf16 on a GPU that supports it, fp16 with a gradient scaler on other GPUs, and no
    autocast on a CPU, where it would only be slower. The physics and the losses disable autocast
    with :func:`physics.precision.full_precision`.

    Args:
        config: the requested precision.
        device: where the network runs.

    Raises:
        ValueError: fp16 on a CPU, which has no useful gradient scaling.
    """

    def __init__(self, config: PrecisionConfig, device: torch.device) -> None:
        self.device = device
        self.dtype = self._resolve(config.amp, device)
        self.scaler = torch.amp.GradScaler(
            device.type if device.type == "cuda" else "cpu", enabled=self.dtype is torch.float16
        )

    @staticmethod
    def _resolve(amp: Amp, device: torch.device) -> torch.dtype | None:
        if amp == "auto":
            if device.type != "cuda":
                return None
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if native else torch.float16
        if amp == "fp16" and device.type != "cuda":
            raise ValueError(
                f"precision.amp is fp16 on device {device}; fp16 needs a GPU: use bf16, off or auto"
            )
        return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]

    @property
    def name(self) -> str:
        """``bf16``, ``fp16`` or ``off``."""
        return {None: "off", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]

    def autocast(self) -> AbstractContextManager[Any]:
        """Context for the network's forward pass."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def backward(self, loss: Tensor) -> None:
        """Backward pass of the scaled loss."""
        self.scaler.scale(loss).backward()

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Restore the gradients to their true scale before clipping."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
        """Step the optimiser if the step is finite, and update the scaler.

        The kernel of a fused optimiser reads the flag on the device, so that the host need not.

        Args:
            optimizer: optimiser with unscaled gradients.
            finite: () bool.
        """
        if optimizer.defaults["fused"]:
            optimizer.found_inf = finite.logical_not().float()  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.found_inf  # type: ignore[attr-defined]
        elif finite:
            optimizer.step()
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """State of the scaler; empty when there is none."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the scaler."""
        if state:
            self.scaler.load_state_dict(state)
