"""Computations on scenes before the network, cached for all trials of a machine."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.features import Spectrum, compute_spectra
from model.files import replacing
from physics.candidates import VERSION, CandidateConfig, Candidates, find_candidates
from physics.geometry import PlanarArray
from physics.rows import Rows
from physics.scene import SceneConfig
from physics.tikhonov import TikhonovConfig, zero_non_finite

if TYPE_CHECKING:
    from model.config import TrialConfig

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Rows)


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/ristune``, by default in ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ristune"


class FrontEnd(ABC, Generic[R]):
    """Computes a result from scenes, or reads the cached result of an earlier call.

    A file holds the result of one call. Its name is a hash of the measurements and of every
    setting that the result depends on, so that a change of data or configuration never reads the
    wrong file. Weights, losses and schedules do not enter the hash, and all trials of a study share
    the file. A trial that needs a result which another one is computing waits for it. Files are
    memory-mapped.

    Args:
        cache: folder of the files; None disables caching.
    """

    folder: str  # subfolder of the cache; it also names the content in messages

    def __init__(self, cache: Path | None = None) -> None:
        self.cache = cache

    @abstractmethod
    def compute(self, y: Tensor, H: Tensor, codes: Tensor, snr_db: Tensor) -> R:
        """Compute the result of a call."""

    @abstractmethod
    def read(self, tensors: dict[str, Tensor]) -> R:
        """Build the result of a call from a file's tensors."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that the result depends on, except for the measurement."""

    def measurement(
        self, y: Tensor, H: Tensor, codes: Tensor, snr_db: Tensor
    ) -> tuple[Tensor, ...]:
        """The parts of a measurement that the result depends on."""
        return y, H, codes, snr_db

    def __call__(self, y: Tensor, H: Tensor, codes: Tensor, snr_db: Tensor) -> R:
        """The result for B scenes, on the device of y.

        Args:
            y: (B, L, M) complex.
            H: (B, M, N) complex.
            codes: (B, L, N) complex.
            snr_db: (B,) real [dB]; NaN where it is unknown.
        """
        if self.cache is None:
            return self.compute(y, H, codes, snr_db)
        path = self.cache / f"{self._name(y, H, codes, snr_db)}.safetensors"
        kept: R | None = None
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_suffix(".lock"))
            with lock:
                kept = self._kept(path)
                if kept is None:
                    kept = self.compute(y, H, codes, snr_db)
                    tensors = {n: t.contiguous().cpu() for n, t in kept.tensors().items()}
                    with replacing(path) as fresh:
                        save_file(tensors, fresh)
            Path(lock.lock_file).unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:  # SafetensorError: a full disk
            log.warning("%s are not kept in %s: %s", self.folder, self.cache, error)
            self.cache = None
        if kept is None:
            kept = self.compute(y, H, codes, snr_db)
        return kept.to(y.device)

    def _kept(self, path: Path) -> R | None:
        """The result stored in a file; None if it is missing or damaged."""
        if not path.exists():
            return None
        try:
            return self.read(load_file(path))
        except (SafetensorError, TypeError) as error:
            log.warning("%s is damaged and computed anew: %s", path, error)
            return None

    def _name(self, *measurement: Tensor) -> str:
        settings = json.dumps(self.settings(), sort_keys=True)
        digest = hashlib.blake2b(settings.encode(), digest_size=20)
        for tensor in self.measurement(*measurement):
            digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
            digest.update(values.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()


class CandidateSearch(FrontEnd[Candidates]):
    """Finds the candidates of scenes.

    Args:
        config: how candidates are found.
        array: the nominal surface.
        scene: the nominal model: field of view, wavefront, source mode, maximum number of sources.
        cache: see :class:`FrontEnd`.
    """

    folder = "candidates"

    def __init__(
        self,
        config: CandidateConfig,
        array: PlanarArray,
        scene: SceneConfig,
        cache: Path | None = None,
    ) -> None:
        super().__init__(cache)
        self.config, self.array, self.scene = config, array, scene

    @classmethod
    def of(cls, config: TrialConfig, *, keep: bool = True) -> CandidateSearch | None:
        """The search that a trial's network needs; None if the network rates no candidates."""
        wanted = config.network.front_end
        if wanted is None:
            return None
        cache = _cache_of(config, cls.folder) if keep else None
        return cls(wanted, config.array.build(), config.scene, cache)

    def settings(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "candidates": self.config.model_dump(mode="json"),
            "array": repr(self.array),
            "scene": {
                name: getattr(self.scene, name)
                for name in (
                    "wavefront",
                    "source_mode",
                    "max_sources",
                    "azimuth_deg",
                    "elevation_deg",
                    "range_m",
                )
            },
        }

    def read(self, tensors: dict[str, Tensor]) -> Candidates:
        return Candidates(**tensors)

    def compute(self, y: Tensor, H: Tensor, codes: Tensor, snr_db: Tensor) -> Candidates:
        """Find candidates, with the given noise where the SNR is known and an estimate elsewhere.

        NaN and Inf in a measurement count as zeros, as for the ridge solutions.
        """
        y, H, codes = (zero_non_finite(t) for t in (y, H, codes))
        known = ~torch.isnan(snr_db)
        parts: list[Candidates] = []
        for chosen, level in ((known, snr_db[known]), (~known, None)):
            if bool(chosen.any()) or (level is not None and not len(y)):
                parts.append(
                    find_candidates(
                        y[chosen],
                        H[chosen],
                        codes[chosen],
                        array=self.array,
                        scene=self.scene,
                        snr_db=level,
                        config=self.config,
                    )
                )
        back = torch.cat([known.nonzero().squeeze(-1), (~known).nonzero().squeeze(-1)]).argsort()
        return Candidates.concatenate(parts)[back]


@dataclass(frozen=True)
class Images(Rows):
    """Spectra of B scenes over the dictionary of a network."""

    spectrum: Tensor  # (B, S, G), see model.features.Features


class Imaging(FrontEnd[Images]):
    """Computes the spectra that a network reads.

    Args:
        spectra: the spectra to compute, in order.
        dictionary: (G, N) complex steering vectors.
        tikhonov: how the ridge solutions are computed.
        cache: see :class:`FrontEnd`.
    """

    folder = "images"
    version = 1  # increment when the spectra of the same scenes change

    def __init__(
        self,
        spectra: tuple[Spectrum, ...],
        dictionary: Tensor,
        tikhonov: TikhonovConfig,
        cache: Path | None = None,
    ) -> None:
        super().__init__(cache)
        self.spectra, self.dictionary, self.tikhonov = spectra, dictionary, tikhonov

    @classmethod
    def of(cls, config: TrialConfig, dictionary: Tensor) -> Imaging | None:
        """The cached spectra of a trial over its network's dictionary; None if nothing is cached.

        On a GPU they are recomputed, at some 60 MFLOP per scene, instead of waiting for files.
        """
        spectra = config.network.spectra
        if not spectra or not config.data.keep_images or dictionary.is_cuda:
            return None
        return cls(spectra, dictionary, config.tikhonov, _cache_of(config, cls.folder))

    def settings(self) -> dict[str, Any]:
        dictionary = torch.view_as_real(self.dictionary.resolve_conj()).cpu().contiguous()
        return {
            "version": self.version,
            "spectra": self.spectra,
            "dictionary": hashlib.blake2b(dictionary.numpy().data, digest_size=20).hexdigest(),
            "tikhonov": self.tikhonov.model_dump(mode="json"),
        }

    def measurement(
        self, y: Tensor, H: Tensor, codes: Tensor, snr_db: Tensor
    ) -> tuple[Tensor, ...]:
        return y, H, codes

    def read(self, tensors: dict[str, Tensor]) -> Images:
        return Images(**tensors)

    def compute(self, y: Tensor, H: Tensor, codes: Tensor, snr_db: Tensor) -> Images:
        return Images(compute_spectra(y, H, codes, self.dictionary, self.tikhonov, self.spectra))


def _cache_of(config: TrialConfig, folder: str) -> Path:
    return (config.data.cache or default_cache()) / folder


class Chunks(Generic[R]):
    """Results of consecutive chunks of scenes, indexed by scene.

    Of chunks that were read from files, only the requested scenes are loaded into memory.

    Args:
        parts: results of the chunks, each of ``size`` scenes except the last.
        size: scenes per chunk.
    """

    def __init__(self, parts: list[R], size: int) -> None:
        self.parts, self.size = parts, size

    def __getitem__(self, index: Tensor) -> R:
        """Results of the scenes with indices (n,) int64."""
        chunk = index // self.size
        order = chunk.argsort(stable=True)
        found = [
            self.parts[number][index[chunk == number] - number * self.size]
            for number in chunk.unique().tolist()
        ]
        kind = type(self.parts[0])
        return kind.concatenate(found or [self.parts[0][index]])[order.argsort()]
