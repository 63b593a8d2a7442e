"""Selects a command's device and checks its precision."""

from __future__ import annotations

import torch

from model.precision import AmpPolicy, PrecisionConfig
from tuner.errors import ConfigError, StudyError


def chosen_device(asked: str | None) -> str:
    """Return the requested device, or by default the GPU if there is one, else the CPU.

    Raises:
        StudyError: this machine has no such device.
    """
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked is None:
        return "cuda" if n_gpus else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise StudyError(f"--device: no device {asked!r}; expected cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= n_gpus:
        has = "no GPU" if not n_gpus else f"cuda:0 to cuda:{n_gpus - 1}"
        raise StudyError(f"--device: {asked} asked, but this machine has {has}")
    return asked


def check_precision(precision: PrecisionConfig, device: str) -> None:
    """Raise ConfigError for a precision that the device does not support.

    Raises:
        ConfigError: the precision is not supported; the text names the field.
    """
    try:
        AmpPolicy(precision, torch.device(device))
    except ValueError as error:
        raise ConfigError(f"precision.amp: got {precision.amp!r}; {error}") from error
