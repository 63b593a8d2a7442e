"""Which machines of cluster-onprem.yaml Ray takes: its autoscaler and its provider for machines
that are there, as they run on the head. Only the commands that go out through ssh are left out."""

from __future__ import annotations

import copy
import os
import subprocess
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from ray.autoscaler._private.autoscaler import StandardAutoscaler
from ray.autoscaler._private.load_metrics import LoadMetrics
from ray.autoscaler._private.local import config as local_config
from ray.autoscaler._private.providers import _clear_provider_cache
from ray.autoscaler._private.util import prepare_config, with_envs
from ray.autoscaler.tags import NODE_KIND_HEAD

from tests.cluster_files import Cluster, read


class Ssh:
    """Runs nothing, and says that it went well."""

    def check_call(self, *args: Any, **kwargs: Any) -> None:
        pass

    def check_output(self, *args: Any, **kwargs: Any) -> bytes:
        return b"up 1 minute\n"


@pytest.fixture
def on_premise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The file, without what lies on other machines, and with a state of its own."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    cluster = read("cluster-onprem.yaml")
    del cluster["auth"]["ssh_private_key"]
    cluster["file_mounts"] = {}
    assert local_config.get_state_path(cluster["cluster_name"]).startswith(str(tmp_path))
    return cluster


def taken(cluster: Cluster, most: float = 20.0) -> set[str]:
    """Addresses of the machines that the autoscaler has taken, once it has all or time is up."""
    prepared = prepare_config(copy.deepcopy(cluster))
    prepared["provider"]["cluster_name"] = cluster["cluster_name"]
    _clear_provider_cache()
    autoscaler = StandardAutoscaler(
        lambda: copy.deepcopy(prepared),
        LoadMetrics(),
        Mock(),  # of the cluster's head service no node is asked to drain
        process_runner=Ssh(),
        update_interval_s=0,
    )
    head = cluster["provider"]["head_ip"]
    wanted = set(cluster["provider"]["worker_ips"])
    end = time.monotonic() + most
    found: set[str] = set()
    while time.monotonic() < end and found < wanted:
        autoscaler.update()
        time.sleep(0.2)
        provider = autoscaler.provider
        found = set(provider.non_terminated_nodes({})) - {head}
    kinds = autoscaler.provider.node_tags(head)
    assert NODE_KIND_HEAD in kinds.values()
    return found


def test_every_worker_is_taken(on_premise: Cluster) -> None:
    assert taken(on_premise) == set(on_premise["provider"]["worker_ips"])


def test_so_is_an_only_one(on_premise: Cluster) -> None:
    on_premise["provider"]["worker_ips"] = ["192.0.2.11"]
    assert taken(on_premise) == {"192.0.2.11"}


def test_the_head_asks_for_that_autoscaler_whatever_ray_up_says(
    on_premise: Cluster, tmp_path: Path
) -> None:
    ray = tmp_path / "ray"
    ray.write_text('#!/bin/sh\necho "$RAY_enable_autoscaler_v2 ${OMP_NUM_THREADS-unset} $*"\n')
    ray.chmod(0o755)
    # As `ray up` wraps the commands: its own choice, and one thread a process.
    wrapped = with_envs(
        on_premise["head_start_ray_commands"],
        {"RAY_enable_autoscaler_v2": "1", "OMP_NUM_THREADS": "1"},
    )
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    said = subprocess.check_output(["bash", "-c", wrapped[-1]], text=True, env=environment)
    assert said.startswith("0 unset start --head")
