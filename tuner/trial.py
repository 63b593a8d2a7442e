"""One trial: builds it, resumes it from a checkpoint, steps it, and reports failures.

An exception in user code, a divergence or bad data ends the trial as failed with a reason; it never
gives a score and is never retried. Three errors are raised instead, as the trial itself is sound: a
device that no longer answers, which counts as a lost machine; exhausted memory, which may suffice
for smaller parts of the batches; and a full disk, on whatever write, which ends the session.
"""

from __future__ import annotations

import gc
import logging
import math
import platform
import traceback
from bdb import BdbQuit
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from model.checkpoint import CheckpointError
from model.config import TrialConfig
from model.data import DataError
from model.training import Trainer, TrialDiverged
from tuner.disk import full_disk

logger = logging.getLogger(__name__)

DIVERGED = "diverged"  # prefix of the failure reason of a trial that diverged


def trial_name(number: int) -> str:
    """Return the display name of a trial: trial-0007."""
    return f"trial-{number:04d}"


def place_of(metrics: Mapping[str, Any], device: str, gpus: float) -> dict[str, Any]:
    """Return where an epoch ran and the GPU time it took, for the ledger.

    Args:
        metrics: result of :meth:`TrialRun.step`; a failed one has no ``epoch_seconds``.
        device: the torch device.
        gpus: GPUs assigned to the trial, or a share of one.

    Returns:
        ``node``, ``device`` and ``gpu_seconds``: GPUs times seconds, busy or not.
    """
    seconds = metrics.get("epoch_seconds", 0.0)
    return {"node": platform.node(), "device": device, "gpu_seconds": gpus * seconds}


class DeviceLost(RuntimeError):
    """The accelerator no longer answers; the trial is sound and should run elsewhere."""


class MemoryExhausted(RuntimeError):
    """Memory is exhausted; it may suffice for the same batches in smaller parts."""


class DiskExhausted(RuntimeError):
    """A disk is full; the trial is sound and can be resumed once there is room."""


class TrialRun:
    """A trainer whose failures are turned into results.

    Args:
        config: configuration of the trial.
        device: torch device.
        checkpoint: own checkpoint to resume from.
        donor: checkpoint of another trial whose weights it starts from instead of new ones.
    """

    def __init__(
        self,
        config: TrialConfig,
        device: str = "cpu",
        checkpoint: Path | None = None,
        donor: Path | None = None,
    ) -> None:
        self._config = config
        self._device = device
        self._checkpoint = checkpoint
        self._donor = donor
        self._trainer: Trainer | None = None
        self._failed = False

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return self._trainer.epoch if self._trainer else 0

    @property
    def skipped_steps(self) -> int:
        """Optimiser steps skipped so far, including earlier sessions."""
        return self._trainer.skipped_steps if self._trainer else 0

    def step(self) -> dict[str, Any]:
        """Train and score one epoch.

        Returns:
            The trainer's metrics, on a GPU ``gpu_memory_bytes`` (the peak allocated in the epoch),
            ``finished`` and ``failed``; a failed result holds ``reason``, ``traceback`` and an
            objective of NaN.

        Raises:
            DeviceLost: the device no longer answers.
            MemoryExhausted: memory did not suffice; the trial's memory has been released.
            DiskExhausted: a file could not be written, such as a compiler cache or files of a
                plug-in.
        """
        try:
            trainer = self._build()
            if trainer.finished:  # interrupted before its last epoch was recorded
                return self._again(trainer)
            on_gpu = self._device.startswith("cuda")
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(self._device)
            metrics = dict(trainer.run_epoch())
            if on_gpu:
                metrics["gpu_memory_bytes"] = torch.cuda.max_memory_allocated(self._device)
        except BdbQuit:  # leaving the debugger ends the session, as Ctrl-C does
            raise KeyboardInterrupt from None
        except TrialDiverged as error:
            return self._failure(f"{DIVERGED}: {error}", error)
        except DataError as error:
            return self._failure(f"data: {error}", error)
        except Exception as error:  # a failure of the trial, reported with its traceback
            if is_out_of_memory(error):
                raise self._exhausted(error) from None
            if not _device_answers(self._device):
                where = f"{self._device} of {platform.node()}"
                raise DeviceLost(f"{where} no longer answers: {error}") from error
            if (said := full_disk(error)) is not None:
                raise DiskExhausted(said) from error
            return self._failure(f"{type(error).__name__}: {error}", error)
        objective = metrics.get("objective")
        if not isinstance(objective, int | float) or not math.isfinite(objective):
            return self._failure(f"{DIVERGED}: objective is {objective}", None)
        return {**metrics, "finished": bool(trainer.finished), "failed": False}

    @staticmethod
    def _again(trainer: Trainer) -> dict[str, Any]:
        """Return the result of the last epoch again, reduced to what is needed."""
        return {
            "epoch": trainer.epoch,
            "objective": trainer.best_objective,
            "repeated": True,
            "finished": bool(trainer.finished),
            "failed": False,
        }

    def save(self, folder: Path) -> bool:
        """Write the full state; return False before the first epoch or after a failure."""
        if self._trainer is None or self._failed:
            return False
        try:
            self._trainer.save(folder)
        except Exception as error:
            if is_out_of_memory(error):
                raise self._exhausted(error) from None
            raise
        return True

    def build(self) -> None:
        """Load the checkpoint that the trial resumes or starts from while it is available."""
        try:
            self._build()
        except Exception as error:  # noqa: BLE001 - not swallowed:
            # step() raises the same error and reports it; it also detects a lost device.
            logger.warning("trial cannot be built: %s", error)

    def close(self) -> None:
        """Release all memory, including that on the GPU."""
        self._release()
        _settle()

    def _release(self) -> None:
        self._trainer = None
        gc.collect()
        if self._device.startswith("cuda") and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _build(self) -> Trainer:
        if self._trainer is None:
            self._trainer = self._gone_on() or self._begun()
        return self._trainer

    def _gone_on(self) -> Trainer | None:
        """Return a trainer at the trial's own checkpoint; None if there is none to read."""
        if self._checkpoint is None:
            return None
        trainer = Trainer(self._config, device=self._device)
        try:
            trainer.load(self._checkpoint)
        except (CheckpointError, OSError) as error:
            logger.warning("starting from the beginning: %s", error)
            return None
        return trainer

    def _begun(self) -> Trainer:
        """Return a trainer at the start of the trial, with new weights or those of its donor."""
        trainer = Trainer(self._config, device=self._device)
        if self._donor is not None:
            trainer.inherit(self._donor)
        return trainer

    def failure(self, reason: str) -> dict[str, Any]:
        """Return the result of :meth:`step` for a trial that is given up."""
        return self._failure(reason, None)

    def _exhausted(self, error: Exception) -> MemoryExhausted:
        """Return a one-line error, after releasing the tensors that its frames hold."""
        message = f"epoch {self.epoch + 1}: {' '.join(str(error).split())[:300]}"
        traceback.clear_frames(error.__traceback__)
        self._release()  # not close(): freezing would keep objects that the exception holds
        return MemoryExhausted(message)

    def _failure(self, reason: str, error: Exception | None) -> dict[str, Any]:
        self._failed = True
        text = "".join(traceback.format_exception(error)) if error else ""
        return {
            "epoch": self.epoch + 1,
            "objective": math.nan,
            "finished": False,
            "failed": True,
            "reason": " ".join(reason.split())[:500],
            "traceback": text,
        }


@cache
def _settle() -> None:
    """Exclude objects that outlive the first trial from garbage collection, once per process.

    These are mostly modules, and scanning them took a fifth of a second per trial.
    """
    gc.freeze()


# Messages of allocators without a dedicated exception: PyTorch's on the CPU, CUDA libraries.
_NO_MEMORY = ("DefaultCPUAllocator", "not enough memory", "_ALLOC_FAILED", "CUDA error: out of")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception reports exhausted memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def _device_answers(device: str) -> bool:
    """Return whether a GPU still computes; after a sticky CUDA error it never does again."""
    if not device.startswith("cuda"):
        return True
    try:
        torch.cuda.synchronize(device)
        return bool(torch.ones(1, device=device).item() == 1.0)
    except torch.OutOfMemoryError:
        return True
    except (RuntimeError, AssertionError):  # AssertionError: a torch without CUDA
        return False
