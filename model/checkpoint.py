"""Checkpoints: one safetensors file each, replaced atomically; never pickle."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor

from model.config import TrialConfig
from model.decision import Decision
from model.files import replacing, write_text
from model.network import dotted

FORMAT = 3
CHECKPOINT = "checkpoint.safetensors"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
DECISION = "decision.json"


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message gives the reason in one line."""


@dataclass(frozen=True)
class Checkpoint:
    """State of a training between two epochs.

    Attributes:
        config: of the trial.
        tensors: groups of tensors, such as ``network`` and ``optimizer``, by name.
        state: plain values (JSON).
    """

    config: TrialConfig
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write ``checkpoint.safetensors``, atomically replacing an existing one."""
        flat = {f"{g}/{n}": t for g, group in self.tensors.items() for n, t in group.items()}
        save_tensors(
            Path(folder) / CHECKPOINT,
            flat,
            {
                "format": str(FORMAT),
                "config": self.config.model_dump_json(),
                "state": json.dumps(self.state, allow_nan=False),
            },
        )

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> Checkpoint:
        """Read it back.

        Raises:
            CheckpointError: missing, damaged, or of another format.
        """
        path = Path(folder) / CHECKPOINT
        flat, metadata = load_tensors(path, device)
        _check_format(path, metadata)
        tensors: dict[str, dict[str, Tensor]] = {}
        for key, value in flat.items():
            group, name = key.split("/", 1)
            tensors.setdefault(group, {})[name] = value
        return cls(parse_config(path, metadata["config"]), tensors, json.loads(metadata["state"]))


def exported(folder: Path) -> Path:
    """The folder of exported weights: the given folder, or ``best/`` of a run folder.

    If neither holds weights, the given folder is returned, and reading it reports the error.
    """
    best = folder / "best"
    return best if not (folder / WEIGHTS).exists() and best.is_dir() else folder


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of an exported network.

    Raises:
        CheckpointError: missing, damaged, or of another format.
    """
    weights, metadata = load_tensors(folder / WEIGHTS)
    _check_format(folder / WEIGHTS, metadata)
    for name, value in weights.items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"{folder / WEIGHTS}: {name} holds NaN or Inf; expected finite weights: the "
                "training diverged or the file is damaged; export or train the network again"
            )
    return weights


def _check_format(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != str(FORMAT):
        raise CheckpointError(
            f"{path}: format {metadata.get('format')!r}; expected {str(FORMAT)!r}: weights of "
            "another program or version mean something else here; train the network again"
        )


def has_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a checkpoint."""
    return (Path(folder) / CHECKPOINT).is_file()


def check_shapes(saved: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Check that saved weights match a network's own weights in name and shape.

    Raises:
        CheckpointError: a name that only one of them has, or another shape.
    """
    theirs, ours = ({n: tuple(t.shape) for n, t in side.items()} for side in (saved, own))
    for name in sorted({*theirs, *ours}):
        if theirs.get(name) != ours.get(name):
            raise CheckpointError(
                f"the weights are of another version's network: {name} is "
                f"{theirs.get(name, 'missing')}, expected "
                f"{ours.get(name, 'none of that name')}; train it anew"
            )


def save_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors, atomically."""
    whole = {
        name: tensor.detach().resolve_conj().resolve_neg().contiguous().cpu()
        for name, tensor in tensors.items()
    }
    # Same bytes as safetensors.torch.save_file, which spends much more time per tensor.
    specs = {
        name: TensorSpec(
            dtype=str(t.dtype).removeprefix("torch."),
            shape=t.shape,
            data_ptr=t.data_ptr(),
            data_len=t.nbytes,
        )
        for name, t in whole.items()
    }
    with replacing(path) as fresh:
        serialize_file(specs, fresh, metadata)


def load_tensors(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read safetensors and their metadata.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected safetensors") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not readable as safetensors ({error})") from error


def parse_config(path: Path, text: str) -> TrialConfig:
    """The trial's configuration from JSON text found in ``path``.

    Raises:
        CheckpointError: damaged, or of another version, naming the field.
    """
    try:
        return TrialConfig.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = dotted(first["loc"]) or "the file"
        raise CheckpointError(
            f"{path}: {where} holds {str(first.get('input'))[:80]!r}: {first['msg']}"
        ) from error


def read_config(folder: Path) -> TrialConfig:
    """Read the ``config.json`` next to exported weights.

    Raises:
        CheckpointError: missing, damaged, or of another version.
    """
    path = Path(folder) / CONFIG
    try:
        return parse_config(path, path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected a trial's configuration") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as text ({error})") from error


def read_decision(folder: Path) -> Decision:
    """Read the ``decision.json`` next to exported weights; the defaults if there is none.

    Raises:
        CheckpointError: damaged, or a threshold or spread that no training can choose.
    """
    path = Path(folder) / DECISION
    try:
        found = TypeAdapter(Decision).validate_json(path.read_bytes())
    except FileNotFoundError:
        return Decision()
    except (OSError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: not a decision of a training ({first})") from error
    if not (0.0 <= found.threshold <= 1.0 and 0.0 < found.spread < math.inf):
        raise CheckpointError(
            f"{path}: threshold is {found.threshold} and spread {found.spread}; expected a "
            "threshold in [0, 1] and a finite spread above 0"
        )
    return found


def export_best(checkpoint: Path, out: Path) -> None:
    """Write the weights that were scored, and their configuration, for inference.

    Args:
        checkpoint: folder of a checkpoint of :class:`model.training.Trainer`.
        out: folder for ``model.safetensors``, ``config.json`` and ``decision.json``.

    Raises:
        CheckpointError: the checkpoint is damaged, or none of its epochs was scored.
    """
    loaded = Checkpoint.load(checkpoint)
    if not loaded.tensors.get("best"):
        raise CheckpointError(f"{checkpoint}: no epoch was scored yet; nothing to export")
    out = Path(out)
    write_text(out / CONFIG, loaded.config.model_dump_json(indent=2) + "\n")
    write_text(out / DECISION, json.dumps(loaded.state["best_decision"], indent=2) + "\n")
    save_tensors(out / WEIGHTS, loaded.tensors["best"], {"format": str(FORMAT)})
