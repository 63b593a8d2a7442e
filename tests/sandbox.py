"""A copy of the repository in which the documentation's commands run, and what they reach."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import torch
import yaml
from pyarrow.fs import FileSystem

from model import write_shards
from physics import PlanarArray, SceneConfig, simulate
from tests.pages import ROOT
from tests.tuner.clusters import free_port, ray_head
from tests.tuner.postgres import PASSWORD, needed
from tests.tuner.postgres import server as postgres
from tests.tuner.support import environment

LEFT_OUT = shutil.ignore_patterns(
    ".git",
    ".venv*",
    "runs",
    "site",
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "*.egg-info",
    "build",
)
# What every study of the copy is cut down to; the search space to one parameter.
SMALL: dict[str, dict[str, Any]] = {
    "data": {"train_scenes": 32, "val_scenes": 16},
    "training": {"epochs": 2, "batch_size": 8, "threads": 1},
    "search": {"trials": 2, "startup_trials": 1, "grace_epochs": 1, "full_epochs": 2},
}
SPACE = {"training.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}
NARROW = {"width": 16, "depth": 1, "heads": 2, "conv_channels": 4, "image_channels": 4}


class Sandbox:
    """Runs commands in the copy.

    Args:
        folder: empty; the copy is made in it.
        env: of every command.
        places: what stands for hosts, ports and folders that the pages name.
    """

    def __init__(self, folder: Path, env: dict[str, str], places: dict[str, str]) -> None:
        self.tree = folder / "ristune"
        # `~` is left to the shell and to what it is quoted from.
        self._env = env | {"HOME": str(folder / "home"), "PYTHONPATH": str(self.tree)}
        self._places = places | {"/mnt/": f"{folder / 'mnt'}/"}
        self._page = ""
        self._exported: dict[str, str] = {}
        self._job = ""

    def turn_to(self, page: str) -> None:
        """Begin a page, unless it is the one that was open: what others exported is gone."""
        if page != self._page:
            self._page, self._exported = page, {}

    def shell(self, command: str, added: str = "", typed: list[str] | None = None) -> str:
        """Run a command of a page, and return what it printed.

        Args:
            command: as it stands there.
            added: options behind it.
            typed: lines for its prompts.

        Raises:
            AssertionError: its exit code is not 0.
        """
        inner = re.fullmatch(r"ray exec \S+ (?:--tmux )?'(.*)'", command)
        command = f"{inner[1] if inner else command} {added}".strip()
        for place, stand_in in self._places.items():
            command = command.replace(place, stand_in)
        command = command.replace("JOB_ID", self._job)
        self._set_aside(command)
        if command.startswith("export "):
            name, _, value = command.removeprefix("export ").partition("=")
            self._exported[name] = value
            return ""
        answers = typed or [PASSWORD] * 2  # of a role that is made
        printed = self._run(["bash", "-c", command], command, "\n".join(answers) + "\n")
        self._job = (re.findall(r"raysubmit_\w+", printed) or [self._job])[0]
        return printed

    def python(self, code: str) -> str:
        """Run a block of Python."""
        return self._run([sys.executable, "-c", code], code, "")

    def _run(self, command: list[str], shown: str, answers: str) -> str:
        found = subprocess.run(
            command,
            cwd=self.tree,
            env=self._env | self._exported,
            input=answers,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            start_new_session=True,  # no terminal: prompts read what is piped
            check=False,
        )
        assert found.returncode == 0, f"{shown}\nexit code {found.returncode}\n{found.stdout}"
        return found.stdout

    def _set_aside(self, command: str) -> None:
        """Move away a run folder that another page made, where a new study takes its name."""
        out = re.search(r"tuner\.run .*--out (\S+)", command)
        if out and (folder := self.tree / out[1]).exists():
            aside = tempfile.mkdtemp(prefix="earlier-", dir=folder.parent)
            folder.rename(Path(aside) / folder.name)


def make_small(path: Path) -> None:
    """Cut a study down to seconds; its family, objective and options stay."""
    study = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section, fields in SMALL.items():
        study[section] = study.get(section, {}) | fields
    network = study.get("network", {})
    study["network"] = network | {k: v for k, v in NARROW.items() if k in network}
    study["search"]["space"] = SPACE
    path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")


def furnish(tree: Path, shards: Path) -> None:
    """Make the copy: small studies, the environment that is there, data that a reader has."""
    shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
    for study in [*tree.glob("configs/*.yaml"), tree / "examples" / "extension.yaml"]:
        make_small(study)
    # How environments are made is tests/test_ensure_venv.py's: here one is there.
    (tree / ".venv").symlink_to(sys.prefix)
    (tree / "tools" / "ensure_venv.py").write_text("")
    (tree.parent / "shared" / "data").mkdir(parents=True)
    (tree.parent / "shared" / "data" / "origin-shards").symlink_to(shards)
    (tree.parent / "home").mkdir()
    (tree.parent / "home" / "ristune").symlink_to(tree)
    (tree.parent / "mnt" / "ristune").mkdir(parents=True)

    array, config = PlanarArray(), SceneConfig()
    for split, seed in (("train", 1), ("val", 2)):
        scenes = simulate(8, config, array, generator=torch.Generator().manual_seed(seed))
        write_shards(tree / "data", split, scenes, array, "spherical")
    arrays = {name: getattr(scenes, name).numpy() for name in ("y", "H", "codes", "snr_db")}
    np.savez(tree / "snapshots.npz", **arrays)


@contextmanager
def s3_store() -> Iterator[tuple[str, dict[str, str]]]:
    """An S3 store with a bucket: the options of its URI, and the keys."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    keys = {"AWS_ACCESS_KEY_ID": "anyone", "AWS_SECRET_ACCESS_KEY": "anything"}
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = f"endpoint_override=http://{host}:{port}&region=us-east-1"
        held = {key: os.environ.get(key) for key in keys}
        os.environ.update(keys)
        try:
            made, _ = FileSystem.from_uri(f"s3://bucket/?{options}&allow_bucket_creation=true")
            made.create_dir("bucket")
        finally:
            for key, value in held.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
        yield options, keys
    finally:
        server.stop()


@contextmanager
def sandbox(shards: Path) -> Iterator[Sandbox]:
    """The copy, a Ray with a token and a dashboard, PostgreSQL and an S3 store."""
    folder = Path(tempfile.mkdtemp(prefix="rs", dir="/tmp"))
    try:
        furnish(folder / "ristune", shards)
        with postgres() as database, s3_store() as (s3, keys):
            with database.connect("postgres") as connection:
                for statement in (
                    f"CREATE ROLE admin SUPERUSER LOGIN PASSWORD '{PASSWORD}'",
                    f"CREATE ROLE me SUPERUSER LOGIN PASSWORD '{PASSWORD}'",
                ):
                    connection.execute(statement)
            # The pages make the role that the server was made with.
            with psycopg.connect(
                host="127.0.0.1", port=database.port, user="admin", password=PASSWORD,
                dbname="postgres", autocommit=True,
            ) as connection:  # fmt: skip
                connection.execute("ALTER ROLE ristune RENAME TO owner")
            paths = [Path(sys.executable).parent, needed("createuser").parent]
            port, dashboard = free_port(), free_port()
            env = environment(
                **keys,
                PATH=os.pathsep.join([*map(str, paths), os.environ["PATH"]]),
                HOME=str(folder / "home"),
                PGHOST="127.0.0.1",
                PGPORT=str(database.port),
                PGUSER="admin",
                PGPASSWORD=PASSWORD,
                RAY_AUTH_MODE="token",
                RAY_USAGE_STATS_ENABLED="0",
                PYTHONPATH=str(folder / "ristune"),
            )
            token = [sys.executable, "-m", "ray.scripts.scripts", "get-auth-token", "--generate"]
            subprocess.run(token, env=env, check=True, capture_output=True)
            places = {
                "db.example.com": f"127.0.0.1:{database.port}",
                "s3://bucket/ristune": f"'s3://bucket/ristune?{s3}'",
                "127.0.0.1:8265": f"127.0.0.1:{dashboard}",
            }
            with ray_head(
                "--num-cpus=2",
                "--include-dashboard=true",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={dashboard}",
                f"--dashboard-agent-listen-port={free_port()}",
                f"--dashboard-agent-grpc-port={free_port()}",
                port=port,
                **env,
            ):
                yield Sandbox(folder, env | {"RAY_ADDRESS": f"127.0.0.1:{port}"}, places)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
