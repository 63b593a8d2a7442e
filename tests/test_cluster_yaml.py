"""cluster.yaml, checked without a cloud: Ray's own schema, AWS's own request model, and what
the file promises in its comments. Each check is shown to fail on a broken file."""

from __future__ import annotations

import inspect
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
from jsonschema import ValidationError
from ray.autoscaler._private.aws.config import _configure_iam_role, _upsert_security_group_rules

from tests.cluster_files import (
    BROKEN_ALIKE,
    ROOT,
    Cluster,
    ClusterError,
    Damage,
    check_common,
    check_shell_setup,
    read,
)

# --- Checks -----------------------------------------------------------------------------


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


def check_aws(cluster: Cluster) -> Cluster:
    prepared = check_common(cluster)
    check_launch_requests(prepared)
    check_node_types(prepared)
    return prepared


# --- The file ---------------------------------------------------------------------------


@pytest.fixture
def aws() -> Cluster:
    return read("cluster.yaml")


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
    prepared = check_aws(aws)
    assert prepared["head_setup_commands"] == aws["setup_commands"]
    assert prepared["worker_setup_commands"] == aws["setup_commands"]
    assert "nightly" not in str(prepared)
    assert ".whl" not in str(prepared)


def test_the_shell_setup_works_and_is_not_repeated(aws: Cluster, tmp_path: Path) -> None:
    check_shell_setup(aws, tmp_path)


def test_lines_to_edit_are_marked(aws: Cluster) -> None:
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    placeholders = [
        line
        for line in text.splitlines()
        if re.search(r"(ami|fs)-0123456789abcdef0", line) and not line.startswith("#")
    ]
    assert len(placeholders) == 2
    assert len(re.findall(r"# EDIT\b", text)) == 3
    images = {n["node_config"]["ImageId"] for n in aws["available_node_types"].values()}
    assert images == {aws["metadata"]["image"]}


# --- A machine that has just booted -------------------------------------------------------


def updates(cluster: Cluster, folder: Path, refused: int) -> tuple[int, int]:
    """Run the update of apt's lists where another holds the lock: exit code, and calls of apt.

    Args:
        refused: calls that fail before one succeeds.
    """
    (command,) = [c for c in cluster["initialization_commands"] if "apt-get -qq update" in c]
    calls = folder / "calls"
    calls.touch()
    (folder / "sudo").write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\n[ $(wc -l < {calls}) -gt {refused} ] || exit 100\n'
    )
    (folder / "sleep").write_text("#!/bin/sh\n")
    for name in ("sudo", "sleep"):
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    finished = subprocess.run(["bash", "-c", command], env={"PATH": path}, timeout=60, check=False)
    made = calls.read_text().splitlines()
    assert set(made) == {"apt-get -qq update"}
    return finished.returncode, len(made)


def test_the_update_of_apts_lists_waits_for_their_lock(aws: Cluster, tmp_path: Path) -> None:
    assert updates(aws, tmp_path, refused=3) == (0, 4)


def test_the_update_of_apts_lists_does_not_wait_for_ever(aws: Cluster, tmp_path: Path) -> None:
    assert updates(aws, tmp_path, refused=10_000) == (1, 120)


def test_nothing_asks_a_question_while_packages_are_installed(aws: Cluster) -> None:
    (command,) = [c for c in aws["initialization_commands"] if "install -y" in c]
    assert {"DEBIAN_FRONTEND=noninteractive", "NEEDRESTART_MODE=a"} <= set(command.split())
    assert "DPkg::Lock::Timeout=" in command


# --- SSH --------------------------------------------------------------------------------


class Group:
    """A security group that notes which rules Ray adds to it."""

    id = "sg-0"

    def __init__(self, *rules: dict[str, Any]) -> None:
        self.ip_permissions = list(rules)
        self.added: list[dict[str, Any]] = []

    def authorize_ingress(self, IpPermissions: list[dict[str, Any]]) -> None:
        self.added += IpPermissions


def ssh_from(cidr: str) -> dict[str, Any]:
    return {"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp", "IpRanges": [{"CidrIp": cidr}]}


def test_a_group_with_rules_that_the_file_names_gets_none_of_rays() -> None:
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    text, found = re.subn(r"(?m)^  # (security_group: .*)$", r"  \1", text)
    assert found == 1
    named: Cluster = yaml.safe_load(text)
    assert named["provider"]["security_group"] == {"GroupName": "ristune"}
    group = Group(ssh_from("203.0.113.0/24"))
    _upsert_security_group_rules(check_aws(named), {"head": group})
    assert group.added == []


def test_rules_in_the_file_would_not_narrow_those_of_ray(aws: Cluster) -> None:
    narrow = ssh_from("203.0.113.0/24")
    aws["provider"]["security_group"] = {"GroupName": "ristune", "IpPermissions": [narrow]}
    group = Group()
    _upsert_security_group_rules(check_aws(aws), {"head": group})
    assert ssh_from("0.0.0.0/0") in group.added
    assert narrow in group.added


# --- The head's role --------------------------------------------------------------------


def test_rays_role_for_the_head_has_the_policies_that_the_comment_names() -> None:
    attached = set(re.findall(r"policy/(\w+)", inspect.getsource(_configure_iam_role)))
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"\bAmazon\w+Access\b", text)) == attached


# --- Each check catches what it is there for ---------------------------------------------


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


BROKEN: list[Damage] = [
    *BROKEN_ALIKE,
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
