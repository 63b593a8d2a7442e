"""cluster-onprem.yaml, checked without machines: Ray's own schema and preparation, and that it
does to a node what cluster.yaml does. Each check is shown to fail on a broken file."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click import ClickException
from jsonschema import ValidationError
from ray.autoscaler._private.command_runner import SSHOptions

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


def check_machines(cluster: Cluster) -> None:
    """Every machine is named once, by its address, and all of them are used."""
    provider = cluster["provider"]
    machines = [provider["head_ip"], *provider["worker_ips"]]
    if len(set(machines)) < len(machines):
        raise ClusterError(f"a machine is named twice: {machines}")
    for machine in machines:
        ipaddress.ip_address(machine)
    if not {"ssh_user", "ssh_private_key"} <= set(cluster["auth"]):
        raise ClusterError("auth must name ssh_user and ssh_private_key")


def check_owned(cluster: Cluster) -> None:
    """Nothing is installed on the machines themselves, and the shared folder is looked for."""
    if "apt-get" in str(cluster) or "sudo" in str(cluster):
        raise ClusterError("machines of your own are not changed outside ~/ristune")
    if "[ -w /mnt/ristune ]" not in " ; ".join(cluster["initialization_commands"]):
        raise ClusterError("nobody would see that the shared folder is missing")
    if "--num-cpus=0" not in " ; ".join(cluster["head_start_ray_commands"]):
        raise ClusterError("the head must start with --num-cpus=0")


def check_on_premise(cluster: Cluster) -> Cluster:
    prepared = check_common(cluster)
    check_machines(cluster)
    check_owned(cluster)
    return prepared


@pytest.fixture
def on_premise() -> Cluster:
    return read("cluster-onprem.yaml")


def test_the_cluster_passes_every_check_and_uses_all_machines(on_premise: Cluster) -> None:
    prepared = check_on_premise(on_premise)
    assert prepared["provider"]["type"] == "local"
    (node,) = prepared["available_node_types"].values()
    assert node["min_workers"] == node["max_workers"] == len(on_premise["provider"]["worker_ips"])
    assert prepared["head_setup_commands"] == on_premise["setup_commands"]
    assert prepared["worker_setup_commands"] == on_premise["setup_commands"]


def test_a_node_is_set_up_as_in_the_cloud(on_premise: Cluster) -> None:
    aws = read("cluster.yaml")
    for key in ("file_mounts", "rsync_exclude", "worker_start_ray_commands"):
        assert on_premise[key] == aws[key], key
    for own, rented in zip(on_premise["setup_commands"], aws["setup_commands"], strict=True):
        assert own == rented.replace(" --extra aws", "")


def test_the_shell_setup_works_and_is_not_repeated(on_premise: Cluster, tmp_path: Path) -> None:
    check_shell_setup(on_premise, tmp_path)


def test_lines_to_edit_are_marked() -> None:
    lines = (ROOT / "cluster-onprem.yaml").read_text(encoding="utf-8").splitlines()
    marked = [i for i, line in enumerate(lines) if line.strip().startswith("# EDIT")]
    assert len(marked) == 3
    for wanted in ("head_ip:", "worker_ips:", "ssh_user:", r"\[ -d /mnt/ristune \]"):
        (at,) = [i for i, line in enumerate(lines) if re.match(rf" +(- )?{wanted}", line)]
        assert any(0 < at - i <= 3 for i in marked), wanted


def test_the_head_reaches_workers_by_the_named_key_alone(on_premise: Cluster) -> None:
    options = SSHOptions(on_premise["auth"]["ssh_private_key"]).to_ssh_options_list()
    assert "IdentitiesOnly=yes" in options
    assert not any("ForwardAgent" in option for option in options)
    text = (ROOT / "cluster-onprem.yaml").read_text(encoding="utf-8")
    assert "a key without a passphrase" in text


def no_workers(c: Cluster) -> None:
    del c["provider"]["worker_ips"]


def node_types_of_a_cloud(c: Cluster) -> None:
    c["available_node_types"] = {"gpu": {"node_config": {}, "resources": {"GPU": 1}}}


def workers_in_the_wrong_place(c: Cluster) -> None:
    c["worker_ips"] = ["192.0.2.13"]


def head_among_the_workers(c: Cluster) -> None:
    c["provider"]["worker_ips"].append(c["provider"]["head_ip"])


def address_that_is_none(c: Cluster) -> None:
    c["provider"]["head_ip"] = "192.0.2.300"


def key_forgotten(c: Cluster) -> None:
    del c["auth"]["ssh_private_key"]


def packages_of_the_system(c: Cluster) -> None:
    c["initialization_commands"] += ["sudo apt-get install -y nfs-common"]


def shared_folder_not_looked_for(c: Cluster) -> None:
    c["initialization_commands"] = []


def cpus_counted_on_the_head(c: Cluster) -> None:
    commands = c["head_start_ray_commands"]
    c["head_start_ray_commands"] = [s.replace(" --num-cpus=0", "") for s in commands]


BROKEN: list[Damage] = [
    *BROKEN_ALIKE,
    (workers_in_the_wrong_place, ValidationError, "worker_ips"),
    (head_among_the_workers, ClusterError, "twice"),
    (address_that_is_none, ValueError, "192.0.2.300"),
    (key_forgotten, ClusterError, "ssh_private_key"),
    (packages_of_the_system, ClusterError, "not changed"),
    (shared_folder_not_looked_for, ClusterError, "missing"),
    (cpus_counted_on_the_head, ClusterError, "num-cpus"),
]


@pytest.mark.parametrize(
    ("damage", "error", "names"), BROKEN, ids=[damage.__name__ for damage, _, _ in BROKEN]
)
def test_a_broken_cluster_is_caught(
    on_premise: Cluster, damage: Callable[[Cluster], None], error: type[Exception], names: str
) -> None:
    damage(on_premise)
    with pytest.raises(error, match=re.escape(names)):
        check_on_premise(on_premise)


@pytest.mark.parametrize(
    ("damage", "names"),
    [(no_workers, "worker_ips"), (node_types_of_a_cloud, "available_node_types")],
)
def test_what_ray_itself_refuses_is_printed(
    on_premise: Cluster,
    damage: Callable[[Cluster], None],
    names: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(on_premise)
    with pytest.raises(ClickException):
        check_on_premise(on_premise)
    assert names in "".join(capsys.readouterr())
