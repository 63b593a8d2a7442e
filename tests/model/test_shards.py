"""Shards: the writer's own, damaged ones, and the origin's."""

from __future__ import annotations

import math
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import Trainer
from model.agreement import check_convention
from model.data import Batch
from model.datacheck import check_data
from model.recording import write_shards
from model.shards import DataError, ShardSplit, open_npz, refuse_leaks
from physics import LowRankCovariance, Scenes, nmse, simulate, tikhonov_solve
from physics.tikhonov import is_unit_modulus
from tests.tiny import TINY_CANDIDATE, tiny_config

CONFIG = tiny_config(scene={"wavefront": "paraxial", "source_mode": "constant", "min_sources": 0})
ARRAY = CONFIG.array.build()


def made(n: int, seed: int) -> Scenes:
    return simulate(n, CONFIG.scene, ARRAY, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path, "train", made(10, 1), ARRAY, "paraxial", shard_size=4)
    write_shards(tmp_path, "val", made(5, 2), ARRAY, "paraxial")
    return tmp_path


def split(folder: Path, name: str = "train", **changes: object) -> ShardSplit:
    scene = CONFIG.scene
    values = {
        "array": ARRAY,
        "wavefront": "paraxial",
        "n_antennas": scene.n_antennas,
        "n_snapshots": scene.n_snapshots,
        "max_sources": scene.max_sources,
    }
    return ShardSplit(folder, name, **(values | changes))  # type: ignore[arg-type]


def config_for(folder: Path):
    return CONFIG.model_copy(update={"data": CONFIG.data.model_copy(update={"shards": folder})})


def edit(path: Path, **changes: np.ndarray) -> None:
    values = dict(np.load(path))
    np.savez(path, **(values | changes))


def test_what_is_written_is_read_back(folder: Path) -> None:
    written = made(10, 1)
    assert sorted(p.name for p in (folder / "train").iterdir()) == [
        "shard_000.npz", "shard_001.npz", "shard_002.npz"
    ]  # fmt: skip
    order = np.array([7, 0, 9, 3])
    read = split(folder).read(order)
    expected = written[torch.from_numpy(order)]
    for key in ("y", "H", "codes", "snr_db", "n_sources"):
        torch.testing.assert_close(getattr(read, key), getattr(expected, key))
    present = expected.present.unsqueeze(-1)
    torch.testing.assert_close(read.position * present, expected.position * present)
    torch.testing.assert_close(read.present, expected.present)
    error = nmse(read.covariance(ARRAY, "paraxial"), expected.covariance(ARRAY, "paraxial"))
    assert float(error.max()) < 1e-6, "source powers are found in R to float32 rounding"


def test_the_written_format_is_the_origins(folder: Path) -> None:
    scenes = made(10, 1)
    values = np.load(folder / "train" / "shard_000.npz", allow_pickle=False)
    assert set(values) == {"y", "H", "H_full", "codes", "ptr", "K", "snr", "R", "R_samp"}
    assert all(values[k].dtype == np.float32 for k in values if k != "K")
    assert values["K"].dtype == np.int32
    np.testing.assert_allclose(values["y"][..., 0], 1000 * scenes.y[:4].real, rtol=1e-6)
    effective = torch.einsum("bmn,bln->blm", scenes.H[:4], scenes.codes[:4])
    np.testing.assert_allclose(values["H"][..., 1], effective.imag, rtol=1e-4, atol=1e-4)
    trace = np.trace(values["R"][..., 0], axis1=1, axis2=2)
    np.testing.assert_allclose(trace, np.where(values["K"] > 0, 36.0, 0.0), rtol=1e-5)
    with zipfile.ZipFile(folder / "train" / "shard_000.npz") as archive:
        assert all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())


def test_scenes_padded_with_zeros_are_written_read_and_trained_on(tmp_path: Path) -> None:
    for name, seed in (("train", 1), ("val", 2)):
        scenes = made(12, seed)
        padded = replace(scenes, position=scenes.position * scenes.present.unsqueeze(-1))
        write_shards(tmp_path, name, padded, ARRAY, "paraxial")
        assert np.isfinite(np.load(tmp_path / name / "shard_000.npz")["R"]).all()
    check_data(config_for(tmp_path))
    assert Trainer(config_for(tmp_path)).run_epoch()["skipped_steps"] == 0


def test_arrays_are_memory_mapped_and_not_read(folder: Path) -> None:
    arrays = open_npz(folder / "train" / "shard_000.npz")
    assert all(isinstance(a, np.memmap) for a in arrays.values())
    loaded = np.load(folder / "train" / "shard_000.npz")
    for key, value in arrays.items():
        np.testing.assert_array_equal(value, loaded[key])


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts the files of /proc")
def test_a_shard_costs_one_open_file(folder: Path) -> None:
    """A hundred thousand scenes are a hundred shards and more, and 1024 files the usual limit."""

    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_files()
    opened = split(folder)
    assert open_files() - before <= len(opened.shards) == 3


def test_arrays_of_any_order_and_byte_order_are_mapped(tmp_path: Path) -> None:
    values = {
        "fortran": np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        "big": np.arange(5, dtype=">f4"),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float32(2.0),
    }
    np.savez(tmp_path / "a.npz", **values)
    for name, value in open_npz(tmp_path / "a.npz").items():
        np.testing.assert_array_equal(value, values[name])


def test_origin_shards_follow_the_documented_convention(origin_shards: Path) -> None:
    from physics import PlanarArray

    array = PlanarArray(12, 12, 0.15, 0.3, (-0.075, -0.075))
    for name, count in (("train", 48), ("val", 24)):
        s = ShardSplit(origin_shards, name, array, "paraxial", 16, 16, 5)
        assert len(s) == count
        assert float(s.subspace_share(np.arange(count)).min()) > 0.9999
    centred = ShardSplit(
        origin_shards, "val", PlanarArray(12, 12, 0.15, 0.3), "paraxial", 16, 16, 5
    )
    with pytest.raises(DataError, match=r"array\.offset=\[0\.0, 0\.0\].*origin-shards\.yaml"):
        check_convention([centred])


def test_origin_covariance_is_rebuilt_from_its_sources(origin_shards: Path) -> None:
    from physics import PlanarArray

    array = PlanarArray(12, 12, 0.15, 0.3, (-0.075, -0.075))
    s = ShardSplit(origin_shards, "train", array, "paraxial", 16, 16, 5)
    index = np.arange(24)
    scenes = s.read(index)
    R = np.load(origin_shards / "train" / "shard_000.npz")["R"]
    dense = scenes.covariance(array, "paraxial").dense().numpy()
    theirs = R[..., 0] + 1j * R[..., 1]
    error = np.linalg.norm(dense - theirs, axis=(1, 2)) / np.linalg.norm(theirs, axis=(1, 2))
    assert error.max() < 1e-4


def test_origin_shards_pass_every_check(origin_shards: Path) -> None:
    config = tiny_config(
        array={"n_horizontal": 12, "n_vertical": 12, "offset": (-0.075, -0.075)},
        scene={
            "n_antennas": 16, "n_snapshots": 16, "max_sources": 5,
            "wavefront": "paraxial", "source_mode": "constant",
        },
        network={"rank": 5},
        data={"shards": origin_shards},
    )  # fmt: skip
    assert "48 train, 24 val" in check_data(config).said


@pytest.mark.parametrize("what", ["measurement", "set of sources"])
def test_trap_leaks_are_refused_with_their_index(folder: Path, what: str) -> None:
    train = np.load(folder / "train" / "shard_001.npz")
    row = int(np.flatnonzero(train["K"])[0])
    val = dict(np.load(folder / "val" / "shard_000.npz"))
    for key in ("y",) if what == "measurement" else ("ptr", "K"):
        val[key][3] = train[key][row]
    if what == "set of sources":
        val["R"][3] = train["R"][row]
    edit(folder / "val" / "shard_000.npz", **val)
    with pytest.raises(
        DataError,
        match=rf"leak.*val.shard_000\.npz scene 3 has the same {what}.*_001.npz scene {row}",
    ):
        check_data(config_for(folder))


@pytest.mark.parametrize("disguise", ["float64", "big-endian", "wider", "order"])
def test_trap_leaks_are_seen_whatever_the_shard_makes_of_them(folder: Path, disguise: str) -> None:
    scenes = made(10, 1)
    keep = torch.nonzero(scenes.n_sources == 2).squeeze(-1)
    theirs = scenes[keep]
    if disguise in ("wider", "order"):  # measured once more
        theirs = replace(theirs, y=theirs.y + 0.01)
    if disguise == "order":
        theirs = replace(theirs, position=theirs.position.flip(1), power=theirs.power.flip(1))
    if disguise == "wider":
        wide = torch.nn.functional.pad(theirs.position, (0, 0, 0, 2), value=1.0)
        theirs = replace(theirs, position=wide, power=torch.nn.functional.pad(theirs.power, (0, 2)))
    shutil.rmtree(folder / "val")
    (path,) = write_shards(folder, "val", theirs, ARRAY, "paraxial")
    kind = {"float64": np.float64, "big-endian": np.dtype(">f4")}.get(disguise)
    if kind:
        edit(path, **{k: v.astype(kind) for k, v in np.load(path).items() if k != "K"})
    what = "measurement" if kind else "set of sources"
    with pytest.raises(DataError, match=f"leak.*scene 0 has the same {what}"):
        check_data(config_for(folder))


def test_scenes_without_sources_are_no_leak(folder: Path) -> None:
    splits = [split(folder, "train"), split(folder, "val")]
    assert sum((s.shards[0].arrays["K"] == 0).sum() for s in splits) >= 2, "needs empty scenes"
    refuse_leaks(splits)


def test_a_shard_with_pickled_objects_is_refused_and_never_loaded(
    folder: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (trace,))

    np.savez(folder / "val" / "shard_000.npz", y=np.array([Evil()], dtype=object))
    with pytest.raises(DataError, match="pickled Python objects, which are never loaded"):
        split(folder, "val")
    assert not trace.exists()


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.95])
def test_a_truncated_shard_is_refused(folder: Path, keep: float) -> None:
    path = folder / "val" / "shard_000.npz"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    with pytest.raises(DataError, match=r"shard_000\.npz: not a readable npz"):
        check_data(config_for(folder))


def test_a_shard_whose_member_is_cut_inside_the_archive_is_refused(folder: Path) -> None:
    path = folder / "val" / "shard_000.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("y.npy", b"\x93NUMPY\x01\x00")
    with pytest.raises(DataError, match=r"y\.npy is no npy array"):
        split(folder, "val")


def test_damage_to_any_byte_of_a_shard_is_refused_with_its_name(tmp_path: Path) -> None:
    """Whatever zipfile and NumPy raise of it; what is not seen in the headers is left as it is."""
    path = tmp_path / "small.npz"
    np.savez(path, y=np.zeros((2, 3), np.float32), K=np.zeros(2, np.int32))
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    said = []
    for _ in range(600):
        broken = bytearray(whole)
        for place in random.integers(0, len(whole), random.integers(1, 4)):
            broken[place] = random.integers(0, 256)
        path.write_bytes(broken)
        try:
            open_npz(path)
        except DataError as error:
            said.append(str(error))
    assert len(said) > 100
    assert all("small.npz" in message and "\n" not in message for message in said)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"K": lambda v: v["K"][:, None]}, r"K has shape \(4, 1\); expected \('n',\), one number"),
        ({"ptr": lambda v: v["ptr"][:, 0]}, r"ptr has shape \(4,\); expected \('n', 3 K\)"),
        ({"ptr": lambda v: v["ptr"][:, :5]}, r"ptr has shape \(4, 5\); expected \('n', 3 K\)"),
        (
            {"y": lambda v: v["y"][:3]},
            r"y has shape \(3, 4, 4, 2\); expected \(4, 4, 4, 2\) of 4 sc",
        ),
    ],
)
def test_a_wrong_shape_is_blamed_on_the_key_that_has_it(
    folder: Path, change: dict[str, Any], words: str
) -> None:
    path = folder / "train" / "shard_001.npz"
    values = np.load(path)
    edit(path, **{key: make(values) for key, make in change.items()})
    with pytest.raises(DataError, match=rf"shard_001\.npz: {words}"):
        split(folder)


@pytest.mark.parametrize("family", ["snapshot", "candidate", "image"])
def test_scenes_of_unknown_snr_are_trained_on_and_scored(folder: Path, family: str) -> None:
    for path in folder.glob("*/*.npz"):
        snr = np.load(path)["snr"].copy()
        snr[1:] = np.nan
        edit(path, snr=snr)
    named = config_for(folder)
    if family != "snapshot":
        network = TINY_CANDIDATE if family == "candidate" else {"family": family, "rank": 3}
        scene = named.scene.model_dump() | {"n_antennas": 6, "n_snapshots": 6}
        for name, seed in (("train", 1), ("val", 2)):
            shutil.rmtree(folder / name)
            wide = type(named.scene)(**scene)
            drawn = simulate(8, wide, ARRAY, generator=torch.Generator().manual_seed(seed))
            snr_db = drawn.snr_db.index_fill(0, torch.arange(1, 8), torch.nan)
            write_shards(folder, name, replace(drawn, snr_db=snr_db), ARRAY, "paraxial")
        named = type(named).model_validate(
            named.model_dump() | {"network": network, "scene": scene}
        )
    check_data(named)
    trainer = Trainer(named)
    metrics = trainer.run_epoch()
    assert metrics["skipped_steps"] == 0
    assert np.isfinite(metrics["nmse_pred"])


def test_a_compressed_shard_is_refused_with_what_to_do(folder: Path) -> None:
    path = folder / "val" / "shard_000.npz"
    np.savez_compressed(path, **dict(np.load(path)))
    with pytest.raises(DataError, match=r"is compressed.*numpy\.savez"):
        split(folder, "val")


def test_a_foreign_archive_is_refused_by_what_it_lacks(folder: Path) -> None:
    np.savez(folder / "val" / "shard_000.npz", images=np.zeros(3), y=np.zeros(3))
    with pytest.raises(DataError, match="foreign archive, without H_full, codes, ptr"):
        split(folder, "val")


@pytest.mark.parametrize(
    ("key", "bad"),
    [(key, bad) for key in ("y", "H_full", "codes", "ptr", "R") for bad in (np.nan, np.inf)]
    + [("snr", np.inf)],  # NaN says that it is not known
)
def test_non_finite_values_are_refused_with_file_and_scene(
    folder: Path, key: str, bad: float
) -> None:
    path = folder / "train" / "shard_001.npz"
    values = np.load(path)[key].copy()
    values[2] = bad
    edit(path, **{key: values})
    with pytest.raises(DataError, match=rf"shard_001\.npz scene 2: {key} holds (NaN or )?Inf"):
        check_data(config_for(folder))


@pytest.mark.parametrize("distance", [0.0, -1.0])
def test_a_source_without_a_range_is_refused_with_file_and_scene(
    folder: Path, distance: float
) -> None:
    path = folder / "train" / "shard_001.npz"
    values = np.load(path)
    row = int(np.flatnonzero(values["K"])[-1])
    points = values["ptr"].copy()
    points[row, 2 * points.shape[1] // 3] = distance
    edit(path, ptr=points)
    with pytest.raises(DataError, match=rf"shard_001\.npz scene {row}: .* range .*{distance} m"):
        check_data(config_for(folder))


def test_amplitudes_in_the_codes_of_any_scene_are_heeded(folder: Path) -> None:
    """Unit modulus is a matter of each batch, not of the scenes that come first."""
    path = folder / "train" / "shard_002.npz"
    codes = np.load(path)["codes"].copy()
    codes[-1] *= np.linspace(0.2, 1.0, codes.shape[2], dtype=np.float32)[:, None]
    edit(path, codes=codes)
    trainer = Trainer(config_for(folder))
    scenes = ShardSplit.read(trainer.source.train, np.array([0, 9]))  # type: ignore[attr-defined]
    a, report = tikhonov_solve(scenes.y, scenes.H, scenes.codes)
    assert not report.unit_modulus
    a = a / a.abs().square().mean((-2, -1), keepdim=True).sqrt()
    torch.testing.assert_close(trainer._features(Batch(scenes, scenes.snr_db)).ridge, a)
    batches = list(trainer.source.train_batches(0, 1, 0))
    known = [batch.unit_modulus for batch in batches]
    assert known == [is_unit_modulus(batch.scenes.codes) for batch in batches]
    assert sorted(known) == [False, *[True] * (len(batches) - 1)]  # type: ignore[type-var]
    whole = Batch.concatenate(batches)
    assert whole.unit_modulus is False
    assert Batch.concatenate([*batches, Batch(scenes, scenes.snr_db)]).unit_modulus is None
    assert (
        Batch.concatenate([b for b in batches if b.unit_modulus])[slice(0, 2)].unit_modulus is True
    )


def test_other_sizes_are_refused_with_the_field_to_change(folder: Path) -> None:
    with pytest.raises(DataError, match=r"y has shape .* expected .*scene\.n_antennas=5"):
        split(folder, n_antennas=5)
    with pytest.raises(DataError, match=r"K runs from 0 to 2; expected 0 to 1 \(scene\.max_s"):
        split(folder, max_sources=1)


@pytest.mark.parametrize("missing", ["folder", "split", "shards"])
def test_missing_data_are_named(folder: Path, missing: str) -> None:
    target = folder if missing == "folder" else folder / "val"
    if missing == "shards":
        (target / "shard_000.npz").unlink()
    else:
        shutil.rmtree(target)
    message = {"folder": "no such data folder", "split": "val: no such folder", "shards": "no .npz"}
    with pytest.raises(DataError, match=message[missing]):
        check_data(config_for(folder))


def test_another_convention_is_refused_with_what_to_set(folder: Path) -> None:
    wrong = config_for(folder)
    wrong = wrong.model_copy(
        update={"array": wrong.array.model_copy(update={"offset": (0.4, 0.0)})}
    )
    with pytest.raises(DataError, match=r"explain only 0\.\d+ of R.*array\.offset=\[0\.4, 0\.0\]"):
        check_data(wrong)


def test_the_writer_refuses_to_mix_into_an_old_split(folder: Path) -> None:
    with pytest.raises(FileExistsError, match="already holds shards"):
        write_shards(folder, "train", made(2, 3), ARRAY, "paraxial")
    with pytest.raises(ValueError, match="split 'dev' unknown"):
        write_shards(folder, "dev", made(2, 3), ARRAY, "paraxial")


def test_zero_power_covariance_reads_as_a_defined_truth(folder: Path) -> None:
    scenes = split(folder).read(np.arange(10))
    empty = scenes[(scenes.n_sources == 0).nonzero().squeeze(-1)]
    assert len(empty)
    identity = LowRankCovariance(torch.zeros(len(empty), 36, 1, dtype=torch.complex64)).normalized()
    assert float(nmse(empty.covariance(ARRAY, "paraxial"), identity).max()) == 0.0


def test_shards_of_different_widths_are_refused(folder: Path) -> None:
    path = folder / "train" / "shard_001.npz"
    ptr = np.load(path)["ptr"]
    edit(path, ptr=np.concatenate([ptr, np.zeros((len(ptr), 3), np.float32)], axis=1))
    with pytest.raises(DataError, match=r"ptr has 6 columns in \S+ and 9 columns in \S+"):
        split(folder)


def test_a_splits_digest_is_of_all_that_is_read(tmp_path: Path) -> None:
    scenes = simulate(8, CONFIG.scene, ARRAY, generator=torch.Generator().manual_seed(1))
    changes: dict[str, dict[str, Any]] = {
        "same": {},
        "H": {"H": scenes.H.flip(1)},
        "codes": {"codes": scenes.codes.conj().resolve_conj()},
        "snr": {"snr_db": torch.full((8,), math.nan)},
        "power": {"power": scenes.power * torch.tensor([1.0, 5.0])},
        "y": {"y": scenes.y.flip(0)},
    }
    digests = {}
    for name, change in changes.items():
        write_shards(tmp_path / name, "val", replace(scenes, **change), ARRAY, "spherical")
        split = ShardSplit(tmp_path / name, "val", ARRAY, "spherical", 4, 4, 2)
        digests[name] = refuse_leaks([split])["val"]
    write_shards(tmp_path / "again", "val", scenes, ARRAY, "spherical", shard_size=3)
    again = ShardSplit(tmp_path / "again", "val", ARRAY, "spherical", 4, 4, 2)
    assert refuse_leaks([again])["val"] == digests["same"], "in whatever files they lie"
    assert len(set(digests.values())) == len(digests)


def test_dead_recordings_are_told(tmp_path: Path) -> None:
    for name, seed in (("train", 1), ("val", 2)):
        scenes = simulate(24, CONFIG.scene, ARRAY, generator=torch.Generator().manual_seed(seed))
        silent = scenes.n_sources * (torch.arange(24) == 5) > 0
        y = scenes.y.masked_fill(silent[:, None, None], 0.0) * 1e-30
        write_shards(tmp_path, name, replace(scenes, y=y), ARRAY, "paraxial")
    notes = check_data(config_for(tmp_path)).notes
    assert [note for note in notes if "y is zero in 1 of 24 scenes with sources" in note]
    assert any("shard_000.npz scene 5" in note for note in notes)
