"""Checkpoints: tensors as safetensors, the rest as JSON; never pickle."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.config import TrialConfig

FORMAT = 1
STATE = "state.json"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, and why, in one line."""


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``folder`` only once it is whole and on disk.

    A crash, a full disk or a power cut before that leaves the old one as it was.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.new"
    fresh.mkdir()
    try:
        yield fresh
        for path in fresh.iterdir():
            _sync(path)
        _sync(fresh)
        stale = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.old"
        if folder.exists():
            folder.rename(stale)
        fresh.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(stale, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors."""
    save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, path)


def load_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read safetensors.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        return load_file(path, device=str(device))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected a checkpoint's weights") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as safetensors ({error})") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON; refuses NaN and Inf, which JSON has not."""
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected a checkpoint's {path.name}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error


def write_config(folder: Path, config: TrialConfig) -> None:
    """Write the trial's configuration beside its weights."""
    (folder / CONFIG).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_config(folder: Path) -> TrialConfig:
    """Read a trial's configuration.

    Raises:
        CheckpointError: missing, damaged, or of another version.
    """
    try:
        return TrialConfig.model_validate(read_json(folder / CONFIG))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{folder / CONFIG}: {where} holds {first.get('input')!r}: {first['msg']}"
        ) from error


def export_best(checkpoint: Path, out: Path) -> None:
    """Write the weights that were scored, and their configuration, for inference.

    Args:
        checkpoint: a checkpoint of :class:`model.training.Trainer`.
        out: folder that gets ``model.safetensors`` and ``config.json``; replaced as a whole.

    Raises:
        CheckpointError: the checkpoint is damaged, or no epoch of it was scored.
    """
    state = read_json(checkpoint / STATE)
    if state["best_epoch"] is None:
        raise CheckpointError(f"{checkpoint}: no epoch was scored yet; nothing to export")
    config = read_config(checkpoint)
    weights = load_tensors(checkpoint / "best.safetensors")
    with replacing(out) as fresh:
        save_tensors(fresh / WEIGHTS, weights)
        write_config(fresh, config)
