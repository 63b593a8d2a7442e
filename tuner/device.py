"""The device that a command was asked for, and whether it can do what it is to do."""

from __future__ import annotations

import torch

from model.precision import AmpPolicy, PrecisionConfig
from tuner.errors import ConfigError, StudyError


def chosen_device(asked: str | None) -> str:
    """The device that was asked for; else the GPU where there is one, and the CPU elsewhere.

    Raises:
        StudyError: there is no such device here.
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
    """Refuse a precision that the device does not have.

    Raises:
        ConfigError: it names the field.
    """
    try:
        AmpPolicy(precision, torch.device(device))
    except ValueError as error:
        raise ConfigError(f"precision.amp: got {precision.amp!r}; {error}") from error
