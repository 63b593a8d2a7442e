"""What an autoscaler may add is found where it is written, and a study makes it add it."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.tuner.clusters import STORE, Head, free_port, ray_head
from tests.tuner.support import environment, read_until, start, write_study
from tuner.config import load_study
from tuner.study import Ledger

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = ip_address("127.0.0.1")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def fake_machines(address: str) -> dict[str, Any]:
    """What `ray up` would leave on the head, of Ray's provider that starts nodes on this one."""
    resources = {"CPU": 1, "GPU": 1, "object_store_memory": STORE}
    return {
        "cluster_name": "fake",
        "max_workers": 2,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "use_node_id_as_ip": True,  # all nodes have this machine's
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "auth": {},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "gpu": {"resources": resources, "node_config": {}, "min_workers": 0, "max_workers": 8},
        },
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }


LOOK = """
import json, ray, sys
from tuner.autoscaling import HEAD
from tuner.cluster import connected
with connected(sys.argv[1]) as cluster:
    found = {
        "head": next(n["NodeID"] for n in ray.nodes() if HEAD in n["Resources"]),
        "grows": cluster.capacity.growth is not None,
        "known": cluster.capacity.known,
    }
    for name in ("n_cpus", "n_gpus", "n_gpus_possible", "words"):
        found[name] = getattr(cluster, name)
print(json.dumps(found))
"""

UNTIL_NO_GPU = """
import ray, sys, time
ray.init(sys.argv[1], log_to_driver=False)
while ray.cluster_resources().get("GPU"):
    time.sleep(0.5)
"""


def looked(address: str) -> dict[str, Any]:
    """What a session finds there, in a process of its own as a session is."""
    command = [sys.executable, "-c", LOOK, address]
    answer = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    return dict(json.loads(answer.stdout))


@pytest.fixture
def kubernetes(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An API server that knows the RayCluster of deploy/kuberay.yaml; what a pod sees of it."""
    text = (ROOT / "deploy" / "kuberay.yaml").read_text(encoding="utf-8")
    (manifest,) = [m for m in yaml.safe_load_all(text) if m["kind"] == "RayCluster"]
    manifest["metadata"]["namespace"] = "research"
    path = "/apis/ray.io/v1/namespaces/research/rayclusters/ristune"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == path else 404)
            self.end_headers()
            self.wfile.write(json.dumps(manifest).encode() if self.path == path else b"{}")

        def log_message(self, *arguments: Any) -> None:
            pass

    key, certificate = write_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT_HTTPS": str(server.server_port),
        # In the place of a service account's token, whose path is fixed.
        "RAY_KUBERAY_CLIENT_CERT_PATH": str(certificate),
        "RAY_KUBERAY_CLIENT_KEY_PATH": str(key),
        "RAY_KUBERAY_CA_CERT_PATH": str(certificate),
        "RAY_CLUSTER_NAMESPACE": "research",
    }
    server.shutdown()
    server.server_close()


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """A key, and a certificate for 127.0.0.1 that it signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kubernetes")])
    now = datetime.now(tz=UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(LOOPBACK)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "tls.key", folder / "tls.crt"
    form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    paths[0].write_bytes(key.private_bytes(serialization.Encoding.PEM, form, none))
    paths[1].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return paths


@pytest.mark.parametrize(("name", "gpus"), [("ristune", 8), ("another", 0)])
def test_the_limits_of_a_cluster_on_kubernetes_are_those_of_its_resource(
    kubernetes: dict[str, str], name: str, gpus: int
) -> None:
    # KubeRay starts the head in this way and lets a container beside it scale.
    with ray_head("--num-cpus=0", "--no-monitor", **kubernetes, RAY_CLUSTER_NAME=name) as head:
        found = looked(head.address)
    assert (found["grows"], found["known"]) == (True, name == "ristune")
    assert (found["n_cpus"], found["n_gpus"], found["n_gpus_possible"]) == (0, 0, gpus)


@pytest.fixture
def growing(tmp_path: Path) -> Iterator[Head]:
    """A head without GPU, whose autoscaler adds up to two nodes with one each."""
    port = free_port()
    config = tmp_path / "bootstrap.yaml"
    config.write_text(json.dumps(fake_machines(f"127.0.0.1:{port}")), encoding="utf-8")
    with ray_head(
        *("--num-cpus=1", f"--autoscaling-config={config}"),
        port=port,
        RAY_enable_autoscaler_v2="0",  # the newer one has no provider for one machine
        AUTOSCALER_UPDATE_INTERVAL_S="1",
        RAY_FAKE_CLUSTER="1",
    ) as head:
        yield head


def test_gpu_nodes_come_for_a_studys_trials_and_go_after_them(
    tmp_path: Path, growing: Head
) -> None:
    config = write_study(
        tmp_path,
        training={"epochs": 60},  # so that the second node comes before the first is done
        data={"train_scenes": 128},
        search={"trials": 4, "scheduler": "none"},
        resources={"device": "cpu"},
    )
    out = tmp_path / "run"
    process = start("--config", config, "--out", out, RAY_ADDRESS=growing.address)
    said = "".join(read_until(process, "side by side", timeout=240))
    assert "1 CPU, 0 GPUs now, up to 3 CPUs, 2 GPUs with its autoscaler" in said
    assert "2 trials side by side, 1 GPU and 1 CPU each" in said
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    ledger = Ledger(out / "study.db", load_study(out / "config.yaml"))
    trials = ledger.trials()
    ledger.close()
    assert [(trial.number, trial.state) for trial in trials] == [(n, "done") for n in range(4)]
    homes = {metrics["node_id"] for trial in trials for metrics in trial.epochs.values()}
    assert len(homes) == 2, "both nodes were used, and the head was not"
    assert looked(growing.address)["head"] not in homes
    # One driver that waits: many that come and go might themselves keep the nodes from idling.
    waiting = [sys.executable, "-c", UNTIL_NO_GPU, growing.address]
    subprocess.run(waiting, cwd=ROOT, env=environment(), check=True, timeout=240)
    after = looked(growing.address)
    assert (after["n_gpus"], after["n_gpus_possible"]) == (0, 2)


def test_a_head_without_autoscaler_has_none_and_one_that_cannot_be_read_is_not_known(
    tmp_path: Path,
) -> None:
    with ray_head("--num-cpus=1") as head:
        assert not looked(head.address)["grows"]
    config = tmp_path / "bootstrap.yaml"
    port = free_port()
    config.write_text(json.dumps(fake_machines(f"127.0.0.1:{port}")), encoding="utf-8")
    with ray_head(
        *("--num-cpus=1", f"--autoscaling-config={config}"),
        port=port,
        RAY_enable_autoscaler_v2="0",
        RAY_FAKE_CLUSTER="1",
    ) as head:
        read = looked(head.address)
        assert (read["grows"], read["known"], read["n_gpus_possible"]) == (True, True, 2)
        config.unlink()
        unread = looked(head.address)
        assert (unread["grows"], unread["known"], unread["n_gpus_possible"]) == (True, False, 0)
        assert "what its autoscaler may add is not known" in unread["words"]
