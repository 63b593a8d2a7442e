"""One trial, whoever runs it: build, go on from a checkpoint, step, and fail in words.

An exception of the user's own code, a divergence or bad data ends the trial as failed,
with its reason; it is never a score and never a reason to try again. Three things are raised,
since the trial itself is sound: a device that no longer answers, which is a lost machine,
memory that was not enough, which may be for batches in smaller parts, and a full disk, whoever
wrote there, on which the session ends.
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

DIVERGED = "diverged"  # begins the reason of a trial that did


def trial_name(number: int) -> str:
    """What a trial is called wherever it is listed: trial-0007."""
    return f"trial-{number:04d}"


def place_of(metrics: Mapping[str, Any], device: str, gpus: float) -> dict[str, Any]:
    """Where an epoch ran, for the ledger, and what it took of the GPUs.

    Args:
        metrics: what :meth:`TrialRun.step` returned; one that failed has no ``epoch_seconds``.
        device: the torch device.
        gpus: GPUs that the trial is given, or a share of one.

    Returns:
        ``node``, ``device`` and ``gpu_seconds``: GPUs times seconds, whether they were busy or not.
    """
    seconds = metrics.get("epoch_seconds", 0.0)
    return {"node": platform.node(), "device": device, "gpu_seconds": gpus * seconds}


class DeviceLost(RuntimeError):
    """The accelerator no longer answers; the trial is sound and should run elsewhere."""


class MemoryExhausted(RuntimeError):
    """Memory was not enough; it may be for the same batches in smaller parts."""


class DiskExhausted(RuntimeError):
    """A disk is full; the trial is sound, and goes on once there is room."""


class TrialRun:
    """A trainer with its failures turned into results.

    Args:
        config: of the trial.
        device: where it trains.
        checkpoint: of its own, to go on from.
        donor: checkpoint of another trial, with whose weights it begins in the place of new ones.
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
        """Optimiser steps skipped so far, those of earlier sessions too."""
        return self._trainer.skipped_steps if self._trainer else 0

    def step(self) -> dict[str, Any]:
        """Train and score one epoch.

        Returns:
            The trainer's metrics, on a GPU ``gpu_memory_bytes`` (the largest allocated in the
            epoch), ``finished`` and ``failed``; a failed one holds
            ``reason`` and ``traceback`` and an objective of NaN.

        Raises:
            DeviceLost: the device itself has failed.
            MemoryExhausted: there was not enough; nothing of the trial is kept in memory.
            DiskExhausted: something could not be written: a compiler's cache, files of a plug-in's.
        """
        try:
            trainer = self._build()
            if trainer.finished:  # cut between its last epoch and the ledger's line
                return self._again(trainer)
            on_gpu = self._device.startswith("cuda")
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(self._device)
            metrics = dict(trainer.run_epoch())
            if on_gpu:
                metrics["gpu_memory_bytes"] = torch.cuda.max_memory_allocated(self._device)
        except BdbQuit:  # who leaves the debugger ends the session, as Ctrl-C does: no fault of it
            raise KeyboardInterrupt from None
        except TrialDiverged as error:
            return self._failure(f"{DIVERGED}: {error}", error)
        except DataError as error:
            return self._failure(f"data: {error}", error)
        except Exception as error:  # the trial's own fault, reported with its traceback
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
        """What :meth:`step` returned of the last epoch, as far as it matters a second time."""
        return {
            "epoch": trainer.epoch,
            "objective": trainer.best_objective,
            "repeated": True,
            "finished": bool(trainer.finished),
            "failed": False,
        }

    def save(self, folder: Path) -> bool:
        """Write the whole state; nothing to save before the first epoch or after a failure."""
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
        """Read what the trial goes on from or begins with, as long as it is here."""
        try:
            self._build()
        except Exception as error:  # noqa: BLE001 - not swallowed:
            # step() meets the same error and reports it; a lost device shows there too.
            logger.warning("trial cannot be built: %s", error)

    def close(self) -> None:
        """Leave nothing behind, neither in memory nor on the GPU."""
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
        """A trainer where the trial's own checkpoint was taken, if that can be read."""
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
        """A trainer at the trial's beginning: with new weights, or with those of its donor."""
        trainer = Trainer(self._config, device=self._device)
        if self._donor is not None:
            trainer.inherit(self._donor)
        return trainer

    def failure(self, reason: str) -> dict[str, Any]:
        """What :meth:`step` returns of a trial that is given up."""
        return self._failure(reason, None)

    def _exhausted(self, error: Exception) -> MemoryExhausted:
        """The error in a line; the tensors that its frames hold are let go."""
        message = f"epoch {self.epoch + 1}: {' '.join(str(error).split())[:300]}"
        traceback.clear_frames(error.__traceback__)
        self._release()  # and no more: what the exception holds is not to stay
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
    """Take what has outlived a first trial for permanent, once a process.

    These are modules, for the most part, and looking through them took a fifth of a second a trial.
    """
    gc.freeze()


# What allocators say that have no exception of their own: PyTorch's of the CPU, CUDA's libraries.
_NO_MEMORY = ("DefaultCPUAllocator", "not enough memory", "_ALLOC_FAILED", "CUDA error: out of")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be had."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def _device_answers(device: str) -> bool:
    """Whether a GPU still computes; after a sticky CUDA error it never does again."""
    if not device.startswith("cuda"):
        return True
    try:
        torch.cuda.synchronize(device)
        return bool(torch.ones(1, device=device).item() == 1.0)
    except torch.OutOfMemoryError:
        return True
    except (RuntimeError, AssertionError):  # the latter: a torch without CUDA
        return False
