"""Selects the Python interpreter for an environment.

Used by tools/ensure_venv.py, so it has the syntax of Python 2.7 and needs only the standard
library.
"""

import json
import os
import shutil
import subprocess
import sys

SUPPORTED = ((3, 11), (3, 12), (3, 13))
SUPPORTED_TEXT = "3.11, 3.12 or 3.13"
NEEDED_MODULES = ("venv", "ensurepip", "ssl", "sqlite3")

# Code run by a candidate interpreter; it prints one line of JSON.
PROBE = """\
import json, sys
missing = []
for name in sys.argv[1:]:
    try:
        __import__(name)
    except Exception:
        missing.append(name)
print(json.dumps({
    "version": list(sys.version_info[:3]),
    "prefix": sys.prefix,
    "missing": missing,
}))
"""


class SetupError(Exception):
    """The environment cannot be created; the message says what to do about it."""


def say(text):
    # type: (str) -> None
    sys.stdout.write("[setup] " + text + "\n")
    sys.stdout.flush()


def dotted(version):
    # type: (object) -> str
    return ".".join(str(part) for part in version)  # type: ignore[attr-defined]


def clean_environment():
    # type: () -> dict[str, str]
    """Environment for pip and venv, without variables that would redirect packages."""
    env = dict(os.environ)
    for name in ("PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT"):
        env.pop(name, None)
    env["PIP_USER"] = "0"
    env["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    env["PIP_NO_INPUT"] = "1"
    env["PYTHONUNBUFFERED"] = "1"
    return env


class Interpreter(object):
    """A Python interpreter, as it describes itself."""

    def __init__(self, path, version, prefix, missing):
        # type: (str, tuple[int, ...], str, list[str]) -> None
        self.path = path
        self.version = version
        self.prefix = prefix
        self.missing = missing

    @property
    def series(self):
        # type: () -> tuple[int, ...]
        return self.version[:2]

    @property
    def supported(self):
        # type: () -> bool
        return self.series in SUPPORTED

    def lacks(self):
        # type: () -> str
        plural = "s" if len(self.missing) > 1 else ""
        return "{} (Python {}) lacks the standard module{} {}".format(
            self.path, dotted(self.version), plural, ", ".join(self.missing)
        )

    def advice(self):
        # type: () -> str
        if set(self.missing) & {"venv", "ensurepip"}:
            return (
                "Install what is missing (Debian and Ubuntu: `apt install python3-venv`, or "
                "`python{}-venv` for this one; Fedora: `dnf install python3-pip python3-libs`), "
                "then run the same command again.".format(dotted(self.series))
            )
        return (
            "This Python was built without {}: build it again with the development files of "
            "OpenSSL and SQLite present (Debian and Ubuntu: libssl-dev libsqlite3-dev), or name "
            "another with `make PYTHON=...`.".format(" and ".join(self.missing))
        )


def probe(python, modules=(), env=None):
    # type: (str, tuple[str, ...], dict[str, str] | None) -> Interpreter | None
    """Query an interpreter; None if it does not run."""
    try:
        answer = subprocess.check_output(
            [python, "-c", PROBE] + list(modules), stderr=subprocess.DEVNULL, env=env
        )
        said = json.loads(answer.decode("utf-8").strip().splitlines()[-1])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None
    return Interpreter(python, tuple(said["version"]), said["prefix"], said["missing"])


def candidates():
    # type: () -> list[str]
    """Candidate interpreters, best first: the running one, then those on PATH."""
    found = []
    in_environment = sys.prefix != getattr(sys, "base_prefix", sys.prefix)
    if in_environment:
        # An activated environment (.venv itself, perhaps) may be about to be removed.
        name = "python{}.{}".format(*sys.version_info[:2])
        found.append(os.path.join(sys.base_prefix, "bin", name))
        found.append(getattr(sys, "_base_executable", None) or "")
    found.append(sys.executable or "")
    found += [shutil.which("python" + dotted(series)) or "" for series in reversed(SUPPORTED)]
    unique = []
    for path in found:
        if path and os.path.exists(path) and path not in unique:
            unique.append(path)
    return unique


def choose_python():
    # type: () -> Interpreter
    """The first supported interpreter with all modules that an environment needs."""
    refused = []
    incomplete = []
    for path in candidates():
        found = probe(path, NEEDED_MODULES)
        if found is None:
            continue
        if not found.supported:
            refused.append("{} is Python {}".format(path, dotted(found.version)))
        elif found.missing:
            refused.append(found.lacks())
            incomplete.append(found)
        else:
            if refused:
                say("{}; using {} instead".format(refused[0], path))
            return found
    if incomplete:
        raise SetupError("{}.\n{}".format(incomplete[0].lacks(), incomplete[0].advice()))
    raise SetupError(
        "Python {} is needed, but {}.\nInstall one of them (Debian and Ubuntu: `apt install "
        "python3.12 python3.12-venv`; anywhere: pyenv, conda or uv), or name it: "
        "`make PYTHON=/path/to/python3.12 ...`.".format(
            SUPPORTED_TEXT, "; ".join(refused) or "no Python was found that runs"
        )
    )
