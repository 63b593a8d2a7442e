"""Estimate a study's time and disk use from a few steps of its base configuration."""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from model.config import TrialConfig
from model.data import count_scenes, open_source
from model.network import build_network
from tuner.config import SearchConfig, StudyConfig
from tuner.errors import ConfigError
from tuner.rungs import rungs_of
from tuner.space import Value
from tuner.trial import TrialRun

LIMIT = 10.0  # seconds that a measurement may take
_SCENES = (16, 128)  # scenes measured: first a few, then more if time permits
_VALIDATED = 4  # one in this many scenes is a validation scene
# Contents of a checkpoint: weights, their average, the best average, and AdamW's two moments, 4
# bytes each.
_COPIES, _BYTES = 5, 4
_SEARCHED = (4, 24)  # training scenes, and as many for validation, where candidates are searched


@dataclass(frozen=True)
class Appraisal:
    """Measurements on this machine with the study's base configuration."""

    epoch_seconds: float
    search_seconds: float  # one-time candidate search over all scenes; 0 if not needed
    cache_bytes: int  # of those candidates


class _TooLong(BaseException):
    """Raised at the time limit; not an Exception, as a trial would report that as its failure."""


def appraise(study: StudyConfig, device: str) -> Appraisal | str:
    """Run two short epochs in this process and extrapolate; leave no files behind.

    Args:
        study: the study whose base configuration is run, on fewer scenes.
        device: the torch device.

    Returns:
        The appraisal, or the reason why there is none, in one line.
    """
    config = study.trial_config({}, study.seed)
    threads = torch.get_num_threads()
    found: Appraisal | str = f"two epochs of a few scenes take longer than {LIMIT:g} s here"
    begun = time.perf_counter()
    try:
        with _limited(LIMIT), tempfile.TemporaryDirectory(prefix="ristune-") as folder:
            few, more = _SCENES if config.network.front_end is None else _SEARCHED
            found, seconds = _measure(config, device, Path(folder) / "few", few)
            if seconds * more / few < LIMIT - (time.perf_counter() - begun):
                found, _ = _measure(config, device, Path(folder) / "more", more)
        return found
    except _TooLong:
        return found
    except (RuntimeError, ValueError, OSError) as error:
        return " ".join(str(error).split())[:200]
    finally:
        torch.set_num_threads(threads)


def _measure(
    config: TrialConfig, device: str, folder: Path, n_scenes: int
) -> tuple[Appraisal, float]:
    """Return an appraisal from ``n_scenes`` scenes and the seconds that scale with their number."""
    searched = config.network.front_end is not None
    data, training, counts = config.data, config.training, count_scenes(config)
    if device == "cpu":
        torch.set_num_threads(training.threads)  # as a trial does when it builds its network
    n_train = min(counts.epoch, n_scenes)
    n_val = min(counts.validation, n_scenes if searched else n_scenes // _VALIDATED)
    changes = {
        "train_scenes": n_train,
        "val_scenes": n_val,
        "cache": folder / "kept",
        "keep_images": False,  # with shards, images of all scenes would be computed
        # The one-time candidate search is timed separately; only the first epoch includes it.
        "fresh": data.fresh and not searched,
    }
    batch = min(training.batch_size, n_train)
    sample = config.model_copy(
        update={
            "data": data.model_copy(update=changes),
            "training": training.model_copy(update={"batch_size": batch}),
        }
    )
    search_seconds, cache_bytes = 0.0, 0
    begun = time.perf_counter()
    if searched:
        search_seconds, cache_bytes = _search(sample, config, device)
    searching = time.perf_counter() - begun
    run = TrialRun(sample, device)
    try:
        for _ in range(2):  # the first one builds and warms up
            begun = time.perf_counter()
            result = run.step()
            seconds = time.perf_counter() - begun
            if result["failed"]:
                raise RuntimeError(result["reason"])
            if result["finished"]:
                break
    finally:
        run.close()
    per_train = 1.0 / result["scenes_per_second"]
    per_val = max(0.0, seconds - n_train * per_train) / n_val
    found = Appraisal(
        epoch_seconds=counts.epoch * per_train + counts.validation * per_val,
        search_seconds=search_seconds,
        cache_bytes=cache_bytes,
    )
    return found, searching + 2 * seconds


def _search(sample: TrialConfig, config: TrialConfig, device: str) -> tuple[float, int]:
    """Return the seconds and bytes for all candidates that the study's trials share."""
    begun = time.perf_counter()
    source = open_source(sample, torch.device(device))
    source.validation()
    for _ in source.train_batches(0, sample.training.batch_size, sample.seed):
        pass
    seconds = time.perf_counter() - begun
    assert sample.data.cache is not None
    few, all_of_them = count_scenes(sample), count_scenes(config)
    fresh = config.data.fresh and config.data.shards is None
    epochs = config.training.epochs if fresh else 1
    n_found = few.train + few.validation
    share = (all_of_them.train * epochs + all_of_them.validation) / n_found
    return seconds * share, round(_size(sample.data.cache) * share)


def epochs_expected(search: SearchConfig, epochs: int) -> tuple[float, float]:
    """Return mean epochs per trial if the scheduler stops all trials it may, and if it stops none.

    ASHA promotes one trial in `reduction_factor` past a rung; the first trials at a rung, which
    have no others to be compared with, and ties increase this share. For other schedulers only the
    upper bound is known.
    """
    if search.scheduler == "pbt":  # a successor trains what is left of a budget
        each = search.population * epochs / search.population_trials(epochs)
        return each, each
    rungs = rungs_of(search, epochs) if search.scheduler in ("asha", "asha-pausing") else []
    fewest, share, last = 0.0, 1.0, 0
    for rung in [*rungs, epochs]:
        fewest += share * (rung - last)
        share, last = share / search.reduction_factor, rung
    if search.who_stops is None or (rungs and not search.least_chance):
        return fewest, float(epochs)
    return float(min(search.grace_epochs, epochs)), float(epochs)


def checkpoint_bytes(study: StudyConfig) -> tuple[int, int]:
    """Return checkpoint sizes of the base network and of the largest network in the space."""
    point: dict[str, Value] = {}
    for path, parameter in study.search.space.items():
        sizes = [v for v in parameter.probes() if isinstance(v, int) and not isinstance(v, bool)]
        if path.startswith("network.") and sizes:
            point[path] = max(sizes)
    base = _parameters(study.trial_config({}, study.seed))
    try:
        largest = max(base, _parameters(study.trial_config(point, study.seed)))
    except ConfigError:  # the largest values are mutually incompatible
        largest = base
    return base * _COPIES * _BYTES, largest * _COPIES * _BYTES


def _parameters(config: TrialConfig) -> int:
    network = build_network(config.network, config.scene, config.array.build())
    return sum(parameter.numel() for parameter in network.parameters())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise ``_TooLong`` in the block at the time limit (main thread only: it uses a signal)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
