"""A whole epoch: scenes a second, and where its time goes.

    python -m benchmarks.epoch [--json FILE] [--threads 2] [--config configs/quickstart.yaml]
        [--scenes N] [--set a.b=VALUE]

Trains the study's base configuration for some epochs after a first one, which is told apart: it
finds or reads what is kept between epochs. Then as many again for the shares of the parts: time is
that of the innermost part, so that they add up. On a GPU where there is one; there the device is
waited for at the borders of the parts, and further epochs show what it takes if the host looks at
each step before it asks for the next.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks._roofline import synchronize
from benchmarks._timing import parser, save
from model import Trainer
from model import training as training_module
from model.ahead import ahead_of
from tuner.config import load_study

REST = "rest"
OTHER = "optimizer, clipping and rest of the step"


class Stopwatch:
    """Measures time per part; the time of a nested part is subtracted from the outer one."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._device = device
        self._stack = [REST]
        self._last = time.perf_counter()

    def _note(self) -> None:
        synchronize(self._device)
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._last
        self._last = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the block for a part."""
        self._note()
        self._stack.append(name)
        try:
            yield
        finally:
            self._note()
            self._stack.pop()

    def start(self) -> None:
        """Reset all counts and start."""
        self._note()
        self.seconds.clear()

    def stop(self) -> dict[str, float]:
        """Return the seconds of every part."""
        self._note()
        return dict(self.seconds)

    def watched(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Wrap a call so that its time counts for a part."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return call(*args, **kwargs)

        return run

    def iterated(self, call: Callable[..., Iterator[Any]], name: str) -> Callable[..., Any]:
        """Wrap a call that returns an iterator so that each item's time counts for a part."""

        def run(*args: Any, **kwargs: Any) -> Iterator[Any]:
            items = call(*args, **kwargs)
            while True:
                with self.part(name):
                    try:
                        item = next(items)
                    except StopIteration:
                        return
                yield item

        return run


def watch(trainer: Trainer, watch: Stopwatch) -> None:
    """Instrument the parts of a trainer's epochs."""
    source: Any = trainer.source
    source.train_batches = watch.iterated(source.train_batches, "scenes")
    patched: Any = trainer
    patched._train_step = watch.watched(trainer._train_step, OTHER)
    patched._features = watch.watched(trainer._features, "features")
    patched.network.forward = watch.watched(trainer.network.forward, "network, forward")
    loss: Any = type(trainer.loss)
    loss.__call__ = watch.watched(loss.__call__, "loss, forward")
    patched.amp.backward = watch.watched(trainer.amp.backward, "gradient")
    patched.validate = watch.watched(trainer.validate, "validation, beside the above")
    module: Any = training_module
    module.blended_covariance = watch.watched(module.blended_covariance, "loss, forward")


def main() -> None:
    """Run the benchmark and print the result."""
    arguments = parser(__doc__ or "")
    arguments.set_defaults(rounds=3)
    arguments.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    arguments.add_argument("--set", action="append", default=[], dest="overrides")
    args = arguments.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with TemporaryDirectory(prefix="ristune-") as cache:
        figures = measured(args, Path(cache), device)
    save(figures, args.json, device)


def measured(args: argparse.Namespace, cache: Path, device: torch.device) -> dict[str, Any]:
    """Measure all figures; ``cache`` must be empty, and the first epoch fills it."""
    overrides = [
        f"data.cache={cache}",
        *args.overrides,
        f"training.threads={args.threads}",
        f"training.epochs={3 * args.rounds + 1}",
        "training.patience=null",
    ]
    study = load_study(args.config, overrides)
    trainer = Trainer(study.trial_config({}, study.seed), device)
    first = epoch_seconds(trainer, 1)
    whole = epoch_seconds(trainer, args.rounds)
    figures: dict[str, Any] = {"config": str(args.config), "first_epoch_seconds": first}
    if ahead_of(device):
        trainer._ahead = 0
        figures["epoch_seconds_without_steps_ahead"] = epoch_seconds(trainer, args.rounds)
        trainer._ahead = ahead_of(device)
    stopwatch = Stopwatch(device)
    watch(trainer, stopwatch)
    epochs = []
    for _ in range(args.rounds):
        stopwatch.start()
        trainer.run_epoch()
        epochs.append(stopwatch.stop())
    parts = {
        name: statistics.median(epoch.get(name, 0.0) for epoch in epochs) for name in epochs[0]
    }
    n_scenes = study.data.train_scenes
    print(
        f"{args.config}: {n_scenes} scenes an epoch in batches of {study.training.batch_size}, "
        f"{study.data.val_scenes} to validate, {args.threads} threads on {device}"
    )
    print(f"first epoch {first:.2f} s; then {whole:.2f} s, {n_scenes / whole:.0f} scenes/s")
    if waiting := figures.get("epoch_seconds_without_steps_ahead"):
        print(f"{waiting:.2f} s where the host looks at each step before it asks for the next")
    total = sum(parts.values())
    for name, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"  {name:<44}{seconds:>8.3f} s{seconds / total:>7.1%}")
    return figures | {
        "epoch_seconds": whole,
        "scenes_per_second": n_scenes / whole,
        "share": {name: seconds / total for name, seconds in parts.items()},
    }


def epoch_seconds(trainer: Trainer, rounds: int) -> float:
    """Median seconds of an epoch over some epochs."""
    seconds = []
    for _ in range(rounds):
        synchronize(trainer.device)
        start = time.perf_counter()
        trainer.run_epoch()
        synchronize(trainer.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
