"""Environments that are broken, copied or linked: found out and made again, all else left alone."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.clones import PYTHON, SCRIPT, SERIES, Setup, made, make_clone, make_wheels

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}")


def load_script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        return importlib.import_module(SCRIPT.stem)


script = load_script()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wheels(tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Setup:
    """One clone for all tests that damage an environment: each leaves it repaired."""
    return made(tmp_path_factory.mktemp("clones") / "a clone", wheels)


@pytest.fixture
def fresh(tmp_path: Path, wheels: Path) -> Setup:
    return Setup(make_clone(tmp_path / "clone"), wheels)


def cut_off(venv: Path) -> None:
    (venv / "ristune-installing").touch()


def dangling_python(venv: Path) -> None:
    for path in (venv / "bin").glob("python*"):
        path.unlink()
        path.symlink_to("/nonexistent/python")


def python_that_fails(venv: Path) -> None:
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (venv / "bin" / "python").chmod(0o755)


def unsupported_python(venv: Path) -> None:
    answer = {"version": [3, 9, 18], "prefix": str(venv), "missing": []}
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").write_text(f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
    (venv / "bin" / "python").chmod(0o755)


def libraries_of_another_python(venv: Path) -> None:
    (venv / "lib" / f"python{SERIES}").rename(venv / "lib" / "python3.10")
    (venv / "ristune-stamp.json").unlink()


def half_made(venv: Path) -> None:
    shutil.rmtree(venv)
    (venv / "bin").mkdir(parents=True)


def without_pip(venv: Path) -> None:
    shutil.rmtree(venv / "lib" / f"python{SERIES}" / "site-packages" / "pip")
    (venv / "ristune-stamp.json").unlink()


def interpreter_outside(venv: Path) -> None:
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec {PYTHON} "$@"\n')
    (venv / "bin" / "python").chmod(0o755)
    (venv / "ristune-stamp.json").unlink()


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (cut_off, "cut off"),
    (dangling_python, "Python is gone"),
    (python_that_fails, "does not run"),
    (unsupported_python, "Python 3.9.18"),
    (libraries_of_another_python, "another Python"),
    (half_made, "half made"),
    (without_pip, "no pip"),
    (interpreter_outside, "belongs to"),
]


@pytest.fixture
def expendable(shared: Setup, tmp_path: Path) -> Iterator[Setup]:
    """The shared clone, whose environment is put back afterwards as it was."""
    shutil.copytree(shared.venv, tmp_path / "kept", symlinks=True)
    yield shared
    shutil.rmtree(shared.venv)
    (tmp_path / "kept").rename(shared.venv)
    shared.assert_works()


@pytest.mark.parametrize(
    ("damage", "reason"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES]
)
def test_a_broken_environment_is_found_out(
    expendable: Setup, damage: Callable[[Path], None], reason: str
) -> None:
    environment = script.Environment(str(expendable.clone))
    assert environment.fault() is None
    damage(expendable.venv)
    assert not environment.current(set())
    assert reason in environment.fault()


@pytest.mark.parametrize("content", ["", "[]", '{"extras": 3}', "{"])
def test_a_foreign_stamp_is_no_stamp(expendable: Setup, content: str) -> None:
    (expendable.venv / "ristune-stamp.json").write_text(content)
    environment = script.Environment(str(expendable.clone))
    assert not environment.current(set())
    assert environment.installed_extras() == set()
    assert environment.fault() is None


def test_a_broken_environment_is_made_again(shared: Setup) -> None:
    born = shared.born
    dangling_python(shared.venv)
    run = shared()
    assert run.returncode == 0, run.stderr
    assert "making .venv again: its Python is gone" in run.stdout
    assert shared.born != born
    shared.assert_works()


def test_a_copied_clone_gets_an_environment_of_its_own(
    shared: Setup, wheels: Path, tmp_path: Path
) -> None:
    second = Setup(tmp_path / "second", wheels)
    shutil.copytree(shared.clone, second.clone, symlinks=True)
    environment = script.Environment(str(second.clone))
    assert str(shared.clone) in environment.fault()
    (second.venv / "ristune-stamp.json").unlink()
    assert "moved here" in environment.fault()
    run = second()
    assert run.returncode == 0, run.stderr
    assert "making .venv again" in run.stdout
    second.assert_works()
    path = subprocess.check_output(
        [second.venv / "bin" / "python", "-c", "import stand_in_backend as b; print(b.__file__)"],
        cwd=tmp_path,
        text=True,
    )
    assert Path(path.strip()).parent == second.clone
    shared.assert_works()


@pytest.mark.slow
def test_a_link_is_replaced_and_what_it_points_to_is_left_alone(
    shared: Setup, fresh: Setup
) -> None:
    fresh.venv.symlink_to(shared.venv)
    born = shared.born
    run = fresh()
    assert run.returncode == 0, run.stderr
    assert not fresh.venv.is_symlink()
    assert shared.born == born
    shared.assert_works()


def test_a_folder_that_is_no_environment_is_not_touched(fresh: Setup) -> None:
    (fresh.venv / "thesis").mkdir(parents=True)
    run = fresh()
    assert run.returncode == 1
    assert "thesis" in run.stderr
    assert "move it away" in run.stderr
    assert (fresh.venv / "thesis").is_dir()
