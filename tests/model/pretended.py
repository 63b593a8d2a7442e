"""An accelerator that is not there: where the host would wait for it.

PyTorch's fake tensors have shapes, dtypes and a device, and no values. On them a training step runs
without a GPU: operands that lie on two devices are an error as they are on a real one, and every
look at a value, for which the host has to wait until the device has computed it, can be counted.

Run as a program, since the pretended device stays with its process: it prints, as JSON, the places
by what was run, and how often each waits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from model import Trainer
from model.ahead import Look, ahead_of
from model.loss import ScenesLoss
from model.optimizer import WeightAverage, make_optimizer
from physics import PlanarArray, SceneConfig, nomp, sample_covariance, scene_crb, simulate, somp
from physics.assignment import assign
from physics.candidates import find_candidates
from physics.eigen import keeps_codes
from physics.precision import in_full_precision
from tests.model.test_step_sizes import NETWORKS, config_of

ROOT = Path(__file__).resolve().parents[2]
NAME = "pretended"
# On CUDA these look whether they succeeded, or at how much they will return.
WAITING = {"_linalg_eigh", "_linalg_svd", "linalg_lstsq", "nonzero", "masked_select", "_unique2"}
# These look too, behind operations that need not: linalg.cholesky is cholesky_ex and a look.
LOOKING = {
    torch.linalg.cholesky, torch.cholesky_inverse, torch.linalg.inv, torch.inverse,
    torch.linalg.solve, torch.linalg.eig, torch.linalg.lu_solve, torch.linalg.matrix_rank,
}  # fmt: skip


class Looks(TorchFunctionMode):
    """Decompositions that look whether they succeeded, which the operations below do not show."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in LOOKING and self._waits.is_there(args[0]):
            self._waits.count()
        return func(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Counts the places, "file: function", that wait for the device; values read are made up."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self._mode = mode
        self._true: dict[int, Tensor] = {}  # what says that all is well
        self._pinned: dict[int, Tensor] = {}
        self.n_asked = 0  # operations that the device has been asked for
        self.n_come = 0  # of which the host knows that they are done
        self._coming: dict[int, tuple[Tensor, int]] = {}  # on the host after so many of them

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_pin_memory":
            pinned = args[0].clone()
            self._pinned[id(pinned)] = pinned
            return pinned
        if name == "_local_scalar_dense":
            return self._read(args[0])
        if name == "_to_copy" and not self._is_fake(args[0]):  # a constant of the host's
            args = (self._mode.from_tensor(args[0]), *args[1:])
        if name in WAITING and self.is_there(args[0]) and not keeps_codes():
            self.count()
        if name == "nonzero":
            return torch.stack(_all_of(args[0]), dim=-1)
        if name in ("index", "index_put", "index_put_"):
            args = (args[0], self._chosen(args[0], args[1]), *args[2:])
        result = func(*args, **kwargs)
        self.n_asked += isinstance(result, Tensor) and self.is_there(result)
        if name == "all":
            self._true[id(result)] = result
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            asked = len(args) > 2 and args[2] if name == "copy_" else kwargs.get("non_blocking")
            there = self.is_there(source)
            if there != self.is_there(result) and not (
                asked and (there or id(source) in self._pinned)
            ):
                self.count()
            elif there and not self.is_there(result):
                self.n_asked += 1  # for the copy
                self._coming[id(result)] = result, self.n_asked
        return result

    def _chosen(self, of: Tensor, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Indices in the place of masks, for which the host waits, as for those that it holds."""
        chosen: list[Tensor | None] = []
        for index in indices:
            if index is not None and self.is_there(of) and not self.is_there(index):
                self.count()
            if index is not None and index.dtype is torch.bool:
                self.count()
                chosen += _all_of(index)
            else:
                chosen.append(index)
        return chosen

    def listed(self, values: Tensor) -> list[float]:
        """What ``values.tolist()`` returns of a row of numbers."""
        assert values.ndim == 1
        if self.is_there(values):
            self.count()
        assert self._coming.get(id(values), (values, 0))[1] <= self.n_come, "it has not come yet"
        return [0.5 if values.is_floating_point() else 0] * len(values)

    def _read(self, value: Tensor) -> bool | int | float:
        if self.is_there(value):
            self.count()
        if value.dtype is torch.bool:
            return id(value) in self._true
        return 0.5 if value.is_floating_point() else 0

    def look(self, n_asked: int) -> None:
        """Wait until the device has done what it was asked for first: this many operations."""
        if n_asked == self.n_asked:  # then it has nothing to do
            self.count()
        self.n_come = max(self.n_come, n_asked)

    def count(self) -> None:
        own = [frame for frame in traceback.extract_stack() if _is_ours(frame.filename)]
        path = Path(own[-1].filename).relative_to(ROOT)
        self.places[f"{path}: {own[-1].name}"] += 1

    @staticmethod
    def _is_fake(tensor: Tensor) -> bool:
        return type(tensor) is not Tensor and type(tensor) is not nn.Parameter

    @staticmethod
    def is_there(tensor: Tensor) -> bool:
        return tensor.device.type == NAME


def _all_of(mask: Tensor) -> list[Tensor]:
    """Where a mask is true, as if it were true everywhere."""
    return [torch.empty(mask.numel(), dtype=torch.int64, device=mask.device)] * mask.ndim


def _is_ours(path: str) -> bool:
    return any(Path(path).is_relative_to(ROOT / package) for package in ("physics", "model"))


def moved(value: Any, mode: FakeTensorMode) -> Any:
    """Tensors, records of tensors and modules as if they lay on the device."""
    if isinstance(value, Tensor):
        return mode.from_tensor(value).to(NAME)
    if isinstance(value, nn.Module):
        for part in value.modules():
            for name, parameter in part.named_parameters(recurse=False):
                setattr(part, name, nn.Parameter(moved(parameter.detach(), mode)))
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, moved(buffer, mode))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: moved(getattr(value, f.name), mode) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    return value


def waits_of(work: Callable[[], object], mode: FakeTensorMode) -> dict[str, int]:
    """The places where the host waits, when all that happens once has happened."""
    _watched(work, mode)
    return dict(_watched(work, mode).places)


def _watched(work: Callable[[], object], mode: FakeTensorMode) -> Waits:
    waits = Waits(mode)

    class Event:
        """As much of a CUDA event as is used."""

        def record(self, stream: torch.device) -> None:
            assert stream.type == NAME  # of the device on which it is
            self._n_asked = waits.n_asked

        def synchronize(self) -> None:
            waits.look(self._n_asked)

    # Fake tensors would give their values one by one; a device gives all of them at once.
    listed = patch.object(FakeTensor, "tolist", lambda values: waits.listed(values))
    streams = patch("torch.cuda.current_stream", lambda device: device)
    with mode, waits, Looks(waits), listed, patch("torch.cuda.Event", Event), streams:
        work()
    return waits


def waits_of_an_epoch(family: str, parts: int, mode: FakeTensorMode) -> dict[str, int]:
    """Of the training steps of a network, three of them, each in so many parts."""
    with tempfile.TemporaryDirectory() as cache:
        config = config_of(family, 12, Path(cache))
        training = config.training.model_copy(update={"accumulation": parts})
        config = config.model_copy(update={"training": training})
        trainer = Trainer(config)
        batch = next(iter(trainer.source.train_batches(0, config.training.batch_size, 0)))
    with mode:
        batch, network = moved(batch, mode), moved(trainer.network.train(), mode)
        trainer.device = torch.device(NAME)
        trainer.network = trainer._forward = network
        trainer.optimizer = make_optimizer(network, config.training, trainer.device)
        trainer.average = WeightAverage(network, config.training.ema_decay)
        cells = network.dictionary, network.cell_size, network.directions
        trainer.loss = ScenesLoss(config.loss, trainer.array, config.scene.wavefront, *cells)
    trainer._ahead = ahead_of(trainer.device)
    with patch.object(trainer.source, "train_batches", lambda *_: iter([batch] * 3)):
        return waits_of(trainer._train_epoch, mode)


def waits_of_a_simulation(mode: FakeTensorMode, **changes: Any) -> dict[str, int]:
    """Of a chunk of scenes."""
    config, array = SceneConfig.model_validate(changes), PlanarArray(12, 12)
    return waits_of(lambda: simulate(256, config, array, device=torch.device(NAME)), mode)


def waits_of_estimators(mode: FakeTensorMode) -> dict[str, dict[str, int]]:
    """Of what locates sources without a network, by its name."""
    config, array = SceneConfig(), PlanarArray(12, 12)
    with mode, Waits(mode) as waits, Looks(waits):
        scenes = simulate(8, config, array, device=torch.device(NAME))
    measurement = scenes.y, scenes.H, scenes.codes
    common: dict[str, Any] = {"array": array, "scene": config}
    estimators: dict[str, Callable[[], object]] = {
        "candidates": lambda: find_candidates(*measurement, **common, snr_db=scenes.snr_db),
        "crb": lambda: scene_crb(scenes, array, config.wavefront, config.source_mode),
        "nomp": lambda: nomp(*measurement, **common, snr_db=scenes.snr_db),
        "nomp, blind": lambda: nomp(*measurement, **common),
        "somp": lambda: somp(*measurement, **common),
        "R_samp": lambda: sample_covariance(*measurement),
        "R_samp, SVD": lambda: sample_covariance(*measurement, solver="svd"),
    }
    return {name: waits_of(work, mode) for name, work in estimators.items()}


def waits_of_what_waits(mode: FakeTensorMode) -> dict[str, dict[str, int]]:
    """Of what can but wait, once each, by its name."""
    with mode:
        there = torch.empty(4, 3, 3, device=NAME)
        here = torch.zeros(2, dtype=torch.int64)

    def on_the_host() -> None:
        with contextlib.suppress(RuntimeError):  # fake tensors have no NumPy view
            assign(there, there > 0, 1.0)

    # Each from within the packages, by a function of theirs that calls it.
    known: dict[str, Callable[[], object]] = {
        "assign": on_the_host,
        "read": lambda: probe(lambda: bool(there.sum() > 0)),
        "list": lambda: probe(lambda: there.sum(-1).flatten().tolist()),
        "mask": lambda: probe(lambda: there[there > 0]),
        "index of the host": lambda: probe(lambda: there[here]),
        "unpinned": lambda: probe(lambda: here.to(NAME, non_blocking=True)),
        "blocking": lambda: probe(lambda: here.pin_memory().to(NAME)),
        "cholesky": lambda: probe(lambda: torch.linalg.cholesky(there)),
        "eigh": lambda: probe(lambda: torch.linalg.eigh(there)),
        "look at what was asked for last": lambda: probe(Look(there.sum((1, 2)).real).read),
    }
    return {name: waits_of(work, mode) for name, work in known.items()}


def probe(work: Callable[[], object]) -> object:
    """Do some work under a function of physics, where what waits is looked for."""
    return in_full_precision(work)()


def main() -> None:
    """Print where the host waits."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    errors = {"element_jitter": 0.01, "phase_error_deg": 5.0, "error_levels": "varied"}
    found = {
        f"{family}, {parts} parts": waits_of_an_epoch(family, parts, mode)
        for family in sorted(NETWORKS)
        for parts in (1, 2)
    }
    found["simulate"] = waits_of_a_simulation(mode)
    found["simulate, DFT codes"] = waits_of_a_simulation(mode, codebook="dft")
    found["simulate, hardware errors"] = waits_of_a_simulation(mode, **errors)
    found |= waits_of_estimators(mode)
    found |= {f"known: {name}": waits for name, waits in waits_of_what_waits(mode).items()}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
