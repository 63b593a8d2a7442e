"""What an installed package holds: everything that runs, and works, without the clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.cluster_files import ROOT

PACKAGES = ("physics", "model", "tuner")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel installs, made by the setuptools that is there."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    for name in (*PACKAGES, "configs"):
        shutil.copytree(
            ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    made = subprocess.run(
        [sys.executable, "-c", build],
        cwd=sources,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert made.returncode == 0, made.stdout
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def files_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_file_of_a_package_is_in_the_wheel(installed: Path, package: str) -> None:
    here = {name for name in files_in(ROOT / package) if "__pycache__" not in name}
    there = {n for n in files_in(installed / package) if not n.startswith("studies/")}
    assert here == there


def test_nothing_else_is_installed(installed: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = f"{project['name']}-{project['version']}.dist-info"
    assert {path.name for path in installed.iterdir()} == {*PACKAGES, metadata}


def test_every_package_says_that_it_is_typed(installed: Path) -> None:
    for package in PACKAGES:
        assert (installed / package / "py.typed").read_bytes() == b"", package


def test_the_studies_are_those_of_the_clone(installed: Path) -> None:
    held = {p.name: p.read_bytes() for p in (installed / "tuner" / "studies").iterdir()}
    assert held == {p.name: p.read_bytes() for p in (ROOT / "configs").iterdir()}


def test_an_installed_tuner_takes_a_study_by_itself(installed: Path, tmp_path: Path) -> None:
    planned = subprocess.run(
        [sys.executable, "-m", "tuner.run", "--local", "--dry-run"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert planned.returncode == 0, planned.stderr
    assert "study: quickstart.yaml, as this machine has no GPU" in planned.stdout
