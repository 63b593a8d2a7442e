"""Small clones that stand in for the repository, and tools/ensure_venv.py run on them.

Their packages are wheels of a few bytes in a local folder, so that an installation takes seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "ensure_venv.py"
SERIES = "{}.{}".format(*sys.version_info[:2])
# The interpreter under the environment that runs the tests.
PYTHON = Path(sys.base_prefix) / "bin" / f"python{SERIES}"

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


def make_wheels(folder: Path) -> Path:
    """The folder, with all the packages that there are."""
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


def made(folder: Path, wheels: Path) -> Setup:
    """A clone whose environment has just been made."""
    setup = Setup(make_clone(folder), wheels)
    run = setup()
    assert run.returncode == 0, run.stderr
    assert "making .venv with Python" in run.stdout
    assert "is ready" in run.stdout
    return setup
