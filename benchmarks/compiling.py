"""Training steps of compiled networks against plain ones, and how long compiling takes.

    python -m benchmarks.compiling [--json FILE] [--threads 1] [--families candidate image snapshot]

Both step on the same batch, alternating. The network is compiled with an empty cache, and again
with the one that TorchInductor has filled, as the next trial of the same sizes finds it.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from typing import Any

import torch

from benchmarks._timing import alternate, median_ratio, parser, save
from model import Trainer, TrialConfig
from model.data import Batch


def built(config: TrialConfig, *, compiled: bool, device: str) -> tuple[Trainer, Batch, float]:
    """A trainer after its first step, with the batch and the seconds of that step."""
    training = config.training.model_copy(update={"compile": compiled})
    trainer = Trainer(config.model_copy(update={"training": training}), device)
    trainer.network.train()
    batch = next(iter(trainer.source.train_batches(0, training.batch_size, 0)))
    begun = time.perf_counter()
    step(trainer, batch)
    return trainer, batch, time.perf_counter() - begun


def step(trainer: Trainer, batch: Batch) -> None:
    """Run one training step to completion."""
    trainer._train_step(trainer._prepared(batch))
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()


def compared(config: TrialConfig, device: str, rounds: int) -> dict[str, float]:
    """Seconds of compiling and of the steps."""
    plain, batch, _ = built(config, compiled=False, device=device)
    _, _, cold = built(config, compiled=True, device=device)
    compiled, _, warm = built(config, compiled=True, device=device)
    seconds = alternate(
        {"plain": lambda: step(plain, batch), "compiled": lambda: step(compiled, batch)}, rounds
    )
    return {
        "compile_seconds": cold,
        "cached_seconds": warm,
        "plain_ms": 1e3 * statistics.median(seconds["plain"]),
        "compiled_ms": 1e3 * statistics.median(seconds["compiled"]),
        "ratio": median_ratio(seconds["plain"], seconds["compiled"]),
    }


def main() -> None:
    """Run the benchmark and print the result."""
    arguments = parser(__doc__ or "")
    arguments.set_defaults(threads=1)
    arguments.add_argument("--families", nargs="+", default=["candidate", "image", "snapshot"])
    args = arguments.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    figures: dict[str, Any] = {"threads": args.threads, "device": device}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        for family in args.families:
            config = TrialConfig.model_validate(
                {
                    "network": {"family": family},
                    "data": {"train_scenes": 64, "val_scenes": 8, "fresh": False, "cache": folder},
                    "training": {"batch_size": 64, "threads": args.threads},
                }
            )
            row = figures[family] = compared(config, device, args.rounds)
            print(
                f"{family}: compiled in {row['compile_seconds']:.1f} s, from the cache in "
                f"{row['cached_seconds']:.1f} s; a step {row['plain_ms']:.1f} and "
                f"{row['compiled_ms']:.1f} ms: {row['ratio']:.2f} x",
                flush=True,
            )
    save(figures, args.json, device)


if __name__ == "__main__":
    main()
