"""Install the requirements of pyproject.toml and constraints.txt in .venv, only when needed.

The Makefile runs it with the ``python3`` on PATH, so the syntax here and in tools/pythons.py
is that of Python 2.7: an old interpreter must be able to run far enough to report what is
wrong with it. Only the standard library is used.

A stamp inside .venv records what was installed (a hash of both files, the extras, Python's
version, this clone's path). While it matches, a run costs a few milliseconds. Otherwise:

- a working environment is updated in place;
- one that is broken, incomplete, moved or copied from elsewhere, or built for an unsupported
  Python is removed and created again.

A file lock serialises runs, and pip inherits it: if this process is killed, the next one
still waits until pip has released the lock.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time

from pythons import SUPPORTED_TEXT, SetupError, choose_python, clean_environment, dotted, probe, say

ENVIRONMENT = ".venv"
LOCK = ".venv.lock"
STAMP = "ristune-stamp.json"  # in .venv: describes the installed state
MARKER = "ristune-installing"  # in .venv: pip is running, or was interrupted
LOG = "install.log"  # in .venv: pip's complete output
STAMP_FORMAT = 1

NETWORK_SIGNS = re.compile(
    r"NewConnectionError|NameResolutionError|name resolution|Name or service not known"
    r"|Network is unreachable|Connection refused|ConnectTimeout|ReadTimeout|timed out"
    r"|ProxyError|SSLError|ConnectionResetError|Connection broken|nodename nor servname",
    re.IGNORECASE,
)
HINTS = (
    (
        NETWORK_SIGNS,
        (
            "pip could not reach its package index. Check the network; behind a proxy set "
            "HTTPS_PROXY, with a mirror set PIP_INDEX_URL. Then run the same command again."
        ),
    ),
    (
        re.compile(r"No space left on device|Errno 28", re.IGNORECASE),
        (
            "The disk is full. PyTorch with its CUDA libraries wants about 10 GB while it "
            "installs; TMPDIR and PIP_CACHE_DIR can point to another disk."
        ),
    ),
    (
        re.compile(
            r"No matching distribution found|Could not find a version|ResolutionImpossible",
            re.IGNORECASE,
        ),
        (
            "The package index has no such version for this Python and machine, or "
            "pyproject.toml and constraints.txt ask for different ones. Check that the index "
            "is complete (PIP_INDEX_URL, PIP_NO_INDEX) and that both files are unchanged."
        ),
    ),
    (
        re.compile(r"Permission denied|Errno 13", re.IGNORECASE),
        "A folder is not writable: check who owns this clone and pip's cache.",
    ),
)


# --- The existing environment -----------------------------------------------------------


class Environment(object):
    """The .venv of a clone: its stamp, whether it works, and its paths."""

    def __init__(self, root):
        # type: (str) -> None
        self.root = os.path.realpath(root)
        self.path = os.path.join(self.root, ENVIRONMENT)
        self.python = os.path.join(self.path, "bin", "python")

    def file(self, name):
        # type: (str) -> str
        return os.path.join(self.path, name)

    def wanted(self, extras):
        # type: (set[str]) -> dict[str, object]
        """The stamp of an up-to-date environment, except for Python's version."""
        digest = hashlib.sha256()
        for name in ("pyproject.toml", "constraints.txt"):
            with open(os.path.join(self.root, name), "rb") as handle:
                content = handle.read()
            digest.update("{}:{}:".format(name, len(content)).encode("ascii"))
            digest.update(content)
        return {
            "format": STAMP_FORMAT,
            "root": self.root,
            "inputs": digest.hexdigest(),
            "extras": sorted(extras),
        }

    def stamp(self):
        # type: () -> dict[str, object]
        """The stamp, or {} if there is no readable one."""
        try:
            with open(self.file(STAMP), encoding="utf-8") as handle:
                stamp = json.load(handle)
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) else {}

    def installed_extras(self):
        # type: () -> set[str]
        extras = self.stamp().get("extras", [])
        return set(extras) if isinstance(extras, list) else set()

    def fault(self):
        # type: () -> str | None
        """Why the environment must be recreated, or None if it can be kept."""
        if os.path.islink(self.path):
            return "it is a link to {}".format(os.path.realpath(self.path))
        if not os.path.exists(self.file("pyvenv.cfg")):
            return "it is half made"
        if not os.path.exists(self.python):
            return "its Python is gone"
        if os.path.exists(self.file(MARKER)):
            return "an installation was cut off"
        made_for = self.stamp().get("root")
        if made_for is not None and made_for != self.root:
            return "it was made for {}".format(made_for)
        found = probe(self.python, ("pip",), clean_environment())
        if found is None:
            return "its Python does not run"
        if os.path.realpath(found.prefix) != self.path:
            return "its Python belongs to {}".format(found.prefix)
        if not found.supported:
            return "it has Python {}".format(dotted(found.version))
        packages = self.file("lib/python{}/site-packages".format(dotted(found.series)))
        if not os.path.isdir(packages):
            return "it was made for another Python than the {} that it runs".format(
                dotted(found.version)
            )
        if found.missing:
            return "it has no pip"
        # Scripts contain the full path of their interpreter, which reveals a moved environment.
        scripts = self.file("bin/pip")
        with contextlib.suppress(OSError, UnicodeDecodeError), open(scripts, encoding="utf-8") as f:
            head = f.read(2048)
            if self.path not in head:
                return "it was moved here from elsewhere"
        return None

    def current(self, extras):
        # type: (set[str]) -> bool
        """Whether the stamp covers the requested extras, and Python still runs."""
        stamp = self.stamp()
        if os.path.islink(self.path) or os.path.exists(self.file(MARKER)):
            return False
        wanted = self.wanted(extras)
        if any(stamp.get(key) != wanted[key] for key in ("format", "root", "inputs")):
            return False
        if not extras <= self.installed_extras():
            return False
        found = probe(self.python, (), clean_environment())
        return found is not None and list(found.series) == stamp.get("python")

    def remove(self):
        # type: () -> None
        if os.path.islink(self.path):
            os.unlink(self.path)
            return
        if not os.path.isdir(self.path):
            raise SetupError("{} is in the way: move it away.".format(self.path))
        known = {"bin", "include", "lib", "lib64", "share", "pyvenv.cfg", ".gitignore"}
        known |= {STAMP, MARKER, LOG}
        strange = sorted(set(os.listdir(self.path)) - known)
        if strange and not os.path.exists(self.file("pyvenv.cfg")):
            raise SetupError(
                "{} is no virtual environment (it holds {}): move it away.".format(
                    self.path, ", ".join(strange[:5])
                )
            )
        shutil.rmtree(self.path)


# --- Creating it ------------------------------------------------------------------------


@contextlib.contextmanager
def locked(root):  # type: ignore[no-untyped-def]
    """Hold the clone's lock; yield the descriptor that child processes must inherit."""
    descriptor = os.open(os.path.join(root, LOCK), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another run is preparing {}; waiting for it".format(ENVIRONMENT))
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def hint(text):
    # type: (str) -> str
    for pattern, advice_text in HINTS:
        if pattern.search(text):
            return advice_text
    return ""


def last_words(lines):
    # type: (list[str]) -> str
    """pip's output from the first error on, or else its last lines."""
    lines = [line for line in lines if line.strip()]
    errors = [i for i, line in enumerate(lines) if re.match(r"\s*(ERROR|error)\b", line)]
    telling = lines[errors[0] :][:12] if errors else lines[-6:]
    return "\n".join("  " + line for line in telling)


def run_pip(environment, arguments, lock):
    # type: (Environment, list[str], int) -> None
    """Run pip install under the constraints; print short lines for long downloads and the end."""
    command = [environment.python, "-m", "pip", "install", "--progress-bar", "off"]
    command += ["-c", "constraints.txt"] + arguments
    lines = []
    with open(environment.file(LOG), "a", encoding="utf-8") as log:
        log.write("$ " + " ".join(command) + "\n")
        child = subprocess.Popen(
            command,
            cwd=environment.root,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            universal_newlines=True,
            pass_fds=(lock,),
        )
        assert child.stdout is not None
        for line in child.stdout:
            log.write(line)
            line = line.rstrip()
            lines.append(line)
            big = re.match(r"\s*Downloading (\S+) \(([\d.]+) ([MG]B)\)", line)
            if big and (big.group(3) == "GB" or float(big.group(2)) >= 20):
                name = big.group(1).rsplit("/", 1)[-1].split("-")[0]
                say("  downloading {} ({} {})".format(name, big.group(2), big.group(3)))
            elif line.startswith("Installing collected packages:"):
                count = len(line.split(":", 1)[1].split(","))
                say("  installing {} package{}".format(count, "" if count == 1 else "s"))
        status = child.wait()
    if status != 0:
        text = "\n".join(lines[-200:])
        more = hint(text) or "All that pip said is in {}/{}.".format(ENVIRONMENT, LOG)
        raise SetupError("pip failed (status {}):\n{}\n{}".format(status, last_words(lines), more))


def create(environment, lock):
    # type: (Environment, int) -> None
    python = choose_python()
    say("making {} with Python {} ({})".format(ENVIRONMENT, dotted(python.version), python.path))
    child = subprocess.Popen(
        [python.path, "-m", "venv", environment.path],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
        pass_fds=(lock,),
    )
    output = child.communicate()[0]
    if child.returncode != 0:
        raise SetupError(
            "{} -m venv failed:\n{}\n{}".format(
                python.path, last_words(output.splitlines()), hint(output)
            )
        )


def install(environment, extras, lock):
    # type: (Environment, set[str], int) -> None
    """Update a working environment and write its stamp."""
    marker = environment.file(MARKER)
    started = time.time()
    with contextlib.suppress(OSError):
        os.unlink(environment.file(STAMP))
    with open(marker, "w", encoding="utf-8"):
        pass
    project = "." + ("[{}]".format(",".join(sorted(extras))) if extras else "")
    try:
        # setuptools from the constraints builds the project, without a second, unpinned download.
        say("installing PyTorch first (minutes when it has to be downloaded)")
        run_pip(environment, ["setuptools"] + torch_requirement(environment.root), lock)
        say("installing the project" + (" with " + ", ".join(sorted(extras)) if extras else ""))
        run_pip(environment, ["--no-build-isolation", "-e", project], lock)
    except SetupError:
        # pip itself exited, so nothing is half unpacked: the next run can continue from here.
        os.unlink(marker)
        raise
    python = probe(environment.python, (), clean_environment())
    if python is None:
        raise SetupError("{} does not run after the installation.".format(environment.python))
    stamp = environment.wanted(extras)
    stamp["python"] = list(python.series)
    temporary = environment.file(STAMP + ".new")
    with open(temporary, "w", encoding="utf-8") as handle:
        json.dump(stamp, handle, indent=1, sort_keys=True)
        handle.write("\n")
    os.replace(temporary, environment.file(STAMP))
    os.unlink(marker)
    say("{} is ready ({:.0f} s)".format(ENVIRONMENT, time.time() - started))


def torch_requirement(root):
    # type: (str) -> list[str]
    """The project's requirement on PyTorch, as written in pyproject.toml."""
    with open(os.path.join(root, "pyproject.toml"), encoding="utf-8") as handle:
        return re.findall(r'^\s*"(torch\b[^"]*)"', handle.read(), re.MULTILINE)[:1]


def ensure(root, extras):
    # type: (str, set[str]) -> None
    environment = Environment(root)
    if environment.current(extras):
        return
    with locked(environment.root) as lock:
        if environment.current(extras):
            return  # another process created it while this one waited
        extras = set(extras)
        if os.path.lexists(environment.path):
            fault = environment.fault()
            if fault is None:
                # Extras installed earlier are updated too.
                extras |= environment.installed_extras()
                say("bringing {} up to date".format(ENVIRONMENT))
            else:
                choose_python()  # fail before anything is removed
                say("making {} again: {}".format(ENVIRONMENT, fault))
                environment.remove()
        if not os.path.exists(environment.path):
            create(environment, lock)
        install(environment, extras, lock)


def main(arguments=None):
    # type: (list[str] | None) -> int
    parser = argparse.ArgumentParser(description="Make .venv hold what the project needs.")
    parser.add_argument("--extra", action="append", default=[], metavar="NAME", help="dev, aws")
    parser.add_argument(
        "--root", default=os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    )
    options = parser.parse_args(arguments)
    if sys.version_info < (3, 5):
        sys.stderr.write(
            "[setup] Python {} is needed, but {} is Python {}. Name another: "
            "`make PYTHON=/path/to/python3.12 ...`.\n".format(
                SUPPORTED_TEXT, sys.executable, dotted(sys.version_info[:3])
            )
        )
        return 1
    try:
        ensure(options.root, set(options.extra))
    except SetupError as error:
        sys.stderr.write("[setup] " + str(error).replace("\n", "\n[setup] ") + "\n")
        return 1
    except OSError as error:
        sys.stderr.write("[setup] {} {}\n".format(error, hint(str(error))).rstrip() + "\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\n[setup] interrupted; run the same command again to go on\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
