"""Candidates of scenes, computed once for all trials of a machine."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.files import replacing
from physics.candidates import VERSION, CandidateConfig, Candidates, find_candidates
from physics.geometry import PlanarArray
from physics.scene import SceneConfig

if TYPE_CHECKING:
    from model.config import TrialConfig

log = logging.getLogger(__name__)


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/ristune/candidates``, by default below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ristune" / "candidates"


class FrontEnd:
    """Finds the candidates of scenes, or reads what an earlier call has found.

    A file holds the candidates of one call. Its name is a hash of the measurements and of every
    setting that they depend on, so that no change of data or configuration can meet the wrong
    one; weights, losses and schedules are no part of it, and all trials of a study share it. A
    trial that asks for what another one is computing waits for it. Files are memory-mapped.

    Args:
        config: how candidates are found.
        array: the nominal surface.
        scene: the nominal model: field of view, wavefront, source mode and the most sources.
        cache: folder of the files; None keeps nothing.
    """

    def __init__(
        self,
        config: CandidateConfig,
        array: PlanarArray,
        scene: SceneConfig,
        cache: Path | None = None,
    ) -> None:
        self.config, self.array, self.scene, self.cache = config, array, scene, cache

    @classmethod
    def of(cls, config: TrialConfig, *, keep: bool = True) -> FrontEnd | None:
        """What a trial's network needs; None where ridge solutions are enough."""
        wanted = config.network.front_end
        if wanted is None:
            return None
        cache = (config.data.cache or default_cache()) if keep else None
        return cls(wanted, config.array.build(), config.scene, cache)

    def __call__(self, y: Tensor, H: Tensor, codes: Tensor, snr_db: Tensor) -> Candidates:
        """Candidates of B scenes, on the device of y.

        Args:
            y: (B, L, M) complex.
            H: (B, M, N) complex.
            codes: (B, L, N) complex.
            snr_db: (B,) real [dB]; NaN where it is not known.
        """
        if self.cache is None:
            return self._find(y, H, codes, snr_db)
        path = self.cache / f"{self._name(y, H, codes, snr_db)}.safetensors"
        kept: Candidates | None = None
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_suffix(".lock"))
            with lock:
                kept = _read(path)
                if kept is None:
                    kept = self._find(y, H, codes, snr_db)
                    tensors = {n: t.contiguous().cpu() for n, t in kept.tensors().items()}
                    with replacing(path) as fresh:
                        save_file(tensors, fresh)
            Path(lock.lock_file).unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:  # the latter of a full disk
            log.warning("candidates are not kept in %s: %s", self.cache, error)
            self.cache = None
        if kept is None:
            kept = self._find(y, H, codes, snr_db)
        return kept.to(y.device)

    def _name(self, *measurement: Tensor) -> str:
        settings = {
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
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=20)
        for tensor in measurement:
            digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
            values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
            digest.update(values.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def _find(self, y: Tensor, H: Tensor, codes: Tensor, snr_db: Tensor) -> Candidates:
        """The pursuit is told the noise in some scenes, and estimates it in the others."""
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


def _read(path: Path) -> Candidates | None:
    """What a file holds; nothing where it is missing or damaged."""
    if not path.exists():
        return None
    try:
        return Candidates(**load_file(path))
    except (SafetensorError, TypeError) as error:
        log.warning("%s is damaged and computed anew: %s", path, error)
        return None
