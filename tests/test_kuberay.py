"""deploy/kuberay.yaml and its image, checked without a Kubernetes: a list, written by hand, of the
fields of Kubernetes and KubeRay (v1) that are used; the rules of KubeRay's operator; and what the
file promises in its comments. Each check is shown to fail on a broken file."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import typer
import yaml
from jsonschema import Draft202012Validator
from ray.scripts.scripts import start as ray_start

from tuner.command import usage_problem
from tuner.run import app

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
IN_IMAGE = PurePosixPath("/home/ray/ristune")

Manifest = dict[str, Any]
Files = dict[str, Manifest]  # by kind


class KubeError(AssertionError):
    """What is wrong with a manifest."""


# --- Structure: of the definitions, the fields that are used, and no others -------------


def record(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object with these fields alone: Kubernetes drops a misspelt one without a word."""
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


def many(item: dict[str, Any], least: int = 1) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": least}


TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
FLAG: dict[str, Any] = {"type": "boolean"}
TEXTS: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "string"}}
LABEL: dict[str, Any] = {"type": "string", "pattern": r"^[a-z]([-a-z0-9]*[a-z0-9])?$"}
# KubeRay appends to names; 47 characters are what it allows a RayJob.
METADATA = record({"name": LABEL | {"maxLength": 47}})
QUANTITY: dict[str, Any] = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|[kMGT]i?)?$"}
AMOUNTS: dict[str, Any] = {"type": "object", "additionalProperties": QUANTITY}
RESOURCES = record({"requests": AMOUNTS, "limits": AMOUNTS})
CONFINED = record(
    {
        "allowPrivilegeEscalation": {"const": False},
        "capabilities": record({"drop": {"const": ["ALL"]}}),
        "runAsNonRoot": {"const": True},
        "seccompProfile": record({"type": {"const": "RuntimeDefault"}}),
    }
)
CONTAINER = record(
    {"name": LABEL, "image": TEXT, "resources": RESOURCES, "securityContext": CONFINED},
    {
        "ports": many(record({"name": LABEL, "containerPort": COUNT})),
        "volumeMounts": many(record({"name": LABEL, "mountPath": TEXT})),
        "env": many(record({"name": TEXT, "value": TEXT})),
    },
)
POD = record(
    {
        "spec": record(
            {
                # The operator refuses others beside autoscaler v2.
                "restartPolicy": {"const": "Never"},
                "securityContext": record({"runAsUser": COUNT, "fsGroup": COUNT}),
                "containers": many(CONTAINER),
            },
            {
                "volumes": many(
                    record({"name": LABEL, "persistentVolumeClaim": record({"claimName": LABEL})})
                ),
                "nodeSelector": TEXTS,
                "tolerations": many(record({"key": TEXT, "operator": TEXT, "effect": TEXT})),
            },
        )
    }
)
STRUCTURE = {
    "PersistentVolumeClaim": record(
        {
            "apiVersion": {"const": "v1"},
            "kind": TEXT,
            "metadata": METADATA,
            "spec": record(
                {
                    "accessModes": {"const": ["ReadWriteMany"]},
                    "resources": record({"requests": record({"storage": QUANTITY})}),
                },
                {"storageClassName": TEXT},
            ),
        }
    ),
    "RayCluster": record(
        {
            "apiVersion": {"const": "ray.io/v1"},
            "kind": TEXT,
            "metadata": METADATA,
            "spec": record(
                {
                    "rayVersion": TEXT,
                    "authOptions": record({"mode": {"const": "token"}}),
                    "enableInTreeAutoscaling": {"const": True},
                    "autoscalerOptions": record(
                        {
                            "version": {"enum": ["v1", "v2"]},
                            "idleTimeoutSeconds": COUNT,
                            "resources": RESOURCES,
                            "securityContext": CONFINED,
                        }
                    ),
                    "headGroupSpec": record({"rayStartParams": TEXTS, "template": POD}),
                    "workerGroupSpecs": many(
                        record(
                            {
                                "groupName": LABEL,
                                "replicas": COUNT,
                                "minReplicas": COUNT,
                                "maxReplicas": COUNT,
                                "rayStartParams": TEXTS,
                                "template": POD,
                            }
                        )
                    ),
                }
            ),
        }
    ),
    "RayJob": record(
        {
            "apiVersion": {"const": "ray.io/v1"},
            "kind": TEXT,
            "metadata": METADATA,
            "spec": record(
                {
                    "clusterSelector": record({"ray.io/cluster": LABEL}),
                    # No resources for it: Ray would run it on a worker, not on the head.
                    "entrypoint": TEXT,
                    "backoffLimit": {"const": 0},
                    "submissionMode": {"enum": ["K8sJobMode", "HTTPMode"]},
                    "submitterPodTemplate": POD,
                }
            ),
        }
    ),
}


def check_structure(files: Files) -> None:
    """Kinds, fields and types."""
    if set(files) != set(STRUCTURE):
        raise KubeError(f"kinds are {sorted(files)}; expected {sorted(STRUCTURE)}")
    for kind, manifest in files.items():
        for error in Draft202012Validator(STRUCTURE[kind]).iter_errors(manifest):
            raise KubeError(f"{kind} {error.json_path}: {error.message}")


# --- Rules ------------------------------------------------------------------------------


def groups(files: Files) -> Iterator[tuple[str, Manifest]]:
    """The groups of the cluster: name, and what it holds."""
    spec = files["RayCluster"]["spec"]
    yield "head", spec["headGroupSpec"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group


def pods(files: Files) -> Iterator[tuple[str, Manifest]]:
    """Every pod that is described."""
    for name, group in groups(files):
        yield name, group["template"]["spec"]
    yield "submitter", files["RayJob"]["spec"]["submitterPodTemplate"]["spec"]


def check_resources(files: Files) -> None:
    """Every container has CPU and memory, as much as it may use; workers have a GPU each."""
    owners = [(f"{name} {c['name']}", c) for name, pod in pods(files) for c in pod["containers"]]
    owners.append(("autoscaler", files["RayCluster"]["spec"]["autoscalerOptions"]))
    for name, owner in owners:
        requests, limits = owner["resources"]["requests"], owner["resources"]["limits"]
        if requests != limits or not {"cpu", "memory"} <= set(limits):
            raise KubeError(f"{name}: requests and limits must name the same cpu and memory")
    for name, group in groups(files):
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        gpus = int(limits.get("nvidia.com/gpu", "0"))
        if (gpus == 0) != (name == "head"):
            raise KubeError(f"{name}: {gpus} GPUs; workers have some and the head has none")


def check_scaling(files: Files) -> None:
    """Workers come from zero, within their bounds; flags of ray start exist."""
    known = {option for parameter in ray_start.params for option in parameter.opts}
    for name, group in groups(files):
        unknown = {f"--{key}" for key in group["rayStartParams"]} - known
        if unknown:
            raise KubeError(f"{name}: this Ray's start has no {sorted(unknown)}")
        if name == "head":
            if group["rayStartParams"].get("num-cpus") != "0":
                raise KubeError('the head must say num-cpus: "0", or trials come to rest on it')
        elif not 0 == group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
            raise KubeError(f"{name}: replicas must lie between minReplicas 0 and maxReplicas")


def check_volumes(files: Files) -> None:
    """Every mount names a volume, every volume a claim, and the cluster's pods share one."""
    claim = files["PersistentVolumeClaim"]["metadata"]["name"]
    for name, pod in pods(files):
        volumes = {v["name"]: v["persistentVolumeClaim"] for v in pod.get("volumes", [])}
        for container in pod["containers"]:
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in volumes:
                    raise KubeError(f"{name}: mounts {mount['name']}, which is no volume")
        if any(volume["claimName"] != claim for volume in volumes.values()):
            raise KubeError(f"{name}: claims a volume that is not {claim}")
    mounted = [g["template"]["spec"]["containers"][0].get("volumeMounts") for _, g in groups(files)]
    if not mounted[0] or any(mounts != mounted[0] for mounts in mounted):
        raise KubeError("head and workers must mount the runs at the same place")


def pinned_ray() -> str:
    """The version in constraints.txt."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    (version,) = re.findall(r"(?m)^ray==(\S+)$", text)
    return str(version)


def check_versions(files: Files) -> None:
    """One image, and in it the Ray that is pinned."""
    images = {container["image"] for _, pod in pods(files) for container in pod["containers"]}
    if len(images) != 1:
        raise KubeError(f"pods have several images: {sorted(images)}")
    tag = images.pop().rpartition(":")[2]
    said = {"rayVersion": files["RayCluster"]["spec"]["rayVersion"]}
    said["the image's tag"] = tag.removeprefix("ray-")
    for what, version in said.items():
        if version != pinned_ray():
            raise KubeError(f"{what} is {version}; constraints.txt has {pinned_ray()}")


def check_job(files: Files) -> None:
    """The job finds its cluster and runs a command of this project, on files that exist."""
    spec = files["RayJob"]["spec"]
    if spec["clusterSelector"]["ray.io/cluster"] != files["RayCluster"]["metadata"]["name"]:
        raise KubeError("clusterSelector names no cluster of this file")
    python, flag, module, *arguments = shlex.split(spec["entrypoint"])
    if (python, flag, module) != ("python", "-m", "tuner.run"):
        raise KubeError(f"entrypoint runs {module}; expected python -m tuner.run")
    try:
        given = typer.main.get_command(app).make_context("run", arguments).params
    except Exception as error:
        if problem := usage_problem(error):
            raise KubeError(f"entrypoint: {problem}") from error
        raise
    if given["address"] != "auto":
        raise KubeError("entrypoint must say --address auto")
    if not (ROOT / PurePosixPath(given["config"]).relative_to(IN_IMAGE)).is_file():
        raise KubeError(f"entrypoint: the image has no {given['config']}")
    worker = files["RayCluster"]["spec"]["workerGroupSpecs"][0]
    container = worker["template"]["spec"]["containers"][0]
    (mount,) = container["volumeMounts"]
    if not PurePosixPath(given["out"]).is_relative_to(mount["mountPath"]):
        raise KubeError(f"--out {given['out']}: not on the shared volume")
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    if given["concurrent"] * given["gpus_per_trial"] > worker["maxReplicas"] * gpus:
        raise KubeError(f"--concurrent {given['concurrent']}: more than the GPUs that may come")


def check(files: Files) -> None:
    for one in (check_structure, check_resources, check_scaling, check_volumes, check_versions):
        one(files)
    check_job(files)


def read(text: str) -> Files:
    """The manifests by kind; anchors are resolved into copies, as kubectl does."""
    manifests = [yaml.safe_load(yaml.dump(m, Dumper=Plain)) for m in yaml.safe_load_all(text)]
    return {manifest["kind"]: manifest for manifest in manifests}


class Plain(yaml.SafeDumper):
    """Writes what anchors share twice, so that a test can damage one of both."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


@pytest.fixture
def files() -> Files:
    return read((ROOT / "deploy" / "kuberay.yaml").read_text(encoding="utf-8"))


def test_the_manifests_pass_every_check(files: Files) -> None:
    check(files)


def test_the_image_is_made_of_the_pinned_ray_and_the_sources() -> None:
    (base,) = re.findall(r"(?m)^FROM (\S+)$", DOCKERFILE)
    assert base == f"rayproject/ray:{pinned_ray()}-py312"
    assert f"WORKDIR {IN_IMAGE}" in DOCKERFILE
    sources = [
        name
        for line in re.findall(r"(?m)^COPY --chown=ray:users (.*)$", DOCKERFILE)
        for name in line.split()[:-1]
    ]
    assert {"physics", "model", "tuner", "configs", "pyproject.toml", "README.md"} <= set(sources)
    assert all((ROOT / name).exists() for name in sources)
    assert "-c constraints.txt ." in DOCKERFILE
    assert f"ristune:ray-{pinned_ray()} ." in DOCKERFILE


def test_the_builder_is_sent_what_the_image_copies() -> None:
    sent = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert sent[sent.index("*") :]
    copied = re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = {name for line in copied for name in line.split()}
    assert {"pyproject.toml", "tuner"} <= sources
    assert sources == {line[1:] for line in sent if line.startswith("!")}


def test_lines_to_edit_are_marked() -> None:
    lines = (ROOT / "deploy" / "kuberay.yaml").read_text(encoding="utf-8").splitlines()
    marked = [line for line in lines if re.search(r"# EDIT\b", line)]
    assert len(marked) == 6
    assert sum("registry.example.com" in line for line in marked) == 2


# --- Each check catches what it is there for --------------------------------------------


def head_of(f: Files) -> Manifest:
    group: Manifest = f["RayCluster"]["spec"]["headGroupSpec"]
    return group


def worker_of(f: Files) -> Manifest:
    group: Manifest = f["RayCluster"]["spec"]["workerGroupSpecs"][0]
    return group


def container_of(group: Manifest) -> Manifest:
    container: Manifest = group["template"]["spec"]["containers"][0]
    return container


def old_version(f: Files) -> None:
    f["RayCluster"]["apiVersion"] = "ray.io/v1alpha1"


def job_missing(f: Files) -> None:
    del f["RayJob"]


def name_of_no_host(f: Files) -> None:
    f["RayJob"]["metadata"]["name"] = "Ristune_full"


def misspelt_field(f: Files) -> None:
    worker_of(f)["minReplica"] = worker_of(f).pop("minReplicas")


def number_for_a_flag(f: Files) -> None:
    head_of(f)["rayStartParams"]["num-cpus"] = 0


def flag_that_does_not_exist(f: Files) -> None:
    worker_of(f)["rayStartParams"]["num-gpu"] = "1"


def cpus_on_the_head(f: Files) -> None:
    del head_of(f)["rayStartParams"]["num-cpus"]


def no_resources(f: Files) -> None:
    del container_of(worker_of(f))["resources"]


def no_memory_limit(f: Files) -> None:
    del container_of(head_of(f))["resources"]["limits"]["memory"]


def worker_without_gpu(f: Files) -> None:
    for amounts in container_of(worker_of(f))["resources"].values():
        del amounts["nvidia.com/gpu"]


def always_a_worker(f: Files) -> None:
    worker_of(f)["minReplicas"] = worker_of(f)["replicas"] = 1


def root_allowed(f: Files) -> None:
    del container_of(worker_of(f))["securityContext"]["runAsNonRoot"]


def open_to_all(f: Files) -> None:
    f["RayCluster"]["spec"]["authOptions"]["mode"] = "disabled"


def mount_of_nothing(f: Files) -> None:
    container_of(worker_of(f))["volumeMounts"][0]["name"] = "run"


def claim_of_nothing(f: Files) -> None:
    head_of(f)["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] = "runs"


def volume_for_one_node(f: Files) -> None:
    f["PersistentVolumeClaim"]["spec"]["accessModes"] = ["ReadWriteOnce"]


def runs_elsewhere(f: Files) -> None:
    container_of(head_of(f))["volumeMounts"][0]["mountPath"] = "/runs"


def another_ray(f: Files) -> None:
    f["RayCluster"]["spec"]["rayVersion"] = "2.59.0"


def one_image_forgotten(f: Files) -> None:
    container_of(worker_of(f))["image"] = "registry.example.com/ristune:ray-2.59.0"


def cluster_of_another(f: Files) -> None:
    f["RayJob"]["spec"]["clusterSelector"]["ray.io/cluster"] = "risotune"


def cluster_shut_down_by_the_job(f: Files) -> None:
    f["RayJob"]["spec"]["shutdownAfterJobFinishes"] = True


def search_on_a_worker(f: Files) -> None:
    f["RayJob"]["spec"]["entrypointNumCpus"] = 1


def entrypoint(old: str, new: str) -> Callable[[Files], None]:
    def damage(f: Files) -> None:
        command = f["RayJob"]["spec"]["entrypoint"]
        assert old in command
        f["RayJob"]["spec"]["entrypoint"] = command.replace(old, new)

    return damage


BROKEN: list[tuple[Callable[[Files], None], str]] = [
    (old_version, "ray.io/v1"),
    (job_missing, "kinds are"),
    (name_of_no_host, "Ristune_full"),
    (misspelt_field, "minReplica"),
    (number_for_a_flag, "num-cpus"),
    (flag_that_does_not_exist, "--num-gpu"),
    (cpus_on_the_head, "come to rest on it"),
    (no_resources, "resources"),
    (no_memory_limit, "cpu and memory"),
    (worker_without_gpu, "0 GPUs"),
    (always_a_worker, "minReplicas 0"),
    (root_allowed, "runAsNonRoot"),
    (open_to_all, "token"),
    (mount_of_nothing, "which is no volume"),
    (claim_of_nothing, "not ristune-runs"),
    (volume_for_one_node, "ReadWriteMany"),
    (runs_elsewhere, "the same place"),
    (another_ray, "rayVersion is 2.59.0"),
    (one_image_forgotten, "several images"),
    (cluster_of_another, "names no cluster"),
    (cluster_shut_down_by_the_job, "shutdownAfterJobFinishes"),
    (search_on_a_worker, "entrypointNumCpus"),
    (entrypoint("tuner.run", "tuner.train"), "expected python -m tuner.run"),
    (entrypoint("--concurrent", "--concurent"), "--concurent"),
    (entrypoint("--concurrent 8", "--concurrent many"), "valid integer"),
    (entrypoint("--concurrent 8", "--concurrent 9"), "more than the GPUs"),
    (entrypoint("--address auto", ""), "--address auto"),
    (entrypoint("full.yaml", "fool.yaml"), "fool.yaml"),
    (entrypoint("/mnt/ristune/runs", "/tmp/runs"), "not on the shared volume"),
]


@pytest.mark.parametrize(("damage", "names"), BROKEN, ids=[names for _, names in BROKEN])
def test_a_broken_manifest_is_caught(
    files: Files, damage: Callable[[Files], None], names: str
) -> None:
    damage(files)
    with pytest.raises(KubeError, match=re.escape(names)):
        check(files)
