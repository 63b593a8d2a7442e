"""A dry run tells what would be, and does none of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from model import write_shards
from model.data import images_bytes, open_source
from model.training import Trainer
from physics import simulate
from tests.tiny import tiny_candidate_config
from tests.tuner.support import run_here, tiny_study, write_study
from tests.tuner.test_status import begun, contents
from tuner import appraisal
from tuner.appraisal import Appraisal, appraise, checkpoint_bytes, epochs_expected
from tuner.config import StudyConfig
from tuner.plan import differences
from tuner.study import Ledger
from tuner.trial import TrialRun

SPACE = {"blend.beta": {"type": "float", "low": 0.0, "high": 0.6}}


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no reason for a time that is not known."""
    monkeypatch.setattr(appraisal, "LIMIT", 120.0)


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def line(lines: list[str], start: str) -> str:
    (found,) = [text for text in lines if text.startswith(start)]
    return found


def test_a_dry_run_shows_the_study_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_study(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    arguments = ("--dry-run", "--address", "local", "--set", "training.learning_rate=0.002")
    assert run_here("--config", config, *arguments) == 0
    lines = said(capsys)
    assert not ray.is_initialized()
    assert not list((tmp_path / "here").iterdir()), "something was written"
    changed = lines[lines.index("changed from the defaults:") :]
    assert "  training.learning_rate: 0.002 (default 0.001)" in changed
    assert "  search.trials: 3 (default 16)" in changed
    assert "    learning_rate: 0.002" in lines, "the whole configuration"
    assert line(lines, "search space: ") == "search space: 3 parameters, endlessly many points"
    row = line(lines, " network.heads")
    assert row.split() == ["network.heads", "categorical", "1,", "2,", "4", "2"]
    assert "a Ray that would be started on this machine: " in "\n".join(lines)
    assert "if all are stopped that asha may stop, about" in line(lines, "time: ")
    assert any("of checkpoints at a time" in text for text in lines)
    assert lines[-1].startswith("nothing was started, and nothing written (--dry-run)")


@pytest.mark.parametrize("fresh", [True, False])
def test_a_dry_run_says_what_images_take_of_the_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fresh: bool
) -> None:
    data = {"train_scenes": 40, "val_scenes": 24, "fresh": fresh, "cache": str(tmp_path / "kept")}
    study = tiny_study(tmp_path, data=data)
    (tmp_path / "study.yaml").write_text(study.to_yaml())
    config = study.trial_config({}, 0)
    assert run_here("--config", tmp_path / "study.yaml", "--local", "--dry-run") == 0
    (told,) = [text for text in said(capsys) if "of images, kept for all studies" in text]
    assert not (tmp_path / "kept").exists(), "something was kept"
    trainer = Trainer(config)
    trainer.run_epoch()
    kept = sum(path.stat().st_size for path in (tmp_path / "kept" / "images").iterdir())
    assert images_bytes(config) == pytest.approx(kept, abs=200 * (1 if fresh else 2))
    assert f"{images_bytes(config) / 1024:.3g} KiB of images" in told


def test_a_dry_run_of_a_study_that_goes_on_says_what_is_left_and_leaves_it_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begun(tmp_path, search={"trials": 5})
    before = contents(folder.path)
    assert run_here("--resume", folder.path, "--local", "--dry-run", "--trials", 7) == 0
    assert contents(folder.path) == before
    # One more epoch of the running one and four trials of one epoch; 90 s of epochs in 60 s.
    assert line(said(capsys), "time: ") == ("time: about 1m40s left, as the trials so far took")
    assert run_here("--resume", folder.path, "--local", "--dry-run", "--trials", 3) == 0
    assert "nothing is left to run" not in capsys.readouterr().out, "a trial was cut"
    assert run_here("--resume", folder.path, "--local", "--dry-run", "--trials", 2) == 2
    assert "3 trials of" in capsys.readouterr().err, "it would be refused in earnest"
    assert contents(folder.path) == before


def test_a_dry_run_says_what_is_free_where_checkpoints_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "storage"
    other.mkdir()
    begun(tmp_path / "a")
    begun(tmp_path / "b", resources={"storage": str(other)})
    begun(tmp_path / "c", resources={"storage": "s3://bucket/folder"})
    for name, free in (("a", tmp_path / "a" / "run"), ("b", other), ("c", None)):
        asked = ("--local", "--dry-run", "--trials", 7)
        assert run_here("--resume", tmp_path / name / "run", *asked) == 0
        found = [text.partition(" free at ")[2] for text in said(capsys) if " free at " in text]
        assert found == ([str(free)] if free else [])


def test_a_dry_run_of_a_promotion_says_what_is_left_and_makes_no_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begun(tmp_path, search={"trials": 3})
    ledger = Ledger(folder.database, tiny_study(tmp_path, search={"trials": 3}))
    ledger.finish(2, "pruned", reason="stopped")
    ledger.close()
    before = contents(folder.path)
    assert run_here("--resume", folder.path, "--local", "--dry-run", "--promote", 1) == 0
    assert contents(folder.path) == before
    lines = said(capsys)
    assert "an epoch" in line(lines, "time: "), "a run of the promotion is left, and none is known"
    assert run_here("--resume", folder.path, "--local", "--dry-run") == 0
    assert any(text.startswith("nothing is left to run: all trials") for text in said(capsys))


def test_bad_input_is_refused_as_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here("--config", write_study(tmp_path), "--dry-run", "--trials", 0) == 2
    assert "search.trials: got 0" in capsys.readouterr().err
    busy = ("--dry-run", "--address", "127.0.0.1:1")
    assert run_here("--config", write_study(tmp_path), *busy) == 2
    assert "no Ray cluster at 127.0.0.1:1" in capsys.readouterr().err


def test_the_differences_are_those_of_the_fields_and_no_others(tmp_path: Path) -> None:
    assert list(differences(StudyConfig())) == []
    study = StudyConfig(seed=3).replaced({"blend.beta": 0.1, "network": {"family": "image"}})
    assert list(differences(study)) == [
        "seed: 3 (default 0)",
        "blend.beta: 0.1 (default 0.3)",
        "network.family: image",
    ]


def test_an_appraisal_is_of_the_study_on_this_machine_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = {"train_scenes": 48, "val_scenes": 8, "fresh": False}
    network = {"family": "candidate", "width": 8, "depth": 1, "heads": 2}
    network["candidates"] = {"count": 2}  # type: ignore[assignment]
    study = tiny_study(tmp_path / "study", data=data, training={"batch_size": 8}).replaced(
        {"network": network, "search.space": {}}
    )
    found = appraise(study, "cpu")
    assert isinstance(found, Appraisal), found
    assert found.epoch_seconds > 0
    assert found.search_seconds > 0
    assert found.cache_bytes > 0
    assert [path.name for path in tmp_path.iterdir()] == ["study"]
    more = study.replaced({"data.train_scenes": 48_000})
    larger = appraise(more, "cpu")
    assert isinstance(larger, Appraisal), larger
    # 32 of 48,008 scenes were looked at, and 32 of 56: bytes are exact to the file's head.
    assert larger.cache_bytes / found.cache_bytes == pytest.approx(48_008 / 56, rel=0.01)


def test_an_appraisal_has_the_threads_of_a_trial_and_gives_back_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []

    def opened(*arguments: Any) -> Any:
        used.append(torch.get_num_threads())
        return open_source(*arguments)

    monkeypatch.setattr(appraisal, "open_source", opened)
    network = {
        "family": "candidate",
        "width": 8,
        "depth": 1,
        "heads": 2,
        "candidates": {"count": 2},
    }
    data = {"train_scenes": 16, "val_scenes": 8, "fresh": False}
    study = tiny_study(tmp_path, data=data).replaced({"network": network, "search.space": {}})
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert isinstance(appraise(study, "cpu"), Appraisal)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(used) == {study.training.threads}
    assert set(used) == {1}


def test_an_appraisal_that_cannot_be_made_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hot = {"learning_rate": 1e30, "gradient_clip": 1e30, "max_skipped_steps": 1}
    assert "diverged" in str(appraise(tiny_study(tmp_path, training=hot), "cpu"))
    monkeypatch.setattr(appraisal, "LIMIT", 0.02)
    assert "take longer than 0.02 s here" in str(appraise(tiny_study(tmp_path), "cpu"))


def test_a_large_network_is_appraised_on_a_few_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    measure = appraisal._measure

    def slowly(*arguments: Any) -> tuple[Appraisal, float]:
        sizes.append(arguments[-1])
        if arguments[-1] > 16:
            time.sleep(60.0)
        found, seconds = measure(*arguments)
        return found, seconds + slowness

    monkeypatch.setattr(appraisal, "_measure", slowly)
    monkeypatch.setattr(appraisal, "LIMIT", 8.0)
    study = tiny_study(tmp_path)
    slowness = 1.0  # eight times as many, twice, would take longer than there is time
    assert isinstance(appraise(study, "cpu"), Appraisal)
    assert sizes == [16]
    slowness = 0.0
    begun = time.monotonic()
    found = appraise(study, "cpu")
    assert isinstance(found, Appraisal), "what the few told is kept when the time is up"
    assert time.monotonic() - begun < 20.0
    assert sizes == [16, 16, 128]


def test_of_shards_as_many_scenes_are_appraised_as_there_are(tmp_path: Path) -> None:
    """And not as many as the configuration would take at most."""
    config = tiny_candidate_config(data={"train_scenes": 4000, "val_scenes": 4000})
    array = config.array.build()
    for name, count, seed in (("train", 60, 1), ("val", 20, 2)):
        generator = torch.Generator().manual_seed(seed)
        scenes = simulate(count, config.scene, array, generator=generator)
        write_shards(tmp_path / "data", name, scenes, array, config.scene.wavefront)
    held = config.model_dump() | {"name": "tiny", "search": {"space": SPACE}}
    held["data"] |= {"shards": tmp_path / "data", "cache": tmp_path / "cache"}
    study = StudyConfig.model_validate(held)
    found = appraise(study, "cpu")
    assert isinstance(found, Appraisal)
    assert not (tmp_path / "cache").exists()
    source = open_source(study.trial_config({}, 0), torch.device("cpu"))
    assert source.n_batches(1) == 60
    kept = sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*") if p.is_file())
    assert found.cache_bytes == pytest.approx(kept, rel=0.2)


def test_a_checkpoint_is_as_large_as_foretold(tmp_path: Path) -> None:
    space = {"network.width": {"type": "categorical", "choices": [64, 96]}}
    study = tiny_study(tmp_path, network={"width": 64, "depth": 2}, search={"space": space})
    base, largest = checkpoint_bytes(study)
    for width, expected in ((64, base), (96, largest)):
        run = TrialRun(study.trial_config({"network.width": width}, seed=1))
        assert not run.step()["failed"]
        run.save(tmp_path / str(width))
        size = (tmp_path / str(width) / "checkpoint.safetensors").stat().st_size
        assert size == pytest.approx(expected, rel=0.03)
        run.close()


@pytest.mark.parametrize(
    ("search", "epochs", "expected"),
    [
        ({"grace_epochs": 2, "reduction_factor": 2}, 8, (2 + 2 / 2 + 4 / 4, 8)),
        ({"grace_epochs": 1, "reduction_factor": 3}, 27, (1 + 2 / 3 + 6 / 9 + 18 / 27, 27)),
        ({"grace_epochs": 5}, 4, (4, 4)),
        ({"scheduler": "none"}, 8, (8, 8)),
        ({"scheduler": "none", "least_chance": 0.05}, 8, (1, 8)),
        ({"grace_epochs": 2, "least_chance": 0.05}, 8, (2, 8)),
        ({"scheduler": "median", "grace_epochs": 2}, 8, (2, 8)),
    ],
)
def test_the_epochs_of_a_trial_lie_between_what_asha_grants_and_the_budget(
    tmp_path: Path, search: dict[str, object], epochs: int, expected: tuple[float, float]
) -> None:
    study = tiny_study(tmp_path, search=search)
    assert epochs_expected(study.search, epochs) == pytest.approx(expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_what_cannot_be_had_here_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_study(tmp_path)
    arguments = ("--dry-run", "--address", "local", "--gpus-per-trial", 1)
    assert run_here("--config", config, *arguments) == 2
    assert "1 GPU a trial asked" in capsys.readouterr().err
