"""What every cluster file has to fulfil that Ray's own launcher reads: Ray's schema, and what
the files promise in their comments. Used by tests/test_cluster_yaml.py and
tests/test_cluster_onprem.py."""

from __future__ import annotations

import copy
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start

ROOT = Path(__file__).resolve().parent.parent
REMOTE_ROOT = "~/ristune/"

Cluster = dict[str, Any]


class ClusterError(AssertionError):
    """What is wrong with a cluster file, where Ray itself would not say so offline."""


def read(name: str) -> Cluster:
    """A cluster file of the repository."""
    loaded: Cluster = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    return loaded


def check_schema(cluster: Cluster) -> Cluster:
    """Ray's own preparation and validation; returns the file with its defaults."""
    prepared: Cluster = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    return prepared


def check_mounts(cluster: Cluster) -> None:
    """Local sides exist (but for the user's own home); no mount drags in what is made here."""
    for remote, local in cluster["file_mounts"].items():
        if local.startswith("~"):
            continue
        if not (ROOT / local).exists():
            raise ClusterError(f"{remote}: there is no {local} in the repository")
        if (ROOT / local).resolve() == ROOT:
            raise ClusterError(f"{remote}: the whole clone would take .venv and .git along")
    if cluster["file_mounts"].get("~/.ray/auth_token") != "~/.ray/auth_token":
        raise ClusterError("the token is not mounted, so nodes would refuse each other")


def check_setup(cluster: Cluster) -> None:
    """Setup comes from the repository's pinned files, which are mounted where it looks."""
    commands = " ; ".join(cluster["setup_commands"])
    named = set(re.findall(r"[\w./-]+\.(?:py|txt|toml|sh)\b", commands))
    if not named:
        raise ClusterError("setup_commands name no file of the repository")
    # The script reads these without being told.
    named |= {"pyproject.toml", "constraints.txt"}
    for name in named:
        if not (ROOT / name).is_file():
            raise ClusterError(f"setup_commands name {name}, which does not exist")
        top = name.split("/")[0]
        if REMOTE_ROOT + top not in cluster["file_mounts"]:
            raise ClusterError(f"setup_commands need {name}, which is not mounted")
    if re.search(r"pip3? install", commands) and "constraints.txt" not in commands:
        raise ClusterError("setup_commands install packages without constraints.txt")


def check_start(cluster: Cluster) -> None:
    """The dashboard stays on loopback, the head offers no GPU, and all flags exist."""
    head = " ; ".join(cluster["head_start_ray_commands"])
    if "--dashboard-host=127.0.0.1" not in head:
        raise ClusterError("the dashboard must be bound to 127.0.0.1")
    if "--num-gpus=0" not in head:
        raise ClusterError("the head must start with --num-gpus=0")
    if "--autoscaling-config=" not in head:
        raise ClusterError("without --autoscaling-config no worker would ever come")
    known = {option for parameter in ray_start.params for option in parameter.opts}
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        unknown = set(re.findall(r"--[\w-]+", " ".join(cluster[key]))) - known
        if unknown:
            raise ClusterError(f"{key}: this Ray's start has no {sorted(unknown)}")


def check_commands(cluster: Cluster) -> None:
    """Every command is one that bash can parse."""
    for key in (key for key in cluster if key.endswith("_commands")):
        for command in cluster[key]:
            run = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
            if run.returncode != 0:
                raise ClusterError(f"{key}: {command}: {run.stderr.strip()}")


def check_common(cluster: Cluster) -> Cluster:
    """All of the above; returns the file with Ray's defaults."""
    prepared = check_schema(cluster)
    for check in (check_mounts, check_setup, check_start, check_commands):
        check(cluster)
    return prepared


def check_shell_setup(cluster: Cluster, home: Path) -> None:
    """The line for shells works, and is not repeated when a node is set up again."""
    (command,) = [c for c in cluster["setup_commands"] if ".bashrc" in c]
    environment = {"HOME": str(home), "PATH": os.environ["PATH"]}
    (home / ".bashrc").write_text("# of the image\n")
    for _ in range(2):
        subprocess.run(["bash", "-c", command], env=environment, check=True)
    if len((home / ".bashrc").read_text().splitlines()) != 2:
        raise ClusterError("setup_commands repeat their line in .bashrc")
    shown = subprocess.check_output(
        ["bash", "-c", 'source ~/.bashrc; echo "$RAY_AUTH_MODE ${PATH%%:*}"'],
        env=environment,
        text=True,
    )
    if shown.split() != ["token", f"{home}/ristune/.venv/bin"]:
        raise ClusterError(f"a shell has {shown.strip()}")


# --- Damage that any of the files may suffer --------------------------------------------


def unknown_key(c: Cluster) -> None:
    c["idle_timeout_minuts"] = 5


def mount_that_is_not_there(c: Cluster) -> None:
    c["file_mounts"]["~/ristune/phisics"] = "phisics"


def whole_clone_mounted(c: Cluster) -> None:
    c["file_mounts"]["~/ristune"] = "."


def token_forgotten(c: Cluster) -> None:
    del c["file_mounts"]["~/.ray/auth_token"]


def setup_with_a_missing_script(c: Cluster) -> None:
    c["setup_commands"] = ["cd ~/ristune && python3 tools/ensure_env.py"]


def constraints_not_mounted(c: Cluster) -> None:
    del c["file_mounts"]["~/ristune/constraints.txt"]


def unpinned_setup(c: Cluster) -> None:
    c["setup_commands"] += ["pip install optuna"]


def dashboard_open_to_the_network(c: Cluster) -> None:
    commands = c["head_start_ray_commands"]
    c["head_start_ray_commands"] = [s.replace("127.0.0.1", "0.0.0.0") for s in commands]


def gpus_counted_on_the_head(c: Cluster) -> None:
    commands = c["head_start_ray_commands"]
    c["head_start_ray_commands"] = [s.replace(" --num-gpus=0", "") for s in commands]


def no_autoscaler(c: Cluster) -> None:
    commands = c["head_start_ray_commands"]
    c["head_start_ray_commands"] = [re.sub(r" --autoscaling-config=\S+", "", s) for s in commands]


def flag_that_does_not_exist(c: Cluster) -> None:
    c["worker_start_ray_commands"][-1] += " --num-gpu=1"


def quote_left_open(c: Cluster) -> None:
    c["initialization_commands"] += ["echo 'half"]


Damage = tuple[Callable[[Cluster], None], type[Exception], str]
BROKEN_ALIKE: list[Damage] = [
    (unknown_key, ValidationError, "idle_timeout_minuts"),
    (mount_that_is_not_there, ClusterError, "phisics"),
    (whole_clone_mounted, ClusterError, "whole clone"),
    (token_forgotten, ClusterError, "token"),
    (setup_with_a_missing_script, ClusterError, "ensure_env"),
    (constraints_not_mounted, ClusterError, "not mounted"),
    (unpinned_setup, ClusterError, "without constraints"),
    (dashboard_open_to_the_network, ClusterError, "127.0.0.1"),
    (gpus_counted_on_the_head, ClusterError, "num-gpus"),
    (no_autoscaler, ClusterError, "autoscaling-config"),
    (flag_that_does_not_exist, ClusterError, "--num-gpu"),
    (quote_left_open, ClusterError, "echo 'half"),
]
