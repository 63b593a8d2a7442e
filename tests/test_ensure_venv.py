"""tools/ensure_venv.py, run for real: real interpreters, real venv, real pip, no network.

A small clone stands in for the repository (tests/clones.py).
"""

from __future__ import annotations

import ast
import json
import shutil
import signal
import subprocess
import textwrap
import time
import zipfile
from pathlib import Path

import pytest

from tests.clones import (
    PYTHON,
    ROOT,
    SCRIPT,
    SERIES,
    Setup,
    made,
    make_clone,
    make_wheel,
    make_wheels,
)

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}")


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
