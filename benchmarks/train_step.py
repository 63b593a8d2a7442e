"""Training step: steps a second, memory, AMP, and the loss in factored against dense form.

    python -m benchmarks.train_step [--json FILE] [--threads 2] [--batch 64]

The dense loss computes the same covariance terms with N x N matrices and eigh, differentiated by
autograd; both losses are timed forward and backward on the same prediction, alternating.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import Trainer, TrialConfig
from model.blending import blended_covariance
from model.network import Prediction
from physics import Scenes, steering_vector


def dense_loss(
    trainer: Trainer, blended: Tensor, predicted: Tensor, scenes: Scenes, decoys: Tensor
) -> Tensor:
    """The loss's covariance terms from dense (B, N, N) matrices."""
    config, array = trainer.config, trainer.array
    n = array.size

    def normalized(R: Tensor) -> Tensor:
        R = 0.5 * (R + R.mH)
        return R * (n / torch.diagonal(R, dim1=-2, dim2=-1).sum(-1).real)[:, None, None]

    def error(R: Tensor) -> Tensor:
        difference = torch.view_as_real(normalized(R) - truth).square().sum((-3, -2, -1))
        return (difference / torch.view_as_real(truth).square().sum((-3, -2, -1))).mean()

    steering = steering_vector(scenes.position, array, config.scene.wavefront)
    truth = normalized(scenes.covariance(array, config.scene.wavefront).dense())
    weights = config.loss.weights("main")
    _, vectors = torch.linalg.eigh(normalized(blended))
    order = torch.arange(n, device=blended.device)
    signal = order >= n - scenes.n_sources.unsqueeze(-1)
    subspace = vectors * signal.unsqueeze(-2)
    projector = subspace @ subspace.mH  # (B, N, N)
    present = scenes.present
    basis, s, _ = torch.linalg.svd((steering * present.unsqueeze(-1)).mT, full_matrices=False)
    basis = basis * (s > 1e-6).unsqueeze(-2)
    energy = ((projector @ basis) * basis.conj()).real.sum((-2, -1))
    align = (1.0 - energy / scenes.n_sources.clamp_min(1)).mean()

    def at(vectors: Tensor) -> Tensor:
        return ((vectors.conj() @ projector) * vectors).real.sum(-1) / trainer.loss.temperature

    overlap = (decoys @ steering.mH).abs().square()
    near = ((overlap > 0.5) & present.unsqueeze(-2)).any(-1)
    level = torch.logsumexp(at(decoys).masked_fill(near, -torch.inf), -1, keepdim=True)
    level = level + math.log(trainer.network.dictionary.shape[0] / decoys.shape[0])
    contrast = torch.nn.functional.softplus(level - at(steering))
    contrast = torch.where(present, contrast, 0.0).sum() / present.sum()
    return (
        error(blended)
        + weights["cov_pred"] * error(predicted)
        + weights["subspace_align"] * align
        + weights["peak_contrast"] * contrast
    )


def median_seconds(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each run, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repeats + 1):
        for name, run in runs.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def losses(trainer: Trainer, scenes: Scenes, repeats: int) -> dict[str, float]:
    """Seconds of both losses with their gradients, and how far their values differ."""
    features = trainer._features(scenes, scenes.snr_db)
    with torch.no_grad():
        prediction = trainer.network(features)
    config = trainer.config.model_copy(
        update={"loss": trainer.config.loss.model_copy(update={"existence": 0.0, "position": 0.0})}
    )
    loss = type(trainer.loss)(
        config.loss,
        trainer.array,
        config.scene.wavefront,
        trainer.network.dictionary,
        trainer.network.cell_size,
    )
    values: dict[str, float] = {}

    def run(dense: bool) -> None:
        factor = prediction.factor.clone().requires_grad_()
        p = Prediction(factor, prediction.existence, prediction.log_pointer, prediction.position)
        blended = blended_covariance(p, features, config.blend)
        draw = torch.Generator().manual_seed(0)
        if dense:
            decoys = loss._decoys(draw)
            total = dense_loss(trainer, blended.dense(), p.covariance.dense(), scenes, decoys)
        else:
            total = loss(p, blended, scenes, "main", draw).total
        total.backward()
        values["dense" if dense else "factored"] = float(total.detach())

    seconds = median_seconds({"factored": lambda: run(False), "dense": lambda: run(True)}, repeats)
    return {
        "factored_ms": 1e3 * seconds["factored"],
        "dense_ms": 1e3 * seconds["dense"],
        "ratio": seconds["dense"] / seconds["factored"],
        "relative_difference": abs(values["dense"] / values["factored"] - 1.0),
    }


def steps(config: TrialConfig, device: str, repeats: int) -> dict[str, Any]:
    """Steps a second of the whole training step, and the memory it peaks at."""
    trainer = Trainer(config, device)
    scenes = next(iter(trainer.source.train_batches(0, config.training.batch_size, 0)))
    trainer.network.train()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds({"step": lambda: trainer._train_step(scenes)}, repeats)["step"]
    peak = (
        torch.cuda.max_memory_allocated() / 2**20
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    )
    return {
        "device": device,
        "amp": trainer.amp.name,
        "steps_per_second": 1.0 / seconds,
        "scenes_per_second": config.training.batch_size / seconds,
        "peak_mib": peak,
        "peak_of": "allocator" if device == "cuda" else "process",
    }


def main() -> None:
    """Run the benchmark and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = TrialConfig.model_validate(
        {
            "training": {"batch_size": args.batch, "threads": args.threads},
            "data": {"train_scenes": args.batch, "val_scenes": args.batch},
        }
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    print(f"torch {torch.__version__} on {name}, {args.threads} threads, batch {args.batch}")
    result: dict[str, Any] = {"torch": torch.__version__, "device": name, "batch": args.batch}
    amps = ["off", "bf16"] if device == "cuda" else ["off"]
    result["step"] = []
    for amp in amps:
        row = steps(
            config.model_copy(
                update={"precision": config.precision.model_copy(update={"amp": amp})}
            ),
            device,
            args.repeats,
        )
        result["step"].append(row)
        print(
            f"step, amp {row['amp']:>4}: {row['steps_per_second']:7.2f} steps/s "
            f"{row['scenes_per_second']:8.0f} scenes/s  peak {row['peak_mib']:6.0f} MiB "
            f"({row['peak_of']})"
        )
    if len(result["step"]) == 2:
        gain = result["step"][1]["steps_per_second"] / result["step"][0]["steps_per_second"]
        print(f"AMP: {gain:.2f} x")
    trainer = Trainer(config, device)
    scenes = trainer.source.validation()
    result["loss"] = losses(trainer, scenes, args.repeats)
    loss = result["loss"]
    print(
        f"loss with gradient: factored {loss['factored_ms']:.1f} ms, dense {loss['dense_ms']:.0f} ms:"
        f" {loss['ratio']:.1f} x (target 20), values differ by {loss['relative_difference']:.1e}"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
