"""Determine where a study's trials run and the resources of each trial."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from model.wording import counted
from tuner.config import StudyConfig
from tuner.errors import StudyError
from tuner.folder import RunFolder
from tuner.local import local_device

if TYPE_CHECKING:
    from tuner.cluster import Cluster


@dataclass(frozen=True)
class Place:
    """A cluster, or this process without one, and a trial's share of its resources."""

    cluster: Cluster | None
    gpus: float
    concurrent: int
    device: str

    @property
    def is_here(self) -> bool:
        """Whether trials run on this machine, so that timings on it apply to them."""
        return self.cluster is None or self.cluster.is_here


def choose_place(study: StudyConfig, cluster: Cluster | None, notes: list[str]) -> Place:
    """Choose GPUs per trial, concurrent trials and the device; append notes on the choice.

    Raises:
        StudyError: the requested resources can never be available.
    """
    return _place_here(study, notes) if cluster is None else _place_on(cluster, study, notes)


def _place_here(study: StudyConfig, notes: list[str]) -> Place:
    cpus = study.resources.cpus_per_trial
    wanted = 0 if study.resources.device == "cpu" else study.resources.gpus_per_trial
    device = local_device(wanted)
    unusable = _unusable_gpu() if device == "cpu" and wanted != 0 else ""
    if wanted and device == "cpu":
        raise StudyError(
            f"resources.gpus_per_trial: {wanted:g} GPU a trial asked, but "
            f"{unusable or 'this machine has none'}; ask for 0 to run the trials on the CPU"
        )
    if device == "cpu":
        threads = counted(cpus or 1, "thread")
        notes.append(f"no GPU is used: trials run on the CPU with {threads} each")
        notes += [unusable] if unusable else []
    else:
        notes.append(f"trials run on {torch.cuda.get_device_name()}, one after another")
    return Place(None, float(device != "cpu"), 1, device)


def _place_on(cluster: Cluster, study: StudyConfig, notes: list[str]) -> Place:
    from tuner.cluster import trial_resources

    resources = study.resources
    gpus, concurrent = trial_resources(cluster, resources, study.search.trials)
    notes.append(
        f"{cluster.description}: {cluster.words}; {counted(concurrent, 'trial')} side by side, "
        f"{gpus:g} GPU and {resources.cpus_per_trial} CPU each"
    )
    if not gpus:
        reason = "by request" if cluster.n_gpus_possible else "there is none"
        if resources.gpus_per_trial is None and not cluster.capacity.known:
            reason = "none is known of; if its autoscaler may add some: --gpus-per-trial 1"
        notes.append(f"no GPU is used ({reason}): trials run on the CPU")
        if cluster.is_here and reason == "there is none" and (unusable := _unusable_gpu()):
            notes.append(unusable)
    elif resources.device == "cpu":
        notes.append("GPUs are held and stay idle (resources.device): trials compute on the CPU")
    if cluster.has_several_nodes and not resources.storage:
        notes.append(
            "the cluster has several nodes, or may have: those that come later must share the run "
            "folder too (NFS), or resources.storage must name what they share (s3://...)"
        )
    if cluster.dashboard:
        token = f" (token: {cluster.token_file})" if cluster.token_file else ""
        notes.append(f"Ray dashboard: {cluster.dashboard}{token}")
    device = "cuda" if gpus and resources.device == "auto" else "cpu"
    return Place(cluster, gpus, concurrent, device)


def _unusable_gpu() -> str:
    """Return a note on a GPU that the driver lists but PyTorch cannot use; else an empty string."""
    if torch.cuda.is_available() or "CUDA_VISIBLE_DEVICES" in os.environ:  # hidden deliberately
        return ""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if listed.returncode or not listed.stdout.startswith("GPU "):
        return ""
    why = (
        "this PyTorch is built without CUDA"
        if torch.version.cuda is None
        else "its driver has to be 580 or newer (nvidia-smi says which it is)"
    )
    return f"nvidia-smi lists a GPU that PyTorch cannot use: {why}"


def check_place(study: StudyConfig, folder: RunFolder, place: Place) -> None:
    """Check that every node of a cluster sees the checkpoint storage and the data.

    Raises:
        StudyError: some nodes do not.
    """
    if place.cluster is None:
        return
    from tuner.checkpoints import Storage
    from tuner.reach import check_data_reach, check_reach

    cpus = study.resources.cpus_per_trial or 1
    check_reach(Storage.of(folder, study.resources), cpus, place.gpus)
    if study.data.shards is not None:
        check_data_reach(study.data.shards, cpus, place.gpus)
