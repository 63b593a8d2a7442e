"""`python -m model.locate`: measurements in, sources out, as JSON or CSV and as a picture."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from model.localizer import Localizer, Source

_BATCH = 256  # scenes at a time
_CHI2_90 = 6.251388631170325  # 90 % quantile of chi-square with three degrees of freedom
_COLUMNS = (
    "file", "scene", "source", "azimuth_deg", "elevation_deg", "range_m", "x_m", "y_m", "z_m",
    "probability", "power", "azimuth_std_deg", "elevation_std_deg", "range_std_m",
    "half_axis_1_m", "half_axis_2_m", "half_axis_3_m",
)  # fmt: skip
_STD = ("azimuth_std_deg", "elevation_std_deg", "range_std_m")

_EPILOG = """\
SNAPSHOTS is a plain .npz, a shard, or a folder of either. A plain .npz holds complex arrays: y
(L, M) or (B, L, M), H (M, N) or (B, M, N), codes (L, N) or (B, L, N), and it may hold snr_db, a
number or (B,). Exit codes: 0 done; 2 bad arguments, data or checkpoint; 130 interrupted."""


@dataclass(frozen=True)
class Measurement:
    """The scenes of one file."""

    path: Path
    y: torch.Tensor  # (B, L, M) complex
    H: torch.Tensor  # (B, M, N) or (M, N) complex
    codes: torch.Tensor  # (B, L, N) or (L, N) complex
    snr_db: torch.Tensor | None  # (B,) or a number [dB]


def measurements(path: Path) -> Iterator[Measurement]:
    """The files of a folder, or the one file.

    Raises:
        DataError: nothing to read, or a file that holds something else.
    """
    from model.shards import DataError

    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            inside = sorted(p.name for p in path.iterdir() if p.is_dir() and any(p.glob("*.npz")))
            hint = f"; take {path / inside[0]}" if inside else ""
            raise DataError(f"{path}: holds no .npz{hint}")
        for file in files:
            yield _read(file)
        return
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    yield _read(path)


def _read(path: Path) -> Measurement:
    import zipfile

    import numpy as np
    import torch

    from model.shards import GAIN, DataError
    from model.wording import in_one_line

    try:
        with path.open("rb") as file:
            start = file.read(6)
        if not zipfile.is_zipfile(path) and start != b"\x93NUMPY":
            # NumPy takes any unknown format for a pickle, and its message tells how to load one.
            raise DataError(
                f"{path}: is no .npz file, or cut off; one with y, H and codes is expected"
            )
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise DataError(f"{path}: holds one array; an .npz with y, H and codes is expected")
        with loaded as archive:
            is_shard = "H_full" in archive
            names = ("y", "H_full", "codes") if is_shard else ("y", "H", "codes")
            missing = [name for name in names if name not in archive]
            if missing:
                raise DataError(
                    f"{path}: has no {', '.join(missing)}, only {', '.join(archive) or 'nothing'}; "
                    "expected y, H and codes, or a shard"
                )
            arrays = [archive[name] for name in names]
            level = archive["snr"] if is_shard else archive.get("snr_db")
    except DataError:
        raise
    except Exception as error:
        # Damaged bytes raise zlib.error, tokenize.TokenError, NotImplementedError and others.
        raise DataError(f"{path}: cannot be read as .npz: {in_one_line(error)}") from error
    for name, array in zip(names, arrays, strict=True):
        if not isinstance(array, np.ndarray):
            raise DataError(f"{path}: {name} is no .npy member; write it with numpy.savez")
        if array.dtype.kind not in ("fiu" if is_shard else "c"):
            raise DataError(
                f"{path}: {name} is {array.dtype}; expected "
                + (
                    "a shard's real pairs [re, im]"
                    if is_shard
                    else "complex (of real and imaginary part: a[..., 0] + 1j * a[..., 1])"
                )
            )
    if is_shard:
        pairs = [torch.from_numpy(np.ascontiguousarray(a, np.float32)) for a in arrays]
        for name, pair in zip(names, pairs, strict=True):
            if pair.ndim != 4 or pair.shape[-1] != 2:
                raise DataError(
                    f"{path}: {name} has shape {tuple(pair.shape)}; a shard's ends in [re, im]"
                )
        y, H, codes = (torch.view_as_complex(pair) for pair in pairs)
        y = y / GAIN
    else:
        single = all(array.dtype.itemsize <= 8 for array in arrays)
        kind = np.complex64 if single else np.complex128
        y, H, codes = (torch.from_numpy(np.ascontiguousarray(array, kind)) for array in arrays)
    if level is not None and (not isinstance(level, np.ndarray) or level.dtype.kind not in "fiu"):
        found = level.dtype if isinstance(level, np.ndarray) else "no .npy member"
        raise DataError(f"{path}: snr_db is {found}; expected real numbers [dB]")
    snr_db = None if level is None else torch.from_numpy(np.asarray(level, np.float32))
    _check_shapes(path, y, H, codes, snr_db)
    return Measurement(path, y.unsqueeze(0) if y.ndim == 2 else y, H, codes, snr_db)


def _check_shapes(
    path: Path,
    y: torch.Tensor,
    H: torch.Tensor,
    codes: torch.Tensor,
    snr_db: torch.Tensor | None,
) -> None:
    from model.shards import DataError

    shapes = f"y {tuple(y.shape)}, H {tuple(H.shape)}, codes {tuple(codes.shape)}"
    expected = "expected y (B, L, M), H (B, M, N) or (M, N), and codes (B, L, N) or (L, N)"
    if any(t.ndim not in (2, 3) for t in (y, H, codes)):
        raise DataError(f"{path}: {shapes}; {expected}")
    n_scenes = len(y) if y.ndim == 3 else 1
    fits = y.shape[-1] == H.shape[-2] and y.shape[-2] == codes.shape[-2]
    fits = fits and H.shape[-1] == codes.shape[-1]
    if not fits or any(t.ndim == 3 and len(t) != n_scenes for t in (H, codes)):
        raise DataError(f"{path}: {shapes} do not fit together; {expected}")
    if snr_db is not None and snr_db.ndim and snr_db.shape != (n_scenes,):
        raise DataError(
            f"{path}: snr_db has shape {tuple(snr_db.shape)}; expected a number or ({n_scenes},)"
        )


def located(
    localizer: Localizer, measurement: Measurement, *, unknown_snr: bool = False
) -> Iterator[list[Source]]:
    """The sources of each scene of a file.

    Raises:
        DataError: sizes that the network was not trained for, or values that are not finite.
    """
    from model.shards import DataError

    snr_db = None if unknown_snr else measurement.snr_db
    for start in range(0, len(measurement.y), _BATCH):
        part = slice(start, start + _BATCH)
        H, codes = (t[part] if t.ndim == 3 else t for t in (measurement.H, measurement.codes))
        level = snr_db[part] if snr_db is not None and snr_db.ndim else snr_db
        try:
            found = localizer.locate(measurement.y[part], H, codes, level)
        except (TypeError, ValueError) as error:
            raise DataError(f"{measurement.path}: {error}") from error
        for sources in found:
            assert isinstance(sources, list)
            yield sources


def described(source: Source) -> dict[str, Any]:
    """A source as plain values, with lengths in metres and angles in degrees.

    ``ellipsoid_90`` contains the true position with a probability of 90 %; it is given by its half
    axes, longest first, and their directions (x, y, z). It follows from the polar errors to first
    order.
    """
    import numpy as np
    import torch

    from physics.geometry import to_cartesian

    polar = torch.tensor(
        [np.deg2rad(source.azimuth_deg), np.deg2rad(source.elevation_deg), source.range_m],
        dtype=torch.float64,
    )
    x, y, z = to_cartesian(polar).tolist()
    content: dict[str, Any] = {
        "azimuth_deg": source.azimuth_deg,
        "elevation_deg": source.elevation_deg,
        "range_m": source.range_m,
        "x_m": x,
        "y_m": y,
        "z_m": z,
        "probability": source.probability,
        "power": source.power,
    }
    if source.covariance is None:
        return content | dict.fromkeys((*_STD, "ellipsoid_90"))
    covariance = np.asarray(source.covariance)
    jacobian = torch.autograd.functional.jacobian(to_cartesian, polar).numpy()
    variances, axes = np.linalg.eigh(jacobian @ covariance @ jacobian.T)
    half = np.sqrt(_CHI2_90 * np.clip(variances, 0.0, None))
    std = np.sqrt(np.diag(covariance))
    spread = (*np.rad2deg(std[:2]).tolist(), float(std[2]))
    ellipsoid = {"half_axes_m": half[::-1].tolist(), "directions": axes.T[::-1].tolist()}
    return content | dict(zip(_STD, spread, strict=True)) | {"ellipsoid_90": ellipsoid}


def table(scenes: list[dict[str, Any]]) -> str:
    """CSV with one line per source; a scene without sources has none."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for scene in scenes:
        for index, source in enumerate(scene["sources"]):
            half = (source["ellipsoid_90"] or {}).get("half_axes_m", ())
            row = {"file": scene["file"], "scene": scene["scene"], "source": index, **source}
            row |= {f"half_axis_{i + 1}_m": value for i, value in enumerate(half)}
            writer.writerow(["" if row.get(key) is None else row[key] for key in _COLUMNS])
    return stream.getvalue()


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m model.locate",
        description="Find the sources of recorded scenes with a trained network.",
        epilog=_EPILOG,
    )
    parser.add_argument("snapshots", type=Path, metavar="SNAPSHOTS", help="an .npz or a folder")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR",
        help="a run folder or its best/; default: a network that comes with the package",
    )  # fmt: skip
    parser.add_argument("--network", default="fluctuating", help="which of those (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help=".json or .csv; default: stdout")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="where the sources stand")
    parser.add_argument("--scene", type=int, default=0, help="that is drawn, from 0 (%(default)s)")
    parser.add_argument("--unknown-snr", action="store_true", help="estimate the SNR")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    try:
        asked = parser.parse_args(arguments)
        return _run(asked)
    except SystemExit as leaving:  # of argparse: --help, or a bad argument that it has named
        return int(leaving.code or 0)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        print("error: " + " ".join(text.split()), file=sys.stderr)
        return 2


def _run(asked: argparse.Namespace) -> int:
    for flag, path, allowed in (
        ("--out", asked.out, (".json", ".csv")),
        ("--picture", asked.picture, (".svg",)),
    ):
        if path is not None and path.suffix not in allowed:
            expected = " or ".join(allowed)
            raise ValueError(f"{flag}: got {path.name}; expected a name that ends in {expected}")

    import torch

    from model.agreement import doubts
    from model.checkpoint import CheckpointError
    from model.files import write_text
    from model.localizer import Localizer
    from model.wording import counted

    try:
        on_gpu = torch.device(asked.device).type == "cuda"
    except RuntimeError:
        raise ValueError(f"--device: no device {asked.device!r}; expected cpu or cuda") from None
    if on_gpu and not torch.cuda.is_available():
        raise ValueError(f"--device: {asked.device} asked, but this machine has no GPU")
    if asked.checkpoint is None:
        localizer = Localizer.shipped(asked.network, asked.device)
    else:
        try:
            localizer = Localizer.load(asked.checkpoint, asked.device)
        except CheckpointError as error:
            raise ValueError(f"--checkpoint: {error}") from error
    for doubt in doubts(asked.snapshots, localizer.config.scene, localizer.array):
        print(f"warning: not what this network was trained for: {doubt}", file=sys.stderr)
    scenes: list[dict[str, Any]] = []
    for measurement in measurements(asked.snapshots):
        for index, sources in enumerate(
            located(localizer, measurement, unknown_snr=asked.unknown_snr)
        ):
            found = [described(source) for source in sources]
            scenes.append({"file": str(measurement.path), "scene": index, "sources": found})
    if asked.picture is not None and not 0 <= asked.scene < len(scenes):
        raise ValueError(f"--scene: got {asked.scene}; there are {len(scenes)}, numbered from 0")
    in_lines = asked.out is not None and asked.out.suffix == ".csv"
    text = table(scenes) if in_lines else json.dumps({"scenes": scenes}, indent=1) + "\n"
    if asked.out is None:
        sys.stdout.write(text)
    else:
        write_text(asked.out, text)
        n_sources = sum(len(scene["sources"]) for scene in scenes)
        print(f"{counted(n_sources, 'source')} in {counted(len(scenes), 'scene')}: {asked.out}")
    if asked.picture is not None:
        from model.picture import draw_scene

        write_text(asked.picture, draw_scene(scenes[asked.scene], localizer.config))
        if asked.out is not None:
            print(f"scene {asked.scene}: {asked.picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
