"""Candidates that are found once: right, kept, shared, and never those of something else."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import model.front_end as front_end_module
from model.front_end import CandidateSearch, default_cache
from physics import PlanarArray, Scenes, simulate
from physics.candidates import CandidateConfig, Candidates, find_candidates
from physics.pursuit import PursuitConfig
from tests.model.support import Counted, call, equal, files
from tests.tiny import tiny_candidate_config, tiny_config

ROOT = Path(__file__).resolve().parents[2]
CONFIG = tiny_candidate_config()
ARRAY = CONFIG.array.build()
CANDIDATES = CONFIG.network.candidates


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return simulate(5, CONFIG.scene, ARRAY, generator=torch.Generator().manual_seed(0))


def made(cache: Path | None, **changes: Any) -> CandidateSearch:
    known: dict[str, Any] = {"config": CANDIDATES, "array": ARRAY, "scene": CONFIG.scene}
    return CandidateSearch(**(known | changes), cache=cache)


def test_a_second_call_reads_what_the_first_has_found_bit_for_bit(
    tmp_path: Path, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = find_candidates(
        scenes.y, scenes.H, scenes.codes, array=ARRAY, scene=CONFIG.scene,
        snr_db=scenes.snr_db, config=CANDIDATES,
    )  # fmt: skip
    counted = Counted(monkeypatch)
    cache = tmp_path / "deep" / "cache"
    first = call(made(cache), scenes)
    assert counted.scenes == [5]
    second = call(made(cache), scenes)
    assert counted.scenes == [5], "nothing is searched again"
    assert equal(first, second)
    assert equal(first, plain)
    assert [path.suffix for path in files(cache)] == [".safetensors"], "one whole file, no lock"


def test_without_a_cache_nothing_is_kept(
    tmp_path: Path, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    counted = Counted(monkeypatch)
    assert equal(call(made(None), scenes), call(made(None), scenes))
    assert counted.scenes == [5, 5]
    assert not list(tmp_path.iterdir())


def test_files_hold_tensors_and_no_pickle(tmp_path: Path, scenes: Scenes) -> None:
    found = call(made(tmp_path), scenes)
    (path,) = files(tmp_path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    assert set(header) == set(found.tensors())
    assert len(data) == 8 + length + sum(t.nbytes for t in found.tensors().values())


CHANGES: dict[str, dict[str, Any]] = {
    "count": {"config": CANDIDATES.model_copy(update={"count": 2})},
    "cells": {"config": CANDIDATES.model_copy(update={"range_cells": 7})},
    "search": {"config": CANDIDATES.model_copy(update={"search": PursuitConfig(new_iterations=1)})},
    "criterion": {"config": CandidateConfig(
        count=3, range_cells=6, search=PursuitConfig(joint_iterations=2, criterion="aic"))},
    "array": {"array": replace(ARRAY, spacing=0.14)},
    "offset": {"array": replace(ARRAY, offset=(-0.075, -0.075))},
    "shape": {"array": PlanarArray(9, 4)},
    "wavelength": {"array": replace(ARRAY, wavelength=0.31)},
    **{
        name: {"scene": CONFIG.scene.model_copy(update={name: value})}
        for name, value in {
            "wavefront": "fresnel", "source_mode": "constant", "azimuth_deg": (-60.0, 59.0),
            "elevation_deg": (-29.0, 30.0), "range_m": (0.5, 9.0), "max_sources": 1,
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_another_setting_never_meets_the_file_of_this_one(
    what: str, tmp_path: Path, scenes: Scenes
) -> None:
    call(made(tmp_path), scenes)
    changed = call(made(tmp_path, **CHANGES[what]), scenes)
    assert len(files(tmp_path)) == 2
    assert equal(changed, call(made(None, **CHANGES[what]), scenes))


@pytest.mark.parametrize("what", ["y", "H", "codes", "snr_db", "hidden", "order", "fewer"])
def test_other_measurements_or_levels_never_meet_the_file_of_these(
    what: str, tmp_path: Path, scenes: Scenes
) -> None:
    call(made(tmp_path), scenes)
    S, level = scenes, scenes.snr_db.clone()
    if what in ("y", "H", "codes"):
        value = getattr(scenes, what).clone()
        value[2, 1, 3] *= 1 + 1e-6  # the least that single precision knows
        S = replace(scenes, **{what: value})
    elif what == "order":
        S = replace(scenes, y=scenes.y.flip(0))
    elif what == "fewer":
        S, level = scenes[slice(0, 4)], level[:4]
    else:
        level[3] = level[3] + 1e-5 if what == "snr_db" else math.nan
    changed = call(made(tmp_path), S, level)
    assert len(files(tmp_path)) == 2
    assert equal(changed, call(made(None), S, level))


def test_another_version_of_the_search_never_meets_the_file_of_this_one(
    tmp_path: Path, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(made(tmp_path), scenes)
    monkeypatch.setattr(front_end_module, "VERSION", front_end_module.VERSION + 1)
    call(made(tmp_path), scenes)
    assert len(files(tmp_path)) == 2


def test_what_candidates_do_not_depend_on_shares_a_file(tmp_path: Path, scenes: Scenes) -> None:
    call(made(tmp_path), scenes)
    same = CONFIG.scene.model_copy(update={"snr_db": (0.0, 1.0), "k_factor_db": 5.0})
    call(made(tmp_path, scene=same), scenes)
    views = replace(scenes, y=scenes.y.mT.contiguous().mT, H=scenes.H.conj().clone().conj())
    call(made(tmp_path), views)
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("how", ["cut", "empty", "noise", "others"])
def test_a_damaged_file_is_computed_anew(
    how: str, tmp_path: Path, scenes: Scenes, caplog: pytest.LogCaptureFixture
) -> None:
    first = call(made(tmp_path), scenes)
    (path,) = files(tmp_path)
    good = path.read_bytes()
    if how == "others":
        from safetensors.torch import save_file

        save_file({"weight": torch.ones(3)}, path)
    else:
        path.write_bytes({"cut": good[: len(good) // 2], "empty": b"", "noise": b"\xff" * 99}[how])
    with caplog.at_level(logging.WARNING):
        second = call(made(tmp_path), scenes)
    assert equal(first, second)
    assert f"{path} is damaged and computed anew" in caplog.text
    assert path.read_bytes() == good
    assert files(tmp_path) == [path]


@pytest.mark.parametrize("how", ["no folder", "full disk"])
def test_a_cache_that_takes_nothing_gives_a_warning_and_a_result(
    how: str,
    tmp_path: Path,
    scenes: Scenes,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = tmp_path / "cache"
    if how == "no folder":
        cache.write_text("a file stands where the folder should")
    else:
        from safetensors import SafetensorError

        def full(*_: Any, **__: Any) -> None:
            raise SafetensorError("Error while serializing: I/O error: No space left on device")

        monkeypatch.setattr(front_end_module, "save_file", full)
    front_end = made(cache)
    with caplog.at_level(logging.WARNING):
        found = call(front_end, scenes)
        again = call(front_end, scenes)
    assert equal(found, call(made(None), scenes))
    assert equal(found, again)
    assert caplog.text.count(f"candidates are not kept in {cache}") == 1, "said once"
    if how == "full disk":
        assert not [path for path in files(cache) if path.suffix != ".lock"]


def test_candidates_that_cannot_be_kept_are_found_once(
    scenes: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches: list[int] = []

    def counted(y: Tensor, *rest: Any, **options: Any) -> Any:
        searches.append(len(y))
        return find_candidates(y, *rest, **options)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("model.front_end.find_candidates", counted)
    monkeypatch.setattr("model.front_end.save_file", full)
    call(made(tmp_path / "cache"), scenes)
    assert searches == [len(scenes)]


@pytest.mark.skipif(os.name != "posix", reason="limits of POSIX")
def test_a_file_that_outgrows_the_disk_raises_what_is_caught(tmp_path: Path) -> None:
    """What safetensors raises where the system refuses to write."""
    import resource

    from safetensors import SafetensorError
    from safetensors.torch import save_file

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises((SafetensorError, OSError)):
            save_file({"a": torch.zeros(10_000)}, tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_unknown_levels_are_estimated_beside_known_ones(scenes: Scenes) -> None:
    level = scenes.snr_db.clone()
    level[[1, 3]] = math.nan
    mixed = call(made(None), scenes, level)
    hidden = torch.tensor([1, 3])
    known = torch.tensor([0, 2, 4])
    told = call(made(None), scenes[known], level[known])
    guessed = find_candidates(
        scenes.y[hidden], scenes.H[hidden], scenes.codes[hidden],
        array=ARRAY, scene=CONFIG.scene, config=CANDIDATES,
    )  # fmt: skip
    for name, value in mixed.tensors().items():
        torch.testing.assert_close(value[known], told.tensors()[name], msg=name)
        torch.testing.assert_close(value[hidden], guessed.tensors()[name], msg=name)
    assert not torch.allclose(mixed.deviance, call(made(None), scenes).deviance)


@pytest.mark.parametrize("keep", [True, False])
def test_no_scenes_have_no_candidates(keep: bool, tmp_path: Path, scenes: Scenes) -> None:
    front_end = made(tmp_path if keep else None)
    for _ in range(2):
        found = call(front_end, scenes[slice(0, 0)])
        assert len(found) == 0
        assert found.range_evidence.shape == (0, 3, 6)


def test_two_processes_at_once_search_once_and_leave_one_whole_file(
    tmp_path: Path, scenes: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    out.mkdir()
    script = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        import torch
        torch.set_num_threads(1)
        from tests.model import test_front_end as t
        out = Path(sys.argv[1])
        t.slowed(out, "child")
        S = t.simulate(5, t.CONFIG.scene, t.ARRAY, generator=torch.Generator().manual_seed(0))
        (out / "ready").touch()
        while not (out / "go").exists():
            time.sleep(0.005)
        found = t.call(t.made(Path(sys.argv[2])), S)
        t.front_end_module.save_file(
            {n: v.contiguous() for n, v in found.tensors().items()}, out / "child.safetensors"
        )
        """
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(out), str(cache)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    try:
        waited = time.monotonic()
        while not (out / "ready").exists():
            assert child.poll() is None, "the child must live"
            assert time.monotonic() - waited < 120
            time.sleep(0.01)
        monkeypatch.setattr(front_end_module, "find_candidates", find_candidates)
        slowed(out, "parent")
        (out / "go").touch()
        found = call(made(cache), scenes)
        assert child.wait(120) == 0
    finally:
        child.kill()
        child.wait()
    theirs = front_end_module.load_file(out / "child.safetensors")
    assert equal(found, Candidates(**theirs))
    searched = [path.name for path in out.glob("searched-*")]
    assert len(searched) == 1, "who comes second waits and reads"
    assert [path.suffix for path in files(cache)] == [".safetensors"]
    assert equal(found, call(made(cache), scenes))


def slowed(out: Path, who: str) -> None:
    """Make the searches of this process slow, and leave a trace of each."""

    def slow(*arguments: Any, **more: Any) -> Candidates:
        (out / f"searched-{who}").touch()
        time.sleep(1.0)
        return find_candidates(*arguments, **more)

    front_end_module.find_candidates = slow


def test_the_cache_is_the_users_unless_the_configuration_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "ristune"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_cache() == Path.home() / ".cache" / "ristune"
    front_end = CandidateSearch.of(CONFIG)
    assert front_end is not None
    assert front_end.cache == default_cache() / "candidates"
    named = CandidateSearch.of(tiny_candidate_config(data={"cache": tmp_path / "mine"}))
    assert named is not None
    assert named.cache == tmp_path / "mine" / "candidates"
    kept_nowhere = CandidateSearch.of(CONFIG, keep=False)
    assert kept_nowhere is not None
    assert kept_nowhere.cache is None
    assert CandidateSearch.of(tiny_config()) is None, "ridge solutions are enough for snapshots"
