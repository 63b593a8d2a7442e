"""Every hot function beside what its operations must take on this machine.

    python -m benchmarks.hot [--json FILE] [--threads 2] [--batch 64] [--only NAME]

The machine's launch latency, memory rate by size and arithmetic are measured first, in the same
process; each function's operations are tallied, and `reached` is the least time that they can
take over the time of the call (see benchmarks/_roofline.py). On a GPU where there is one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks._roofline import Machine, synchronize, work_of
from benchmarks._timing import alternate, machine_name, parser, save
from model import Trainer, TrialConfig
from model.blending import blended_covariance, jittered_beta
from physics import (
    CandidateConfig,
    PolarGrid,
    SceneConfig,
    blend,
    find_candidates,
    music_spectrum,
    mvdr_spectrum,
    nomp,
    sample_covariance,
    simulate,
    steering_vector,
    tikhonov_solve,
)
from physics.metrics import gospa, match

Call = Callable[[], object]
_LOADING = 1e-2
_FAMILIES: dict[str, dict[str, Any]] = {
    "candidate": {"family": "candidate", "width": 32, "depth": 1, "heads": 4},
    "image": {"family": "image"},
    "snapshot": {"family": "snapshot"},
}


def physics_calls(batch: int, device: torch.device) -> dict[str, Call]:
    """Calls of the physics on default scenes."""
    scene = SceneConfig()
    array = TrialConfig().array.build()
    generator = torch.Generator(device).manual_seed(0)
    scenes = simulate(batch, scene, array, generator=generator, device=device)
    y, H, codes = scenes.y, scenes.H, scenes.codes
    general = codes * (0.5 + 0.5 * torch.rand(codes.shape, generator=generator, device=device))
    options: dict[str, Any] = {"array": array, "scene": scene, "snr_db": scenes.snr_db}
    found = nomp(y, H, codes, **options).detections
    sources = scenes.position, scenes.present
    R = sample_covariance(y, H, codes)
    truth = scenes.covariance(array, scene.wavefront)
    grid = PolarGrid.covering(scene, 61, 31, 8)
    grid.steering(array)  # cached between calls
    return {
        "simulate": lambda: simulate(batch, scene, array, generator=generator, device=device),
        "steering_vector": lambda: steering_vector(scenes.position, array),
        "tikhonov_solve, unit modulus": lambda: tikhonov_solve(y, H, codes),
        "tikhonov_solve, any codes": lambda: tikhonov_solve(y, H, general),
        "sample_covariance": lambda: sample_covariance(y, H, codes),
        "blend": lambda: blend(R, truth, 0.3),
        "music_spectrum, 61x31x8": lambda: music_spectrum(R, grid, scenes.n_sources, array),
        "mvdr_spectrum, 61x31x8": lambda: mvdr_spectrum(R.loaded(_LOADING), grid, array),
        "nomp": lambda: nomp(y, H, codes, **options),
        "find_candidates": lambda: find_candidates(y, H, codes, **options),
        "find_candidates, two models of the waves": lambda: find_candidates(
            y, H, codes, config=CandidateConfig(waves=("paraxial",)), **options
        ),
        "match": lambda: match(found, *sources),
        "gospa": lambda: gospa(found, *sources),
    }


def training_calls(family: str, batch: int, threads: int, device: torch.device) -> dict[str, Call]:
    """Calls of the parts of a training step of one family, and of the whole step."""
    config = TrialConfig.model_validate(
        {
            "network": _FAMILIES[family],
            "training": {"batch_size": batch, "threads": threads},
            "data": {
                "train_scenes": batch,
                "val_scenes": batch,
                "fresh": False,
                "keep_images": False,  # spectra are a part of the step
            },
        }
    )
    trainer = Trainer(config, device)
    scenes = next(iter(trainer.source.train_batches(0, batch, 0)))
    trainer.network.train()
    features = trainer._features(scenes)
    generator = torch.Generator()

    def loss(gradient: bool) -> None:
        with trainer.amp.autocast():
            prediction = trainer.network(features)
        beta = jittered_beta(batch, config.blend, generator)
        blended = blended_covariance(prediction, features, config.blend, beta)
        decoys = trainer.loss.draw_decoys("main", generator)
        value = trainer.loss(prediction, blended, scenes.scenes, "main", decoys)
        if gradient:
            value.total.backward()

    def forward() -> None:
        with torch.no_grad(), trainer.amp.autocast():
            trainer.network(features)

    return {
        f"{family}: features": lambda: trainer._features(scenes),
        f"{family}: network": forward,
        f"{family}: network and loss, forward": lambda: loss(False),
        f"{family}: network and loss, with gradient": lambda: loss(True),
        f"{family}: training step": lambda: trainer._train_step(trainer._prepared(scenes)),
    }


def measured(call: Call, machine: Machine, device: torch.device, rounds: int) -> dict[str, Any]:
    """Time, work and bound of one call."""

    def run() -> None:
        call()
        synchronize(device)

    seconds = statistics.median(alternate({"call": run}, rounds)["call"])
    work = work_of(call, machine)
    return {
        "median_ms": 1e3 * seconds,
        "n_operations": work.n_operations,
        "traffic_mb": work.n_bytes / 1e6,
        "gflop": work.flops / 1e9,
        "bound": work.bound,
        "least_ms": 1e3 * work.least,
        "reached": work.least / seconds,
    }


def main() -> None:
    """Run the benchmark and print the result."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--batch", type=int, default=64, help="scenes (default: %(default)s)")
    arguments.add_argument("--only", default="", help="functions whose name holds this")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = Machine.measured(device)
    rates = dict(zip(machine.copy_bytes, machine.copy_rates, strict=True))
    print(
        f"{machine_name(device)}, {args.threads} threads, batch {args.batch}: "
        f"launch {1e6 * machine.launch:.2f} us, arithmetic {machine.flops / 1e9:.0f} Gflop/s, "
        f"memory {min(rates.values()) / 1e9:.1f} to {max(rates.values()) / 1e9:.1f} GB/s"
    )
    print(f"{'':<46}{'median':>12}{'operations':>12}{'reached':>9}  bound")
    calls = physics_calls(args.batch, device)
    for family in _FAMILIES:
        calls |= training_calls(family, args.batch, args.threads, device)
    rows = {}
    for name, call in calls.items():
        if args.only in name:
            row = rows[name] = measured(call, machine, device, args.rounds)
            print(
                f"{name:<46}{row['median_ms']:>9.2f} ms{row['n_operations']:>12}"
                f"{row['reached']:>9.0%}  {row['bound']}"
            )
    limits = {
        "launch_us": 1e6 * machine.launch,
        "gflop_per_second": machine.flops / 1e9,
        "gflop_per_second_of_convolutions": machine.convolutions / 1e9,
        "gb_per_second_by_bytes": {size: rate / 1e9 for size, rate in rates.items()},
    }
    save({"limits": limits, "batch": args.batch, "functions": rows}, args.json, device)


if __name__ == "__main__":
    main()
