"""cluster.yaml, checked without a cloud: Ray's own schema, AWS's own request model, and what
the file promises in its comments. Each check is shown to fail on a broken file."""

from __future__ import annotations

import copy
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from click import ClickException
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
REMOTE_ROOT = "~/ristune/"

Cluster = dict[str, Any]


class ClusterError(AssertionError):
    """What is wrong with a cluster file, where Ray itself would not say so offline."""


# --- Checks -----------------------------------------------------------------------------


def check_schema(cluster: Cluster) -> Cluster:
    """Ray's own preparation and validation; returns the file with its defaults."""
    prepared: Cluster = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    return prepared


def check_launch_requests(cluster: Cluster) -> None:
    """Every node_config is a request that EC2's RunInstances would parse."""
    model = botocore.session.get_session().get_service_model("ec2")
    shape = model.operation_model("RunInstances").input_shape
    for name, node in cluster["available_node_types"].items():
        # What Ray adds of its own before the call.
        request = {**node["node_config"], "MinCount": 1, "MaxCount": 1, "SubnetId": "subnet-0"}
        report = ParamValidator().validate(request, shape)
        if report.has_errors():
            raise ClusterError(f"{name}: {report.generate_report()}")


def check_node_types(cluster: Cluster) -> None:
    """A head without GPU, bounds in order, and resources that the autoscaler can plan with."""
    nodes = cluster["available_node_types"]
    head = nodes[cluster["head_node_type"]]
    if head["resources"].get("GPU") != 0:
        raise ClusterError("the head must say GPU: 0, or trials come to rest on it")
    if "InstanceMarketOptions" in head["node_config"]:
        raise ClusterError("the head holds the ledger: it must not be a spot instance")
    for name, node in nodes.items():
        if not {"CPU", "GPU"} <= set(node["resources"]):
            raise ClusterError(f"{name}: resources must name CPU and GPU")
        if node["min_workers"] > node["max_workers"]:
            raise ClusterError(f"{name}: min_workers above max_workers")
        if node["max_workers"] > cluster["max_workers"]:
            raise ClusterError(f"{name}: max_workers above the cluster's")
        if "ImageId" not in node["node_config"]:
            raise ClusterError(f"{name}: Ray's default image is too old for PyTorch")


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
    """The dashboard stays on loopback, and the head offers no GPU."""
    head = " ; ".join(cluster["head_start_ray_commands"])
    if "--dashboard-host=127.0.0.1" not in head:
        raise ClusterError("the dashboard must be bound to 127.0.0.1")
    if "--num-gpus=0" not in head:
        raise ClusterError("the head must start with --num-gpus=0")
    if "--autoscaling-config=" not in head:
        raise ClusterError("without --autoscaling-config no worker would ever come")


def check_aws(cluster: Cluster) -> None:
    prepared = check_schema(cluster)
    check_launch_requests(prepared)
    check_node_types(prepared)
    for check in (check_mounts, check_setup, check_start):
        check(cluster)


# --- The files --------------------------------------------------------------------------


def on_premise_text(text: str) -> str:
    """What the comment tells the user to do: take one section out, uncomment the other."""
    text, removed = re.subn(r"(?ms)^# >>> AWS\n.*^# <<< AWS\n", "", text)
    text, uncommented = re.subn(r"(?m)^#\|", "", text)
    assert removed == 1
    assert uncommented > 0
    return text


@pytest.fixture
def aws() -> Cluster:
    loaded: Cluster = yaml.safe_load(TEXT)
    return loaded


@pytest.fixture
def on_premise() -> Cluster:
    loaded: Cluster = yaml.safe_load(on_premise_text(TEXT))
    return loaded


def test_the_aws_cluster_passes_every_check(aws: Cluster) -> None:
    check_aws(aws)


def test_workers_come_from_zero_and_spot_is_the_usual_kind(aws: Cluster) -> None:
    workers = {k: v for k, v in aws["available_node_types"].items() if k != aws["head_node_type"]}
    assert all(node["min_workers"] == 0 for node in workers.values())
    assert all(node["resources"]["GPU"] >= 1 for node in workers.values())
    market = {
        name: node["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
        for name, node in workers.items()
    }
    assert set(market.values()) == {"spot", None}
    usable = {name for name, node in workers.items() if node["max_workers"] > 0}
    assert usable == {name for name, kind in market.items() if kind == "spot"}
    assert aws["idle_timeout_minutes"] > 0


def test_the_prepared_commands_are_ours_and_not_the_providers_defaults(aws: Cluster) -> None:
    prepared = check_schema(aws)
    assert prepared["head_setup_commands"] == aws["setup_commands"]
    assert prepared["worker_setup_commands"] == aws["setup_commands"]
    assert "nightly" not in str(prepared)
    assert ".whl" not in str(prepared)


def test_the_on_premise_block_is_valid_once_uncommented(on_premise: Cluster) -> None:
    prepared = check_schema(on_premise)
    assert prepared["provider"]["type"] == "local"
    (node,) = prepared["available_node_types"].values()
    assert node["min_workers"] == node["max_workers"] == len(on_premise["provider"]["worker_ips"])
    for check in (check_mounts, check_setup, check_start):
        check(on_premise)
    assert "available_node_types" not in on_premise
    assert "apt-get" not in str(on_premise)


@pytest.mark.parametrize("text", [TEXT, on_premise_text(TEXT)], ids=["aws", "on-premise"])
def test_every_command_is_one_that_bash_can_parse(text: str) -> None:
    cluster = yaml.safe_load(text)
    for key in (key for key in cluster if key.endswith("_commands")):
        for command in cluster[key]:
            run = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
            assert run.returncode == 0, f"{key}: {command}\n{run.stderr}"


def test_the_flags_of_ray_start_exist_in_this_ray(aws: Cluster) -> None:
    known = {option for parameter in ray_start.params for option in parameter.opts}
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        used = set(re.findall(r"--[\w-]+", " ".join(aws[key])))
        assert used <= known, used - known


def test_the_shell_setup_works_and_is_not_repeated(aws: Cluster, tmp_path: Path) -> None:
    (command,) = [c for c in aws["setup_commands"] if ".bashrc" in c]
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    (tmp_path / ".bashrc").write_text("# of the image\n")
    for _ in range(2):
        subprocess.run(["bash", "-c", command], env=environment, check=True)
    assert len((tmp_path / ".bashrc").read_text().splitlines()) == 2
    shown = subprocess.check_output(
        ["bash", "-c", 'source ~/.bashrc; echo "$RAY_AUTH_MODE ${PATH%%:*}"'],
        env=environment,
        text=True,
    )
    assert shown.split() == ["token", f"{tmp_path}/ristune/.venv/bin"]


def test_lines_to_edit_are_marked(aws: Cluster) -> None:
    placeholders = [
        line
        for line in TEXT.splitlines()
        if re.search(r"(ami|fs)-0123456789abcdef0", line) and not line.startswith("#")
    ]
    assert len(placeholders) == 2
    assert len(re.findall(r"# EDIT\b", TEXT)) == 3
    images = {n["node_config"]["ImageId"] for n in aws["available_node_types"].values()}
    assert images == {aws["metadata"]["image"]}


# --- Each check catches what it is there for ---------------------------------------------


def unknown_key(c: Cluster) -> None:
    c["idle_timeout_minuts"] = 5


def unknown_node_key(c: Cluster) -> None:
    c["available_node_types"]["gpu-spot"]["max_worker"] = 3


def text_for_a_number(c: Cluster) -> None:
    c["max_workers"] = "eight"


def head_type_that_does_not_exist(c: Cluster) -> None:
    c["head_node_type"] = "haed"


def more_required_than_allowed(c: Cluster) -> None:
    c["available_node_types"]["gpu-spot"]["min_workers"] = c["max_workers"] + 1


def typo_in_node_config(c: Cluster) -> None:
    c["available_node_types"]["gpu-spot"]["node_config"]["InstanceTyp"] = "g5.xlarge"


def wrong_type_in_node_config(c: Cluster) -> None:
    device = c["available_node_types"]["head"]["node_config"]["BlockDeviceMappings"][0]
    device["Ebs"]["VolumeSize"] = "120GB"


def typo_deep_in_node_config(c: Cluster) -> None:
    market = c["available_node_types"]["gpu-spot"]["node_config"]["InstanceMarketOptions"]
    market["SpotOption"] = market.pop("SpotOptions")


def gpu_on_the_head(c: Cluster) -> None:
    c["available_node_types"]["head"]["resources"]["GPU"] = 1


def spot_head(c: Cluster) -> None:
    c["available_node_types"]["head"]["node_config"]["InstanceMarketOptions"] = {
        "MarketType": "spot"
    }


def detected_resources(c: Cluster) -> None:
    c["available_node_types"]["gpu-spot"]["resources"] = {}


def minimum_above_maximum(c: Cluster) -> None:
    c["available_node_types"]["gpu-on-demand"]["min_workers"] = 1


def default_image(c: Cluster) -> None:
    del c["available_node_types"]["gpu-spot"]["node_config"]["ImageId"]


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


BROKEN: list[tuple[Callable[[Cluster], None], type[Exception], str]] = [
    (unknown_key, ValidationError, "idle_timeout_minuts"),
    (unknown_node_key, ValidationError, "max_worker"),
    (text_for_a_number, ValidationError, "eight"),
    (head_type_that_does_not_exist, ValueError, "head_node_type"),
    (more_required_than_allowed, ValueError, "max_workers"),
    (typo_in_node_config, ClusterError, "InstanceTyp"),
    (wrong_type_in_node_config, ClusterError, "VolumeSize"),
    (typo_deep_in_node_config, ClusterError, "SpotOption"),
    (gpu_on_the_head, ClusterError, "GPU: 0"),
    (spot_head, ClusterError, "spot"),
    (detected_resources, ClusterError, "CPU and GPU"),
    (minimum_above_maximum, ClusterError, "min_workers above max_workers"),
    (default_image, ClusterError, "too old"),
    (mount_that_is_not_there, ClusterError, "phisics"),
    (whole_clone_mounted, ClusterError, "whole clone"),
    (token_forgotten, ClusterError, "token"),
    (setup_with_a_missing_script, ClusterError, "ensure_env"),
    (constraints_not_mounted, ClusterError, "not mounted"),
    (unpinned_setup, ClusterError, "without constraints"),
    (dashboard_open_to_the_network, ClusterError, "127.0.0.1"),
    (gpus_counted_on_the_head, ClusterError, "num-gpus"),
]


@pytest.mark.parametrize(
    ("damage", "error", "names"), BROKEN, ids=[damage.__name__ for damage, _, _ in BROKEN]
)
def test_a_broken_aws_cluster_is_caught(
    aws: Cluster, damage: Callable[[Cluster], None], error: type[Exception], names: str
) -> None:
    damage(aws)
    with pytest.raises(error, match=re.escape(names)):
        check_aws(aws)


def test_an_on_premise_cluster_without_addresses_is_caught(on_premise: Cluster) -> None:
    del on_premise["provider"]["worker_ips"]
    with pytest.raises(ClickException):  # Ray has printed which field is missing
        check_schema(on_premise)


def test_an_on_premise_cluster_with_an_unknown_key_is_caught(on_premise: Cluster) -> None:
    on_premise["worker_ips"] = ["192.0.2.13"]
    with pytest.raises(ValidationError, match="worker_ips"):
        check_schema(on_premise)
