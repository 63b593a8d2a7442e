"""How far clusters may grow and what they hold, from this repository's own cluster files."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler._private.util import prepare_config

from tests.cluster_files import ROOT, read
from tuner.capacity import Capacity, Growth, Machine
from tuner.cluster import Cluster, trial_resources
from tuner.config import ResourcesConfig
from tuner.errors import StudyError

HEAD = Machine(cpus=4)


def ray_cluster() -> dict[str, Any]:
    """The RayCluster of deploy/kuberay.yaml, as the API server hands it out."""
    text = (ROOT / "deploy" / "kuberay.yaml").read_text(encoding="utf-8")
    (found,) = [m for m in yaml.safe_load_all(text) if m["kind"] == "RayCluster"]
    found["metadata"]["namespace"] = "default"
    return dict(found)


def cluster(head: Machine | None, *workers: Machine, growth: Growth | None = None) -> Cluster:
    return Cluster("the cluster", Capacity(head, workers, growth), None, None)


def given(there: Cluster, trials: int = 100, **wanted: Any) -> tuple[float, int]:
    return trial_resources(there, ResourcesConfig(**wanted), trials)


def test_gpus_that_the_clouds_autoscaler_may_add_are_counted_before_one_is_there() -> None:
    growth = Growth.of(prepare_config(read("cluster.yaml")), n_workers=0)
    there = cluster(HEAD, growth=growth)
    assert (there.n_gpus, there.n_gpus_possible) == (0, 8)
    assert given(there, cpus_per_trial=4) == (1.0, 8)
    assert given(there, gpus_per_trial=0.5, cpus_per_trial=4) == (0.5, 16)
    assert given(there, gpus_per_trial=0, cpus_per_trial=4) == (0, 17)
    assert there.words == "4 CPUs, 0 GPUs now, up to 68 CPUs, 8 GPUs with its autoscaler"


def test_two_kinds_of_workers_share_the_clusters_limit() -> None:
    config = prepare_config(read("cluster.yaml"))
    config["available_node_types"]["gpu-on-demand"]["max_workers"] = 5
    config["available_node_types"]["gpu-on-demand"]["resources"] = {"CPU": 4, "GPU": 4}
    growth = Growth.of(config, n_workers=0)
    assert growth.total(lambda machine: machine.gpus) == 5 * 4 + 3 * 1
    assert growth.total(lambda machine: machine.cpus) == 8 * 8
    assert given(cluster(HEAD, growth=growth), cpus_per_trial=2) == (1.0, 5 * 2 + 3 * 1)


def test_machines_of_ones_own_are_known_when_all_have_joined() -> None:
    config = prepare_config(read("cluster-onprem.yaml"))
    head, worker = Machine(cpus=0), Machine(cpus=8, gpus=2)
    some = cluster(head, worker, growth=Growth.of(config, n_workers=1))
    both = cluster(head, worker, worker, growth=Growth.of(config, n_workers=2))
    assert not some.capacity.known
    assert "what its autoscaler may add is not known" in some.words
    assert both.capacity.known
    assert (both.n_gpus_possible, given(both, cpus_per_trial=2)) == (4, (1.0, 4))
    with pytest.raises(StudyError, match="the largest node with a GPU of the cluster has 8"):
        given(both, cpus_per_trial=9)
    assert given(some, cpus_per_trial=9) == (1.0, 1), "a larger one may come"


def test_the_pods_that_kuberay_may_add_are_counted() -> None:
    growth = Growth.of(_derive_autoscaling_config_from_ray_cr(ray_cluster()), n_workers=0)
    there = cluster(Machine(cpus=0), growth=growth)
    assert (there.n_cpus, there.n_gpus_possible) == (0, 8)
    assert given(there, cpus_per_trial=6) == (1.0, 8)
    with pytest.raises(StudyError, match=r"7 CPUs a trial asked.* node with a GPU .*has 6"):
        given(there, cpus_per_trial=7)


def test_a_kind_without_a_limit_has_the_clusters() -> None:
    config = {
        "head_node_type": "head",
        "max_workers": 6,
        "available_node_types": {
            "head": {"resources": {"CPU": 64, "GPU": 8}},
            "worker": {"resources": {"CPU": 2, "GPU": 1}},
        },
    }
    growth = Growth.of(config, n_workers=0)
    assert growth.total(lambda machine: machine.gpus) == 6
    unlimited = Growth.of({**config, "max_workers": None}, n_workers=0)
    assert unlimited.total(lambda machine: machine.gpus) == math.inf
    assert given(cluster(HEAD, growth=unlimited), trials=7) == (1.0, 7)
    assert Growth.of({}, n_workers=0).total(lambda machine: machine.cpus) == 0


def test_where_nothing_is_known_a_wish_is_taken_at_its_word() -> None:
    there = cluster(HEAD, growth=Growth.unknown())
    assert given(there) == (0.0, 4), "no GPU is known of"
    assert given(there, gpus_per_trial=1) == (1.0, 1)
    assert given(there, gpus_per_trial=1, concurrent=8) == (1.0, 8)
    with pytest.raises(StudyError, match=r"1 GPU a trial asked, but the cluster has 0"):
        given(cluster(HEAD), gpus_per_trial=1)


@pytest.mark.parametrize(
    ("cpus", "gpus", "places"),
    [(1, 0, 8), (3, 0, 2), (9, 0, 0), (1, 1, 2), (1, 0.5, 4), (1, 1 / 3, 6), (3, 0.5, 2)],
)
def test_trials_fill_nodes_and_gpus_without_lying_across_them(
    cpus: int, gpus: float, places: int
) -> None:
    machine = Machine(cpus=8, gpus=2)
    assert machine.places(cpus, gpus) == places
    assert Machine(cpus=99, gpus=4).places(1, 0.4) == 8, "what is left of two GPUs is not a third"
    four = cluster(None, machine, machine, machine, machine)
    if places:
        assert given(four, cpus_per_trial=cpus, gpus_per_trial=gpus) == (gpus, 4 * places)


def test_a_cluster_of_cpus_runs_as_many_trials_as_its_nodes_hold() -> None:
    there = cluster(Machine(cpus=2), Machine(cpus=8), Machine(cpus=7))
    assert given(there) == (0.0, 17)
    assert given(there, cpus_per_trial=3) == (0.0, 4)
    assert given(there, cpus_per_trial=3, trials=3) == (0.0, 3)
    with pytest.raises(StudyError, match="largest node of the cluster has 8"):
        given(there, cpus_per_trial=9)


def test_shares_in_thirds_are_three() -> None:
    assert Machine(cpus=99, gpus=1).places(1, 0.333333) == 3
    assert Machine(cpus=99, gpus=1).places(1, 0.1) == 10
