"""The origin's shard format and its reader.

A shard is an uncompressed ``.npz`` in ``{train,val,test}/shard_%03d.npz``, float32 with a trailing
[re, im] axis for complex arrays:

======  =================  ==========================================================
``y``       (n, L, M, 2)   measurements, times a gain of 1000
``H``       (n, L, M, 2)   H c_l, the effective channel (not H)
``H_full``  (n, M, N, 2)   the channel H
``codes``   (n, L, N, 2)   phase codes
``ptr``     (n, 3 K)       azimuths, elevations [rad], ranges [m], zero-padded
``K``       (n,) int32     number of sources
``snr``     (n,)           [dB]; NaN where it is not known
``R``       (n, N, N, 2)   true covariance, trace N, incoherent
``R_samp``  (n, N, N, 2)   a sample covariance; never read here
======  =================  ==========================================================
"""

from __future__ import annotations

import hashlib
import math
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.lib import format as npy_format
from numpy.typing import NDArray
from torch import Tensor

from model.wording import counted, in_one_line
from physics.geometry import PlanarArray
from physics.scene import Scenes
from physics.steering import Wavefront, steering_vector

GAIN = 1000.0
_ROWS = 8  # rows of R that are read to determine the sources' powers
KEYS = ("y", "H", "H_full", "codes", "ptr", "K", "snr", "R", "R_samp")
READ = ("y", "H_full", "codes", "ptr", "K", "snr", "R")
SPLITS = ("train", "val", "test")


class DataError(ValueError):
    """Data that cannot be used; the message gives the reason in one line."""


def open_npz(path: Path) -> dict[str, NDArray[np.generic]]:
    """Memory-map the arrays of an uncompressed ``.npz``, reading only the headers.

    All arrays are views of one map, which holds one open file.

    Raises:
        DataError: not an npz, truncated, compressed, or holding pickled objects (never loaded).
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as handle:
            content = np.memmap(path, np.uint8, "r")
            return {
                info.filename.removesuffix(".npy"): _map_member(path, handle, content, info)
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:
        # For damaged bytes zipfile and NumPy raise many kinds of errors, which may change:
        # NotImplementedError for a flag, tokenize.TokenError for a header.
        size = path.stat().st_size
        raise DataError(
            f"{path}: not a readable npz archive of {size} bytes ({in_one_line(error)}); "
            "it may be truncated or damaged: copy or write it again"
        ) from error


def _map_member(
    path: Path, handle: BinaryIO, content: NDArray[np.uint8], info: zipfile.ZipInfo
) -> NDArray[np.generic]:
    name = info.filename
    if info.compress_type != zipfile.ZIP_STORED:
        raise DataError(
            f"{path}: member {name} is compressed; shards are memory-mapped, "
            "so write them with numpy.savez, not savez_compressed"
        )
    handle.seek(info.header_offset)
    header = handle.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise DataError(f"{path}: member {name} has no local header; the file is damaged")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    handle.seek(info.header_offset + 30 + name_length + extra_length)
    start = handle.tell()
    try:
        version = npy_format.read_magic(handle)
        read = (
            npy_format.read_array_header_1_0
            if version == (1, 0)
            else (npy_format.read_array_header_2_0)
        )
        shape, fortran, dtype = read(handle)
    except Exception as error:  # many kinds of errors, as in open_npz
        raise DataError(f"{path}: member {name} is no npy array ({in_one_line(error)})") from error
    if dtype.hasobject:
        raise DataError(
            f"{path}: member {name} holds pickled Python objects, which are never loaded; "
            "expected float32 or int32 arrays"
        )
    offset = handle.tell()
    size = math.prod(shape) * dtype.itemsize
    end = offset + size
    if min(shape, default=0) < 0 or end > start + info.file_size or end > content.size:
        raise DataError(f"{path}: member {name} is truncated; copy or write the shard again")
    if size == 0:
        return np.zeros(shape, dtype)
    return content[offset:end].view(dtype).reshape(shape, order="F" if fortran else "C")


@dataclass
class Shard:
    """One opened shard."""

    path: Path
    arrays: dict[str, NDArray[np.generic]]

    def __len__(self) -> int:
        return int(self.arrays["K"].shape[0])


@dataclass
class ShardSplit:
    """The scenes of one split, memory-mapped.

    Args:
        folder: the data folder that holds the splits.
        name: ``train``, ``val`` or ``test``.
        array: the surface that the data were made with.
        wavefront: the steering model that they were made with.
        n_antennas: M that the configuration expects.
        n_snapshots: L that it expects.
        max_sources: largest number K of sources in a scene.
        which: glob pattern of the files to read.

    Raises:
        DataError: a missing folder, or a shard that is damaged, foreign or of other sizes.
    """

    folder: Path
    name: str
    array: PlanarArray
    wavefront: Wavefront
    n_antennas: int
    n_snapshots: int
    max_sources: int
    which: str = "*.npz"
    shards: list[Shard] = field(init=False)
    _power: NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        split = self.folder / self.name
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such data folder; expected train/ and val/ in it")
        if not split.is_dir():
            raise DataError(
                f"{split}: no such folder; expected shards such as {self.name}/shard_000.npz"
            )
        paths = sorted(split.glob(self.which))
        if not paths:
            raise DataError(f"{split}: holds no .npz shard; expected {self.name}/shard_000.npz")
        self.shards = [self._open(path) for path in paths]
        widths = {shard.arrays["ptr"].shape[1]: shard.path.name for shard in self.shards}
        if len(widths) > 1:
            raise DataError(
                f"{split}: ptr has {' and '.join(f'{w} columns in {n}' for w, n in widths.items())}"
                "; expected one width in all shards"
            )
        self._starts = np.cumsum([0, *(len(s) for s in self.shards)])
        if len(self) == 0:
            raise DataError(f"{split}: the shards hold no scene")
        self._power = np.full((len(self), self.max_sources), np.nan, np.float32)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _open(self, path: Path) -> Shard:
        arrays = open_npz(path)
        missing = [key for key in READ if key not in arrays]
        if missing:
            raise DataError(
                f"{path}: foreign archive, without {', '.join(missing)}; expected {', '.join(KEYS)}"
            )
        # These give the numbers of scenes and slots, with which the other shapes are compared.
        for key, ndim, fits in (
            ("K", 1, "('n',), one number a scene"),
            ("ptr", 2, "('n', 3 K): the azimuths, the elevations and the ranges of K slots"),
        ):
            shape = arrays[key].shape
            if len(shape) != ndim or (key == "ptr" and shape[1] % 3):
                raise DataError(f"{path}: {key} has shape {shape}; expected {fits}")
        count, n_slots = len(arrays["K"]), arrays["ptr"].shape[1] // 3
        n, m, length = self.array.size, self.n_antennas, self.n_snapshots
        expected: dict[str, tuple[int, ...]] = {
            "y": (count, length, m, 2),
            "H_full": (count, m, n, 2),
            "codes": (count, length, n, 2),
            "ptr": (count, 3 * n_slots),
            "K": (count,),
            "snr": (count,),
            "R": (count, n, n, 2),
        }
        for key, shape in expected.items():
            if arrays[key].shape != shape:
                raise DataError(
                    f"{path}: {key} has shape {arrays[key].shape}; expected "
                    f"{shape} of {counted(count, 'scene')} (K) with scene.n_snapshots={length}, "
                    f"scene.n_antennas={m} and {n} array elements: "
                    "change the configuration or the data"
                )
            kind = "iu" if key == "K" else "f"
            if arrays[key].dtype.kind not in kind:
                raise DataError(f"{path}: {key} has dtype {arrays[key].dtype}; expected "
                                f"{'int32' if key == 'K' else 'float32'}")  # fmt: skip
        counts = np.asarray(arrays["K"])
        if count and (counts.min() < 0 or counts.max() > min(n_slots, self.max_sources)):
            raise DataError(
                f"{path}: K runs from {counts.min()} to {counts.max()}; expected 0 to "
                f"{min(n_slots, self.max_sources)} (scene.max_sources={self.max_sources}, "
                f"ptr holds {n_slots})"
            )
        return Shard(path, arrays)

    def _gather(
        self, key: str, indices: NDArray[np.int64], part: NDArray[np.int64] | None = None
    ) -> NDArray[np.generic]:
        """Values of one key (or a part of them) in the requested order, read shard by shard."""
        owner = np.searchsorted(self._starts, indices, side="right") - 1
        first = self.shards[0].arrays[key]
        shape = first.shape[1:] if part is None else (len(part), *first.shape[2:])
        found = np.empty((len(indices), *shape), first.dtype)
        for shard in np.unique(owner):
            here = owner == shard
            rows = indices[here] - self._starts[shard]
            array = self.shards[shard].arrays[key]
            found[here] = array[rows] if part is None else array[rows[:, None], part]
        return found

    def where(self, index: int) -> str:
        """File and row of a scene, for messages."""
        shard = int(np.searchsorted(self._starts, index, side="right") - 1)
        return f"{self.shards[shard].path} scene {index - self._starts[shard]}"

    def read(self, indices: NDArray[np.int64]) -> Scenes:
        """Read scenes in the requested order.

        Raises:
            DataError: a non-finite value (except NaN in snr, which means unknown) or a source
                without a range; the message names file and scene.
        """
        values = {key: self._gather(key, indices) for key in READ if key != "R"}
        for key in ("y", "H_full", "codes", "ptr"):
            self._check_finite(key, values[key], indices)
        snr_db = values["snr"].astype(np.float32)
        self._check_finite("snr", np.where(np.isnan(snr_db), 0.0, snr_db), indices, "Inf")
        position, present = self._positions(values["ptr"], values["K"])
        nowhere = ((position[..., 2] <= 0) & present).any(-1).numpy()
        if nowhere.any():
            row = int(np.argmax(nowhere))
            raise DataError(
                f"{self.where(int(indices[row]))}: ptr gives one of its {values['K'][row]} sources "
                f"a range of {float(position[row, present[row], 2].min())} m; expected above 0"
            )
        power = self._source_power(indices, position, present)
        return Scenes(
            y=_complex(values["y"]) / GAIN,
            H=_complex(values["H_full"]),
            codes=_complex(values["codes"]),
            position=position,
            power=power,
            n_sources=torch.from_numpy(values["K"].astype(np.int64)),
            snr_db=torch.from_numpy(snr_db),
        )

    def _check_finite(
        self,
        key: str,
        values: NDArray[np.generic],
        indices: NDArray[np.int64],
        what: str = "NaN or Inf",
    ) -> None:
        bad = ~np.isfinite(values).reshape(len(indices), -1).all(1)
        if bad.any():
            raise DataError(
                f"{self.where(int(indices[np.argmax(bad)]))}: {key} holds {what}; "
                "repair or drop the scene"
            )

    def _positions(
        self, ptr: NDArray[np.generic], counts: NDArray[np.generic]
    ) -> tuple[Tensor, Tensor]:
        slots = ptr.shape[1] // 3
        points = torch.from_numpy(ptr.astype(np.float32)).reshape(-1, 3, slots).mT
        keep = min(slots, self.max_sources)
        position = torch.zeros(len(points), self.max_sources, 3)
        position[..., 2] = 1.0
        present = (
            torch.arange(self.max_sources) < torch.from_numpy(counts.astype(np.int64))[:, None]
        )
        position[:, :keep] = torch.where(
            present[:, :keep, None], points[:, :keep], position[:, :keep]
        )
        return position, present

    def _source_power(
        self, indices: NDArray[np.int64], position: Tensor, present: Tensor
    ) -> Tensor:
        """Powers p_k of ``R = sum p_k a_k a_k^H`` by least squares, computed once per scene."""
        known = ~np.isnan(self._power[indices]).any(1)
        if not known.all():
            todo = torch.from_numpy(~known)
            few = _few_rows(self.array.size)
            rows = self._gather("R", indices[~known], few)
            self._check_finite("R", rows, indices[~known])
            a = self.steering(position[todo]) * present[todo].unsqueeze(-1)  # (B, K, N)
            part = a[..., few]
            # Normal equations of R_sn = sum_k p_k a_k[s] conj(a_k[n]).
            gram = ((part.conj() @ part.mT) * (a @ a.mH)).real
            right = ((part.conj() @ _complex(rows)) * a).sum(-1).real
            eye = torch.eye(self.max_sources) * (~present[todo]).unsqueeze(-1)
            solved = torch.linalg.lstsq((gram + eye).double(), right.double().unsqueeze(-1))
            power = solved.solution.squeeze(-1).float()
            power = torch.nan_to_num(power, nan=0.0, posinf=0.0, neginf=0.0).clamp_min(0.0)
            self._power[indices[~known]] = (power * present[todo]).numpy()
        return torch.from_numpy(self._power[indices])

    def steering(self, position: Tensor) -> Tensor:
        """Steering vectors (…, N) in the data's convention."""
        return steering_vector(position, self.array, self.wavefront)

    def subspace_share(self, indices: NDArray[np.int64]) -> Tensor:
        """``||P_A R||_F / ||R||_F`` of scenes, where P_A projects on their steering vectors.

        It is 1 where array and wavefront are those that the data were made with.
        """
        scenes = self.read(indices)
        R = _complex(self._gather("R", indices))
        a = (self.steering(scenes.position) * scenes.present.unsqueeze(-1)).mT
        u, s, _ = torch.linalg.svd(a, full_matrices=False)
        basis = u * (s > 1e-5 * s[..., :1]).unsqueeze(-2)
        projected = torch.linalg.matrix_norm(basis.mH @ R)
        return projected / torch.linalg.matrix_norm(R).clamp_min(torch.finfo(torch.float32).tiny)

    def starts(self) -> list[tuple[int, Shard]]:
        """Each shard with the index of its first scene."""
        return [
            (int(start), shard) for start, shard in zip(self._starts, self.shards, strict=False)
        ]

    def fingerprints(self) -> Iterator[tuple[int, str, bytes]]:
        """Yield index, kind and hash of every measurement and of every set of sources.

        The hashed values are those that are read: in single precision, regardless of the file's
        precision, number of source slots and order of the sources.
        """
        for start, shard in self.starts():
            y, ptr, counts = (shard.arrays[key] for key in ("y", "ptr", "K"))
            for row in range(len(shard)):
                yield start + row, "measurement", _digest(y[row])
                n_sources = int(counts[row])
                if n_sources:
                    sources = ptr[row].reshape(3, -1)[:, :n_sources].astype(np.float32)
                    order = np.lexsort(sources)
                    yield start + row, "set of sources", _digest(sources[:, order])

    def beside(self) -> Iterator[bytes]:
        """Yield the other data read for each scene: channel, codes, SNR and rows of R."""
        few = _few_rows(self.array.size)
        for _, shard in self.starts():
            parts = [shard.arrays[key] for key in ("H_full", "codes", "snr")]
            for row in range(len(shard)):
                for part in (*(array[row] for array in parts), shard.arrays["R"][row][few]):
                    yield np.ascontiguousarray(part, "<f4").tobytes()


def _few_rows(n_elements: int) -> NDArray[np.int64]:
    """Rows of R that determine the K powers; all of R would be 166 kB per scene."""
    return np.linspace(0, n_elements - 1, min(n_elements, _ROWS), dtype=np.int64)


def _digest(row: NDArray[np.generic]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(row, "<f4").tobytes(), digest_size=16).digest()


def _complex(pairs: NDArray[np.generic]) -> Tensor:
    return torch.view_as_complex(torch.from_numpy(np.ascontiguousarray(pairs, np.float32)))


def refuse_leaks(splits: list[ShardSplit]) -> dict[str, str]:
    """Check that no scene occurs in two splits.

    Returns:
        For each split's name, a digest of all data read for its scenes, in order.

    Raises:
        DataError: a scene occurs in two splits; the message names both places.
    """
    seen: dict[tuple[str, bytes], tuple[ShardSplit, int]] = {}
    digests = {}
    for split in splits:
        whole = hashlib.blake2b(digest_size=16)
        for index, what, digest in split.fingerprints():
            whole.update(digest)
            other, first = seen.setdefault((what, digest), (split, index))
            if other is not split:
                raise DataError(
                    f"leak between splits: {split.where(index)} has the same {what} as "
                    f"{other.where(first)}; a scene may stand in one split only"
                )
        for part in split.beside():
            whole.update(part)
        digests[split.name] = whole.hexdigest()
    return digests
