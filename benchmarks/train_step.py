"""Training step: steps a second, memory, AMP, and the loss in factored against dense form.

    python -m benchmarks.train_step [--json FILE] [--threads 2] [--batch 64]

The dense loss computes the same covariance terms with N x N matrices and eigh, differentiated by
autograd; both are timed forward and backward on the same prediction, alternating.
"""

from __future__ import annotations

import math
import platform
import resource
import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks._timing import alternate, median_ratio, parser, save, verdict
from model import Trainer, TrialConfig
from model.blending import blended_covariance
from model.data import Batch
from model.prediction import Prediction
from physics import Scenes, steering_vector

SPEEDUP = 20.0


def dense_loss(
    trainer: Trainer, factor: Tensor, ridge: Tensor, scenes: Scenes, decoys: Tensor
) -> Tensor:
    """The loss's covariance terms from dense (B, N, N) matrices, including R_blend."""
    config, array = trainer.config, trainer.array
    n, beta = array.size, config.blend.beta

    def normalized(R: Tensor) -> Tensor:
        R = 0.5 * (R + R.mH)
        return R * (n / torch.diagonal(R, dim1=-2, dim2=-1).sum(-1).real)[:, None, None]

    def error(R: Tensor) -> Tensor:
        difference = torch.view_as_real(normalized(R) - truth).square().sum((-3, -2, -1))
        return (difference / torch.view_as_real(truth).square().sum((-3, -2, -1))).mean()

    steering = steering_vector(scenes.position, array, config.scene.wavefront)
    weighted = steering * scenes.power.unsqueeze(-1)
    truth = normalized(weighted.mT @ steering.conj())
    predicted = normalized(factor @ factor.mH)
    measured = normalized(ridge.mT @ ridge.conj())
    blended = (1.0 - beta) * predicted + beta * measured
    weights = config.loss.weights("main")
    _, vectors = torch.linalg.eigh(blended)
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


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def losses(trainer: Trainer, batch: Batch, rounds: int) -> dict[str, float]:
    """Seconds of both losses with their gradients, and how far their values differ."""
    scenes, features = batch.scenes, trainer._features(batch)
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
        decoys = loss.draw_decoys("main", torch.Generator().manual_seed(0))
        if dense:
            assert decoys is not None
            total = dense_loss(trainer, factor, features.ridge, scenes, decoys)
        else:
            blended = blended_covariance(p, features, config.blend)
            total = loss(p, blended, scenes, "main", decoys).total
        total.backward()
        synchronize()
        values["dense" if dense else "factored"] = float(total.detach())

    seconds = alternate({"factored": lambda: run(False), "dense": lambda: run(True)}, rounds)
    return {
        "factored_ms": 1e3 * statistics.median(seconds["factored"]),
        "dense_ms": 1e3 * statistics.median(seconds["dense"]),
        "ratio": median_ratio(seconds["dense"], seconds["factored"]),
        "relative_difference": abs(values["dense"] / values["factored"] - 1.0),
    }


def steps(config: TrialConfig, device: str, rounds: int) -> dict[str, Any]:
    """Steps per second of the whole training step, and its peak memory."""
    trainer = Trainer(config, device)
    batch = next(iter(trainer.source.train_batches(0, config.training.batch_size, 0)))
    trainer.network.train()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        trainer._train_step(trainer._prepared(batch))
        synchronize()

    seconds = statistics.median(alternate({"step": step}, rounds)["step"])
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
    """Run the benchmark and print the result."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--batch", type=int, default=64, help="scenes (default: %(default)s)")
    args = arguments.parse_args()
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
            args.rounds,
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
    batch = trainer.source.validation()
    result["loss"] = {}
    # A trial uses one thread by default; the others show the effect of more threads.
    for threads in sorted({1, args.threads}):
        torch.set_num_threads(threads)
        loss = result["loss"][f"{threads} threads"] = losses(trainer, batch, args.rounds)
        print(
            f"loss with gradient, {threads} threads: factored {loss['factored_ms']:.1f} ms, "
            f"dense {loss['dense_ms']:.0f} ms, values differ by {loss['relative_difference']:.0e}; "
            f"{loss['ratio']:.1f} x, target {SPEEDUP:.0f} x: {verdict(loss['ratio'] >= SPEEDUP)}"
        )
    save(result, args.json, device)


if __name__ == "__main__":
    main()
