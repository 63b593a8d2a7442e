"""Recorded scenes in, sources out: what the command says is what the localizer finds."""

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree as ET
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from model.localizer import Localizer, Source
from model.locate import described, main, measurements
from model.recording import write_shards
from model.shards import DataError
from physics import PlanarArray, Scenes, simulate
from physics.geometry import from_cartesian, to_cartesian


@pytest.fixture(scope="module")
def localizer() -> Localizer:
    return Localizer.shipped()


@pytest.fixture(scope="module")
def scenes(localizer: Localizer) -> Scenes:
    config = localizer.config
    generator = torch.Generator().manual_seed(5)
    return simulate(3, config.scene, config.array.build(), generator=generator)


@pytest.fixture
def plain(tmp_path: Path, scenes: Scenes) -> Path:
    path = tmp_path / "plain.npz"
    np.savez_compressed(path, **arrays(scenes))
    return path


def arrays(scenes: Scenes) -> dict[str, Any]:
    return {
        "y": scenes.y.numpy(),
        "H": scenes.H.numpy(),
        "codes": scenes.codes.numpy(),
        "snr_db": scenes.snr_db.numpy(),
    }


def expected(localizer: Localizer, scenes: Scenes, snr_db: Any) -> list[list[Source]]:
    return localizer.locate(scenes.y, scenes.H, scenes.codes, snr_db)  # type: ignore[return-value]


def test_json_and_csv_hold_what_the_localizer_finds(
    tmp_path: Path, plain: Path, localizer: Localizer, scenes: Scenes
) -> None:
    wanted = expected(localizer, scenes, scenes.snr_db)
    assert sum(len(sources) for sources in wanted) > 2, "nothing is found: the test shows nothing"
    assert main([str(plain), "--out", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["scenes"]
    assert [(scene["file"], scene["scene"]) for scene in found] == [
        (str(plain), index) for index in range(3)
    ]
    for scene, sources in zip(found, wanted, strict=True):
        for held, source in zip(scene["sources"], sources, strict=True):
            for name in ("azimuth_deg", "elevation_deg", "range_m", "power", "probability"):
                assert held[name] == pytest.approx(getattr(source, name), rel=1e-4)
            assert source.covariance is not None
            assert held["range_std_m"] == pytest.approx(source.covariance[2][2] ** 0.5, rel=1e-4)
    assert main([str(plain), "--out", str(tmp_path / "out.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    flat = [(scene, source) for scene in found for source in scene["sources"]]
    assert len(rows) == len(flat)
    for row, (scene, source) in zip(rows, flat, strict=True):
        assert int(row["scene"]) == scene["scene"]
        for name in ("azimuth_deg", "x_m", "range_m", "range_std_m", "azimuth_std_deg"):
            assert float(row[name]) == pytest.approx(source[name])
        assert float(row["half_axis_1_m"]) == pytest.approx(
            source["ellipsoid_90"]["half_axes_m"][0]
        )


def test_a_shard_a_folder_and_a_single_scene_are_read(
    tmp_path: Path, localizer: Localizer, scenes: Scenes, capsys: pytest.CaptureFixture[str]
) -> None:
    config = localizer.config
    wavefront = config.scene.wavefront
    write_shards(tmp_path, "val", scenes, config.array.build(), wavefront, shard_size=2)
    assert main([str(tmp_path / "val")]) == 0
    found = json.loads(capsys.readouterr().out)["scenes"]
    assert [Path(scene["file"]).name for scene in found] == [
        "shard_000.npz", "shard_000.npz", "shard_001.npz",
    ]  # fmt: skip
    wanted = expected(localizer, scenes, scenes.snr_db)
    assert [len(scene["sources"]) for scene in found] == [len(sources) for sources in wanted]
    first = next(k for k, sources in enumerate(wanted) if sources)
    held = found[first]["sources"][0]["range_m"]
    assert held == pytest.approx(wanted[first][0].range_m, rel=1e-2)
    single = tmp_path / "single.npz"
    np.savez(single, **{k: v[first] for k, v in arrays(scenes).items() if k != "snr_db"})
    assert main([str(single)]) == 0
    (alone,) = json.loads(capsys.readouterr().out)["scenes"]
    blind = expected(localizer, scenes[slice(first, first + 1)], None)[0]
    assert [s["azimuth_deg"] for s in alone["sources"]] == pytest.approx(
        [s.azimuth_deg for s in blind], rel=1e-3
    )


def test_shards_of_another_kind_than_the_network_was_trained_for_are_told(
    tmp_path: Path, localizer: Localizer, scenes: Scenes, capsys: pytest.CaptureFixture[str]
) -> None:
    config = localizer.config
    array, wavefront = config.array.build(), config.scene.wavefront
    more = simulate(24, config.scene, array, generator=torch.Generator().manual_seed(8))
    write_shards(tmp_path / "same", "val", more, array, wavefront)
    assert main([str(tmp_path / "same" / "val")]) == 0
    assert "warning" not in capsys.readouterr().err
    other = PlanarArray(array.n_horizontal, array.n_vertical, spacing=0.8 * array.spacing)
    theirs = simulate(24, config.scene, other, generator=torch.Generator().manual_seed(8))
    (path,) = write_shards(tmp_path / "other", "val", theirs, other, wavefront)
    for asked in (path.parent, path):
        assert main([str(asked)]) == 0
        said = capsys.readouterr()
        assert "warning: not what this network was trained for: " in said.err
        assert "explain only" in said.err
        assert len(json.loads(said.out)["scenes"]) == 24
    flipped = replace(more, y=more.y.conj().resolve_conj())
    write_shards(tmp_path / "flipped", "val", flipped, array, wavefront)
    assert main([str(tmp_path / "flipped" / "val")]) == 0
    assert "they would with y conjugated" in capsys.readouterr().err


def test_the_ellipsoid_is_that_of_the_polar_errors_and_holds_nine_in_ten() -> None:
    covariance = np.diag([0.01**2, 0.02**2, 0.1**2])
    covariance[0, 1] = covariance[1, 0] = 0.5 * 0.01 * 0.02
    source = Source(
        azimuth_deg=30.0, elevation_deg=-20.0, range_m=3.0, power=1.0, probability=0.9,
        covariance=tuple(map(tuple, covariance)),
    )  # fmt: skip
    held = described(source)
    centre = np.array([held["x_m"], held["y_m"], held["z_m"]])
    polar = torch.tensor([np.deg2rad(30.0), np.deg2rad(-20.0), 3.0], dtype=torch.float64)
    assert from_cartesian(torch.tensor(centre)).numpy() == pytest.approx(polar.numpy())
    drawn = np.random.default_rng(0).multivariate_normal(polar.numpy(), covariance, 20_000)
    points = to_cartesian(torch.from_numpy(drawn)).numpy() - centre
    ellipsoid = held["ellipsoid_90"]
    across = points @ np.array(ellipsoid["directions"]).T / np.array(ellipsoid["half_axes_m"])
    # Three standard deviations of a share of 0.9 in 20,000 draws, and the curvature left out.
    assert ((across**2).sum(1) <= 1).mean() == pytest.approx(0.9, abs=3 * 0.0022 + 0.005)
    assert ellipsoid["half_axes_m"] == sorted(ellipsoid["half_axes_m"], reverse=True)
    assert held["elevation_std_deg"] == pytest.approx(np.rad2deg(0.02))
    assert chi2.ppf(0.9, 3) == pytest.approx(6.251388631170325)
    bare = described(Source(0.0, 0.0, 1.0, 1.0, 0.5))
    assert bare["ellipsoid_90"] is bare["range_std_m"] is None


def test_the_picture_shows_every_source_where_it_stands(
    tmp_path: Path, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "scene.svg"
    assert main([str(plain), "--picture", str(path), "--scene", "1"]) == 0
    sources = json.loads(capsys.readouterr().out)["scenes"][1]["sources"]
    assert sources
    root = ET.fromstring(path.read_text())
    name = "{http://www.w3.org/2000/svg}"
    dots = [e for e in root.iter(f"{name}circle") if e.find(f"{name}title") is not None]
    assert len(dots) == 2 * len(sources), "one in either view"
    assert len(list(root.iter(f"{name}ellipse"))) == 2 * len(sources)
    above = dots[: len(sources)]
    surface = next(e for e in root.iter(f"{name}line") if e.get("class") == "r")
    origin = (float(surface.attrib["x1"]) + float(surface.attrib["x2"])) / 2
    extent = float(surface.attrib["x2"]) - float(surface.attrib["x1"])
    scale = extent / (11 * 0.15)  # of 12 elements, 0.15 m apart
    for dot, source in zip(above, sources, strict=True):
        assert (float(dot.attrib["cx"]) - origin) / scale == pytest.approx(source["x_m"], abs=0.02)
        up = float(surface.attrib["y1"]) - float(dot.attrib["cy"])
        assert up / scale == pytest.approx(source["z_m"], rel=0.01, abs=0.02)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"y": None}, "has no y, only H, codes, snr_db"),
        ({"y": np.ones((3, 16, 16, 2), np.float32)}, "y is float32; expected complex"),
        ({"y": np.ones((3, 16, 15), complex)}, "do not fit together"),
        ({"codes": np.ones((2, 16, 144), complex)}, "do not fit together"),
        ({"H": np.ones(4, complex)}, "expected y (B, L, M)"),
        ({"snr_db": np.ones(2, np.float32)}, "snr_db has shape (2,); expected a number or (3,)"),
        ({"snr_db": np.array(["high"])}, "snr_db is"),
        ({"y": np.full((3, 16, 16), np.nan, complex)}, "plain.npz: y"),
        (
            {
                "H": np.ones((3, 16, 25), np.complex64),
                "codes": np.ones((3, 16, 25), np.complex64),
            },
            "this network was trained for",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(
    plain: Path,
    scenes: Scenes,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    words: str,
) -> None:
    kept = {k: v for k, v in (arrays(scenes) | change).items() if v is not None}
    np.savez(plain, **kept)
    assert main([str(plain)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_numbers_of_any_byte_order_and_width_are_read(plain: Path, scenes: Scenes) -> None:
    found = []
    for kinds in ({}, {"y": ">c8", "snr_db": ">f4"}, {"y": np.clongdouble}, {"H": np.complex128}):
        kept = {k: v.astype(kinds.get(k, v.dtype)) for k, v in arrays(scenes).items()}
        np.savez(plain, **kept)
        (measured,) = measurements(plain)
        found.append(measured)
        assert len({measured.y.dtype, measured.H.dtype, measured.codes.dtype}) == 1
    for other in found[1:]:
        assert torch.equal(other.y.to(torch.complex64), found[0].y)
        assert torch.equal(other.H.to(torch.complex64), found[0].H)


def npy(array: np.ndarray) -> bytearray:
    stream = io.BytesIO()
    np.save(stream, array)
    return bytearray(stream.getvalue())


def test_damage_of_any_kind_is_said_with_the_files_name(
    plain: Path, scenes: Scenes, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = arrays(scenes)
    members = {f"{name}.npy": npy(array) for name, array in kept.items()}
    header = npy(kept["y"])
    header[20:24] = b"(((("
    for changed, words in (
        ({"y.npy": header}, "cannot be read as .npz"),
        ({"y.npy": None, "y": b"abc"}, "y is no .npy member"),
        ({"snr_db.npy": None, "snr_db": b"abc"}, "snr_db is no .npy member"),
    ):
        with zipfile.ZipFile(plain, "w") as archive:
            for name, content in (members | changed).items():
                if content is not None:
                    archive.writestr(name, bytes(content))
        assert main([str(plain)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert plain.name in line
        assert words in line
    np.savez_compressed(plain, **kept)
    whole = plain.read_bytes()
    said = []
    for place in range(60, len(whole) - 2, len(whole) // 60):
        broken = bytearray(whole)
        broken[place] ^= 0x5A
        broken[place + 1] ^= 0xFF
        plain.write_bytes(broken)
        try:
            list(measurements(plain))
        except DataError as error:
            said.append(str(error))
    assert len(said) > 50  # some bytes mean nothing
    assert all(plain.name in message for message in said)


def test_files_and_arguments_that_cannot_be_used_are_named(
    tmp_path: Path, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.npz").write_text("not an archive")
    (tmp_path / "cut.npz").write_bytes(plain.read_bytes()[:500])
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    (tmp_path / "empty" / "val").mkdir(parents=True)
    np.savez(tmp_path / "empty" / "val" / "shard_000.npz", x=np.zeros(1))
    for arguments, words in (
        ([tmp_path / "absent.npz"], "absent.npz: no such file or folder"),
        ([tmp_path / "text.npz"], "text.npz: is no .npz file"),
        ([tmp_path / "cut.npz"], "cut.npz: is no .npz file, or cut off"),
        ([tmp_path / "one.npz"], "holds one array"),
        ([tmp_path / "empty"], f"holds no .npz; take {tmp_path / 'empty' / 'val'}"),
        ([plain, "--out", "sources.txt"], "--out: got sources.txt; expected a name that ends in"),
        ([plain, "--picture", "scene.png"], "--picture: got scene.png"),
        ([plain, "--scene", "7", "--picture", tmp_path / "s.svg"], "--scene: got 7; there are 3"),
        ([plain, "--checkpoint", tmp_path / "no"], "no such folder"),
        ([plain, "--network", "no"], "no shipped network 'no'"),
        ([plain, "--device", "abacus"], "abacus"),
        ([plain, "--frobnicate"], "--frobnicate"),
    ):
        assert main([str(argument) for argument in arguments]) == 2, arguments
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert main(["--help"]) == 0
