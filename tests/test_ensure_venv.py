"""tools/ensure_venv.py, run for real: real interpreters, real venv, real pip, no network.

A small clone stands in for the repository. Its packages are wheels of a few bytes in a local
folder, so that an installation takes seconds.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "ensure_venv.py"
SERIES = "{}.{}".format(*sys.version_info[:2])
# The interpreter under the environment that runs the tests.
PYTHON = Path(sys.base_prefix) / "bin" / f"python{SERIES}"

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}")

BACKEND = '''
"""Builds the stand-in project with the standard library alone."""
import os, time, zipfile

def get_requires_for_build_editable(config_settings=None):
    return []

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    if os.environ.get("STAND_IN_FLAG"):
        open(os.environ["STAND_IN_FLAG"], "w").close()
        time.sleep(3)
    name = "stand_in-1.0-py3-none-any.whl"
    info = "stand_in-1.0.dist-info/"
    with zipfile.ZipFile(os.path.join(wheel_directory, name), "w") as wheel:
        wheel.writestr("stand_in.pth", os.getcwd())
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: stand-in\\nVersion: 1.0\\n"
            "Requires-Dist: runtime-part\\nProvides-Extra: dev\\n"
            "Requires-Dist: dev-part; extra == 'dev'\\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\n"
            "Root-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "RECORD", "")
    return name
'''

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "stand_in_backend"
backend-path = ["."]

[project]
name = "stand-in"
version = "1.0"
dependencies = [
    "torch==2.0",
    "runtime-part",
]
"""


def make_wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"version = {version!r}\n")
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ensure_venv", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    for name, version in (
        ("setuptools", "99.0"),
        ("torch", "2.0"),
        ("torch", "2.1"),
        ("runtime_part", "1.0"),
        ("runtime_part", "2.0"),
        ("dev_part", "1.0"),
    ):
        make_wheel(folder, name, version)
    return folder


def make_clone(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "constraints.txt").write_text("torch==2.0\nruntime-part==1.0\nsetuptools==99.0\n")
    (folder / "stand_in_backend.py").write_text(BACKEND)
    return folder


class Setup:
    """Runs the script on a clone, offline."""

    def __init__(self, clone: Path, wheels: Path) -> None:
        self.clone = clone
        self.venv = clone / ".venv"
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": os.environ.get("HOME", "/"),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(wheels),
            "PIP_NO_CACHE_DIR": "1",
        }

    def command(self, *extras: str, python: Path = PYTHON) -> list[str]:
        options = [option for extra in extras for option in ("--extra", extra)]
        return [str(python), str(SCRIPT), "--root", str(self.clone), *options]

    def __call__(
        self, *extras: str, python: Path = PYTHON, **env: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*extras, python=python),
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def version_of(self, module: str) -> str | None:
        run = subprocess.run(
            [self.venv / "bin" / "python", "-c", f"import {module}; print({module}.version)"],
            capture_output=True,
            text=True,
        )
        return run.stdout.strip() if run.returncode == 0 else None

    @property
    def born(self) -> int:
        """Changes when the environment is made anew, not when it is updated."""
        return (self.venv / "pyvenv.cfg").stat().st_mtime_ns

    def assert_works(self) -> None:
        assert self.version_of("torch") == "2.0"
        assert self.version_of("runtime_part") is not None
        quiet = self()
        assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Setup:
    """One clone for all tests that damage an environment: each leaves it repaired."""
    setup = Setup(make_clone(tmp_path_factory.mktemp("clones") / "a clone"), wheels)
    run = setup()
    assert run.returncode == 0, run.stderr
    assert "making .venv with Python" in run.stdout
    assert "is ready" in run.stdout
    return setup


@pytest.fixture
def fresh(tmp_path: Path, wheels: Path) -> Setup:
    return Setup(make_clone(tmp_path / "clone"), wheels)


def stub(folder: Path, program: str) -> str:
    """A folder for PYTHONPATH whose sitecustomize makes every Python claim something."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(textwrap.dedent(program))
    return str(folder)


CLAIM_3_9 = """
    import collections, sys
    Version = collections.namedtuple("Version", "major minor micro releaselevel serial")
    sys.version_info = Version(3, 9, 18, "final", 0)
"""

LACK = """
    import sys
    class Lacking:
        def find_spec(self, name, path=None, target=None):
            if name in {names!r}:
                raise ModuleNotFoundError("No module named " + repr(name), name=name)
    sys.meta_path.insert(0, Lacking())
"""


# --- An environment that works -----------------------------------------------------------


def test_a_second_run_says_and_does_nothing(shared: Setup) -> None:
    log = shared.venv / "install.log"
    before = log.stat().st_mtime_ns
    started = time.monotonic()
    shared.assert_works()
    assert time.monotonic() - started < 5
    assert log.stat().st_mtime_ns == before


def test_extras_are_added_in_place_and_then_cover_the_plain_run(shared: Setup) -> None:
    born = shared.born
    assert shared.version_of("dev_part") is None
    run = shared("dev")
    assert "up to date" in run.stdout
    assert shared.version_of("dev_part") == "1.0"
    assert shared.born == born
    assert shared().stdout == ""
    assert shared("dev").stdout == ""


def test_new_pins_are_installed_in_place_and_extras_kept(shared: Setup) -> None:
    shared("dev")
    born = shared.born
    constraints = shared.clone / "constraints.txt"
    old = constraints.read_text()
    constraints.write_text(old.replace("runtime-part==1.0", "runtime-part==2.0"))
    assert "up to date" in shared().stdout
    assert shared.version_of("runtime_part") == "2.0"
    assert json.loads((shared.venv / "ristune-stamp.json").read_text())["extras"] == ["dev"]
    constraints.write_text(old)
    shared()
    assert shared.version_of("runtime_part") == "1.0"
    assert shared.born == born


@pytest.mark.parametrize("content", ["", "[]", '{"extras": 3}', "{"])
def test_a_foreign_stamp_is_no_stamp(expendable: Setup, content: str) -> None:
    (expendable.venv / "ristune-stamp.json").write_text(content)
    environment = script.Environment(str(expendable.clone))
    assert not environment.current(set())
    assert environment.installed_extras() == set()
    assert environment.fault() is None


def test_an_environment_without_stamp_is_brought_up_to_date(shared: Setup) -> None:
    born = shared.born
    (shared.venv / "ristune-stamp.json").unlink()
    run = shared()
    assert run.returncode == 0, run.stderr
    assert "up to date" in run.stdout
    assert shared.born == born
    shared.assert_works()


def test_the_caller_s_python_and_pip_settings_do_not_reach_the_environment(
    shared: Setup, tmp_path: Path
) -> None:
    make_wheel(tmp_path, "runtime_part", "1.0")
    with zipfile.ZipFile(tmp_path / "runtime_part-1.0-py3-none-any.whl") as wheel:
        wheel.extractall(tmp_path / "elsewhere")
    (shared.venv / "ristune-stamp.json").unlink()
    subprocess.run(
        [shared.venv / "bin" / "python", "-m", "pip", "uninstall", "-y", "runtime-part"],
        check=True,
        capture_output=True,
    )
    run = shared(
        PYTHONPATH=str(tmp_path / "elsewhere"), PIP_USER="1", PIP_TARGET=str(tmp_path / "target")
    )
    assert run.returncode == 0, run.stderr
    assert not (tmp_path / "target").exists()
    shared.assert_works()


# --- An environment that does not --------------------------------------------------------


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


# --- Failures that are told --------------------------------------------------------------


def test_without_network_pip_s_words_and_a_hint_are_shown_and_the_next_run_goes_on(
    shared: Setup,
) -> None:
    born = shared.born
    (shared.venv / "ristune-stamp.json").unlink()
    subprocess.run(
        [shared.venv / "bin" / "python", "-m", "pip", "uninstall", "-y", "runtime-part"],
        check=True,
        capture_output=True,
    )
    run = shared(
        PIP_NO_INDEX="0",
        PIP_FIND_LINKS="",
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_RETRIES="1",
        PIP_TIMEOUT="2",
    )
    assert run.returncode == 1
    assert "runtime-part" in run.stderr
    assert "Check the network" in run.stderr
    assert "Traceback" not in run.stderr
    assert "up to date" in shared().stdout
    assert shared.born == born
    shared.assert_works()


def test_a_package_that_the_index_lacks_is_named(shared: Setup) -> None:
    constraints = shared.clone / "constraints.txt"
    old = constraints.read_text()
    constraints.write_text(old.replace("runtime-part==1.0", "runtime-part==7.0"))
    run = shared()
    constraints.write_text(old)
    assert run.returncode == 1
    assert "runtime-part" in run.stderr
    assert "has no such version" in run.stderr
    assert "up to date" in shared().stdout
    shared.assert_works()


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        ({"ensurepip"}, "apt install python3-venv"),
        ({"venv", "ensurepip"}, f"python{SERIES}-venv"),
        ({"sqlite3"}, "built without sqlite3"),
    ],
)
def test_a_python_that_lacks_a_module_is_told_what_to_install(
    fresh: Setup, tmp_path: Path, names: set[str], advice: str
) -> None:
    run = fresh(
        PYTHONPATH=stub(tmp_path / "stub", LACK.format(names=names)), PATH=str(tmp_path / "empty")
    )
    assert run.returncode == 1
    assert advice in run.stderr
    assert all(name in run.stderr for name in names)
    assert not fresh.venv.exists()


def test_an_unsupported_python_is_refused_with_its_version_and_what_to_do(
    fresh: Setup, tmp_path: Path
) -> None:
    run = fresh(PYTHONPATH=stub(tmp_path / "stub", CLAIM_3_9), PATH=str(tmp_path / "empty"))
    assert run.returncode == 1
    assert "Python 3.11, 3.12 or 3.13 is needed" in run.stderr
    assert "3.9.18" in run.stderr
    assert "make PYTHON=" in run.stderr
    assert not fresh.venv.exists()


@pytest.mark.slow
def test_an_unsupported_python_hands_over_to_one_on_path(fresh: Setup, tmp_path: Path) -> None:
    other = tmp_path / "bin" / f"python{SERIES}"
    other.parent.mkdir()
    other.write_text(f'#!/bin/sh\nunset PYTHONPATH\nexec {PYTHON} "$@"\n')
    other.chmod(0o755)
    run = fresh(PYTHONPATH=stub(tmp_path / "stub", CLAIM_3_9), PATH=f"{other.parent}:/usr/bin:/bin")
    assert run.returncode == 0, run.stderr
    assert f"using {other} instead" in run.stdout
    fresh.assert_works()


def test_a_working_environment_is_kept_when_python_on_path_grew_too_old(
    shared: Setup, tmp_path: Path
) -> None:
    run = shared(PYTHONPATH=stub(tmp_path / "stub", CLAIM_3_9), PATH=str(tmp_path / "empty"))
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_an_environment_is_not_thrown_away_when_no_python_could_make_another(
    shared: Setup, tmp_path: Path
) -> None:
    marker = shared.venv / "ristune-installing"
    marker.touch()
    born = shared.born
    run = shared(PYTHONPATH=stub(tmp_path / "stub", CLAIM_3_9), PATH=str(tmp_path / "empty"))
    assert run.returncode == 1
    assert shared.born == born
    marker.unlink()
    shared.assert_works()


@pytest.mark.parametrize(
    "name", ["python2.7", "python3.6", "python3.8", "python3.10", "python3.14"]
)
def test_other_interpreters_that_are_here_get_as_far_as_the_message(
    fresh: Setup, tmp_path: Path, name: str
) -> None:
    # On PATH, or beside the running one (pyenv and uv keep them so).
    places = [shutil.which(name), *PYTHON.parent.parent.parent.glob(f"*/bin/{name}")]
    found = [p for p in places if p and _runs(str(p))]
    if not found:
        pytest.skip(f"no {name}")
    run = fresh(python=Path(found[0]), PATH=str(tmp_path / "empty"))
    assert run.returncode == 1
    assert "3.11, 3.12 or 3.13 is needed" in run.stderr
    assert "Traceback" not in run.stderr


def _runs(python: str) -> bool:
    return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0


def test_the_script_keeps_to_old_syntax() -> None:
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    new = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.Match, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        assert not isinstance(node, new), f"line {node.lineno}: {type(node).__name__}"
        if isinstance(node, ast.FunctionDef):
            annotated = [a for a in node.args.args if a.annotation]
            assert node.returns is None
            assert not annotated
            assert not node.args.posonlyargs
            assert not node.args.kwonlyargs


# --- Several at once ---------------------------------------------------------------------


def test_two_runs_at_once_make_one_environment(fresh: Setup) -> None:
    runs = [
        subprocess.Popen(
            fresh.command(extra),
            env=fresh.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for extra in ("dev", "dev")
    ]
    outputs = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert sum("making .venv with" in output for output in outputs) == 1
    assert sum("waiting for it" in output for output in outputs) == 1
    assert fresh.version_of("dev_part") == "1.0"
    fresh.assert_works()


@pytest.mark.slow
def test_after_a_kill_the_next_run_waits_for_the_orphaned_pip_and_starts_over(
    shared: Setup, tmp_path: Path
) -> None:
    (shared.venv / "ristune-stamp.json").unlink()
    flag = tmp_path / "building"
    run = subprocess.Popen(
        shared.command(),
        env=shared.env | {"STAND_IN_FLAG": str(flag)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not flag.exists():
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    after = shared()
    assert after.returncode == 0, after.stderr
    assert "waiting for it" in after.stdout
    assert "cut off" in after.stdout
    shared.assert_works()


# --- The repository's own files ----------------------------------------------------------


def test_make_lists_its_targets() -> None:
    listed = subprocess.check_output(["make", "help"], cwd=ROOT, text=True)
    for target in ("setup", "run", "test", "lint", "bench", "clean"):
        assert f"  {target} " in listed


def test_make_without_any_python_says_what_to_install() -> None:
    run = subprocess.run(["make", "PYTHON=", "setup"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert "install Python 3.11, 3.12 or 3.13" in run.stderr


def test_constraints_pin_every_package_once_and_leave_cuda_to_torch() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    names = [pin.split("==")[0].lower().replace("_", "-") for pin in pins]
    assert all(pin.count("==") == 1 and "+" not in pin and "@" not in pin for pin in pins)
    assert len(names) == len(set(names))
    assert "torch==2.13.0" in pins
    assert not [name for name in names if name.startswith(("nvidia", "cuda", "triton"))]
