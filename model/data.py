"""Training and validation scenes: simulated streams and shards behind one interface."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from model.agreement import check_convention
from model.front_end import CandidateSearch, Chunks, Images, Imaging
from model.plugin import ImportPath, check_scenes, simulator_of
from model.seeds import Split, simulation_seed
from model.shards import DataError, ShardSplit
from physics.candidates import Candidates
from physics.config import FrozenModel
from physics.geometry import PlanarArray
from physics.scene import SceneConfig, Scenes
from physics.tikhonov import is_unit_modulus
from physics.transfer import sent

if TYPE_CHECKING:
    from model.config import TrialConfig

__all__ = ["Batch", "DataConfig", "DataError", "SceneSource", "open_source"]

log = logging.getLogger(__name__)

CHUNK = 256  # simulated scenes per seed: the stream does not depend on the batch size


class DataConfig(FrozenModel):
    """Where scenes come from."""

    shards: Path | None = Field(
        None, description="folder with train/ and val/; null: scenes are simulated"
    )
    train_scenes: int = Field(
        4096, ge=1, description="scenes per epoch; with shards, at most as many as there are"
    )
    val_scenes: int = Field(512, ge=1, description="scenes of the fixed validation set")
    fresh: bool = Field(True, description="simulate new training scenes in every epoch")
    seed: int = Field(0, ge=0, description="seed of the simulated scenes; the same for all trials")
    simulator: ImportPath | None = Field(
        None, description="package.module:function that makes scenes; null: physics.simulate"
    )
    cache: Path | None = Field(
        None,
        description="folder of candidates and images that trials share; null: ristune in the "
        "user's cache folder",
    )
    keep_images: bool = Field(
        True,
        description="on a CPU, compute the spectra of scenes that are the same in every epoch "
        "once, and keep them; not done if a study's space has more than 8 variants "
        "of them",
    )


@dataclass(frozen=True)
class Batch:
    """Scenes, with the network's inputs other than the measurement."""

    scenes: Scenes
    snr_db: Tensor  # (B,) real; NaN where it is hidden, -inf where there is no signal
    candidates: Candidates | None = None  # for networks that rate them
    images: Images | None = None  # cached spectra that the network reads
    unit_modulus: bool | None = None  # whether all codes have unit modulus; None: check them

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: slice | Tensor) -> Batch:
        """Some of the scenes."""
        found, images = self.candidates, self.images
        return Batch(
            self.scenes[index],
            self.snr_db[index],
            None if found is None else found[index],
            None if images is None else images[index],
            self.unit_modulus,
        )

    @staticmethod
    def concatenate(parts: list[Batch]) -> Batch:
        """One batch of several, in order."""
        found = [part.candidates for part in parts if part.candidates is not None]
        images = [part.images for part in parts if part.images is not None]
        known = [part.unit_modulus for part in parts]
        return Batch(
            Scenes.concatenate([part.scenes for part in parts]),
            torch.cat([part.snr_db for part in parts]),
            Candidates.concatenate(found) if found else None,
            Images.concatenate(images) if len(images) == len(parts) else None,
            None if None in known else all(known),
        )


class SceneSource(Protocol):
    """Training batches and one fixed validation set."""

    def n_batches(self, batch_size: int) -> int:
        """Batches of an epoch."""
        ...

    def train_batches(self, epoch: int, batch_size: int, seed: int) -> Iterator[Batch]:
        """The batches of an epoch, the same for the same arguments."""
        ...

    def validation(self) -> Batch:
        """The validation scenes."""
        ...


def simulate_split(
    config: DataConfig,
    scene: SceneConfig,
    array: PlanarArray,
    split: Split,
    n_scenes: int,
    *,
    epoch: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Scenes]:
    """Yield the simulated scenes of a split in chunks, ``n_scenes`` in all.

    Raises:
        PluginError: the simulator cannot be imported, or its scenes are refused
            (:func:`model.plugin.check_scenes`).
    """
    simulate = simulator_of(config.simulator)
    for chunk, start in enumerate(range(0, n_scenes, CHUNK)):
        generator = torch.Generator(device)
        generator.manual_seed(simulation_seed(config.seed, split, epoch, chunk))
        scenes = simulate(CHUNK, scene, array, generator=generator, device=device)
        if config.simulator is not None:
            # Check the values of the first chunk only: reading them waits for the device.
            check_scenes(config.simulator, scenes, CHUNK, scene, array, values=chunk == 0)
        yield scenes[slice(0, min(CHUNK, n_scenes - start))]


class FrontEnds:
    """Network inputs other than the measurement: the SNR of some scenes, candidates, images.

    Args:
        config: the trial.
        dictionary: of its network; None disables the caching of images.
    """

    def __init__(self, config: TrialConfig, dictionary: Tensor | None = None) -> None:
        self.seed, self.hidden = config.data.seed, config.training.snr_dropout
        # Codes from shards or from a user-defined simulator may have any amplitude.
        own = config.data.shards is not None or config.data.simulator is not None
        self._unit_modulus = None if own else True
        self._search = CandidateSearch.of(config)
        self._imaging = None if dictionary is None else Imaging.of(config, dictionary)

    @property
    def wanted(self) -> bool:
        """Whether anything is computed from scenes and cached."""
        return self._search is not None or self._imaging is not None

    def examine(self, scenes: Scenes, split: Split, epoch: int, chunk: int) -> Batch:
        """A batch of one chunk of a split; the same arguments give the same batch."""
        snr_db = scenes.known_snr_db
        if split == "train" and self.hidden:
            sequence = np.random.SeedSequence(self.seed, spawn_key=(4, epoch, chunk))
            drawn = np.random.default_rng(sequence).random(len(scenes)) < self.hidden
            snr_db = snr_db.masked_fill(sent(torch.from_numpy(drawn), snr_db.device), torch.nan)
        if self._search is None:
            return Batch(scenes, snr_db, unit_modulus=self._unit_modulus)
        found = self._search(scenes.y, scenes.H, scenes.codes, snr_db)
        return Batch(scenes, snr_db, found, unit_modulus=self._unit_modulus)

    def images(self, scenes: Scenes) -> Images | None:
        """Cached images of scenes that are the same in every epoch; None without a cache."""
        if self._imaging is None or self._imaging.cache is None:
            return None
        found = self._imaging(scenes.y, scenes.H, scenes.codes, scenes.snr_db)
        return None if self._imaging.cache is None else found

    def fixed(self, chunks: list[Scenes], split: Split) -> FixedScenes:
        """All chunks of a set that is the same in every epoch.

        Each process starts at a different chunk, so that processes that need the same scenes at the
        same time share the work through the cache.
        """
        first = os.getpid() % len(chunks)
        order = [*range(first, len(chunks)), *range(first)]
        found = {i: (self.examine(chunks[i], split, 0, i), self.images(chunks[i])) for i in order}
        in_order = [found[index] for index in range(len(chunks))]
        images = [kept for _, kept in in_order if kept is not None]
        return FixedScenes(
            Batch.concatenate([batch for batch, _ in in_order]),
            Chunks(images, CHUNK) if len(images) == len(chunks) else None,
        )


@dataclass(frozen=True)
class FixedScenes:
    """Scenes that are the same in every epoch; images read from files stay memory-mapped."""

    batch: Batch
    images: Chunks[Images] | None

    def whole(self) -> Batch:
        """All scenes as one batch."""
        if self.images is None:
            return self.batch
        return replace(self.batch, images=Images.concatenate(self.images.parts))

    def __getitem__(self, index: Tensor) -> Batch:
        """Some of the scenes."""
        chosen = self.batch[index]
        return chosen if self.images is None else replace(chosen, images=self.images[index])


class SimulatedScenes:
    """Scenes simulated on the trial's device."""

    def __init__(
        self,
        config: DataConfig,
        scene: SceneConfig,
        array: PlanarArray,
        device: torch.device,
        front_ends: FrontEnds,
    ) -> None:
        self.config, self.scene, self.array, self.device = config, scene, array, device
        self._front_ends = front_ends
        self._fixed: FixedScenes | None = None
        self._validation: Batch | None = None

    def n_batches(self, batch_size: int) -> int:
        return -(-self.config.train_scenes // batch_size)

    def train_batches(self, epoch: int, batch_size: int, seed: int) -> Iterator[Batch]:
        n_scenes = self.config.train_scenes
        if not self.config.fresh:
            if self._fixed is None:
                self._fixed = self._front_ends.fixed(list(self._simulate(0)), "train")
            order = sent(_shuffle(n_scenes, epoch, seed), self.device)
            for start in range(0, n_scenes, batch_size):
                yield self._fixed[order[start : start + batch_size]]
            return
        pending: Batch | None = None
        for index, scenes in enumerate(self._simulate(epoch)):
            chunk = self._front_ends.examine(scenes, "train", epoch, index)
            pending = chunk if pending is None else Batch.concatenate([pending, chunk])
            while len(pending) >= batch_size:
                yield pending[slice(0, batch_size)]
                pending = pending[slice(batch_size, None)]
        if pending is not None and len(pending):
            yield pending

    def validation(self) -> Batch:
        if self._validation is None:
            scenes = _simulated_validation(self.config, self.scene, self.array)
            starts = range(0, len(scenes), CHUNK)
            chunks = [scenes[slice(start, start + CHUNK)].to(self.device) for start in starts]
            self._validation = self._front_ends.fixed(chunks, "val").whole()
        return self._validation

    def _simulate(self, epoch: int) -> Iterator[Scenes]:
        config, count = self.config, self.config.train_scenes
        return simulate_split(
            config, self.scene, self.array, "train", count, epoch=epoch, device=self.device
        )


@lru_cache(maxsize=1)
def _simulated_validation(config: DataConfig, scene: SceneConfig, array: PlanarArray) -> Scenes:
    """The validation scenes, simulated on the CPU so that they are the same on every device."""
    return Scenes.concatenate(list(simulate_split(config, scene, array, "val", config.val_scenes)))


class ShardScenes:
    """Scenes of shards; an epoch is a fresh shuffle of at most ``train_scenes`` of them."""

    def __init__(
        self,
        config: DataConfig,
        scene: SceneConfig,
        array: PlanarArray,
        device: torch.device,
        front_ends: FrontEnds,
    ) -> None:
        self.config, self.device = config, device
        self.train = open_split(config, scene, array, "train")
        self.val = open_split(config, scene, array, "val")
        check_convention([self.train, self.val])
        self._front_ends = front_ends
        count = min(len(self.val), config.val_scenes)
        self._validation = Batch.concatenate(list(self._kept("val", count)))
        # SNR and candidates of the training scenes are small, images in files, scenes on disk.
        snr_db: list[Tensor] = []
        found: list[Candidates] = []
        images: list[Images] = []
        if front_ends.wanted:
            for batch in self._kept("train", len(self.train)):
                snr_db.append(batch.snr_db)
                found += [] if batch.candidates is None else [batch.candidates]
                images += [] if batch.images is None else [batch.images]
        self._known = (torch.cat(snr_db), Candidates.concatenate(found)) if found else None
        whole = bool(images) and len(images) == len(snr_db)
        self._images = Chunks(images, CHUNK) if whole else None

    def n_batches(self, batch_size: int) -> int:
        return -(-min(len(self.train), self.config.train_scenes) // batch_size)

    def train_batches(self, epoch: int, batch_size: int, seed: int) -> Iterator[Batch]:
        order = _shuffle(len(self.train), epoch, seed)[: self.config.train_scenes]
        for number, start in enumerate(range(0, len(order), batch_size)):
            index = order[start : start + batch_size]
            scenes = self.train.read(index.numpy())
            unit_modulus = is_unit_modulus(scenes.codes)  # while they are on the host
            scenes, here = scenes.to(self.device), sent(index, self.device)
            if self._known is None:
                batch = self._front_ends.examine(scenes, "train", epoch, number)
            else:
                snr_db, found = self._known
                batch = Batch(scenes, snr_db[here], found[here])
            images = None if self._images is None else self._images[here]
            yield replace(batch, images=images, unit_modulus=unit_modulus)

    def validation(self) -> Batch:
        return self._validation

    def _kept(self, split: Split, count: int) -> Iterator[Batch]:
        """Yield chunks of a split with their SNR, candidates and images."""
        shards, front_ends = self.train if split == "train" else self.val, self._front_ends
        for start in range(0, count, CHUNK):
            index = np.arange(start, min(start + CHUNK, count), dtype=np.int64)
            scenes = shards.read(index).to(self.device)
            batch = front_ends.examine(scenes, split, 0, start)
            yield replace(batch, images=front_ends.images(scenes))


def _shuffle(count: int, epoch: int, seed: int) -> Tensor:
    sequence = np.random.SeedSequence(seed, spawn_key=(3, epoch))
    generator = torch.Generator().manual_seed(
        int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
    )
    return torch.randperm(count, generator=generator)


def open_split(
    config: DataConfig, scene: SceneConfig, array: PlanarArray, split: Split
) -> ShardSplit:
    """Open one split of the shards.

    Raises:
        DataError: see :class:`model.shards.ShardSplit`.
    """
    if config.shards is None:
        raise DataError("data.shards is null; name the folder that holds train/ and val/")
    return ShardSplit(
        Path(config.shards),
        split,
        array,
        scene.wavefront,
        scene.n_antennas,
        scene.n_snapshots,
        scene.max_sources,
    )


def open_source(
    config: TrialConfig, device: torch.device, dictionary: Tensor | None = None
) -> SceneSource:
    """The scenes of a trial.

    Args:
        config: the trial.
        device: of its scenes.
        dictionary: (G, N) of its network, whose spectra are then cached; None disables caching.

    Raises:
        DataError: shards that cannot be used.
    """
    array = config.array.build()
    kind = SimulatedScenes if config.data.shards is None else ShardScenes
    return kind(config.data, config.scene, array, device, FrontEnds(config, dictionary))


class SceneCounts(NamedTuple):
    """How many scenes a trial uses.

    Attributes:
        epoch: training scenes per epoch.
        validation: validation scenes.
        train: scenes of the set that the epochs draw from, where it is the same in every epoch.
    """

    epoch: int
    validation: int
    train: int


def count_scenes(config: TrialConfig) -> SceneCounts:
    """The configured numbers of scenes, limited to the available ones for shards.

    Raises:
        DataError: shards that cannot be used.
    """
    data = config.data
    if data.shards is None:
        return SceneCounts(data.train_scenes, data.val_scenes, data.train_scenes)
    array = config.array.build()
    train, val = (len(open_split(data, config.scene, array, name)) for name in ("train", "val"))
    return SceneCounts(min(train, data.train_scenes), min(val, data.val_scenes), train)


def images_bytes(config: TrialConfig) -> int:
    """Disk space of the images that a trial caches, if none of them are cached yet.

    Raises:
        DataError: shards that cannot be used.
    """
    network, data = config.network, config.data
    if not network.spectra or not data.keep_images:
        return 0
    counts = count_scenes(config)
    fresh = data.fresh and data.shards is None
    n_scenes = counts.validation + (0 if fresh else counts.train)
    cells = math.prod(network.grid(config.scene).shape)
    return 4 * n_scenes * len(network.spectra) * cells
