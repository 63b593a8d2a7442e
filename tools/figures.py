"""Draws the figures of docs/concepts/, each computed by the code that it explains.

python -m tools.figures [--out docs/images] [--scenes 512] [--points 161] [--only NAME]
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState, create_trial
from torch import Tensor

from model import Localizer
from model.blending import blended_covariance
from physics import (
    BlendConfig,
    PlanarArray,
    PolarGrid,
    SceneConfig,
    Scenes,
    dft_codebook,
    from_cartesian,
    mvdr_spectrum,
    nmse,
    quantize,
    sample_covariance,
    simulate,
    steering_vector,
    to_cartesian,
)
from physics.steering import Wavefront
from tuner.config import load_study
from tuner.rungs import rungs_of
from tuner.stopping import Halving

ROOT = Path(__file__).resolve().parent.parent
CURVES = ROOT / "benchmarks" / "data" / "curves.json.gz"
SEED = 7

# Colours that most people can tell apart (Okabe and Ito), on white.
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#777777"
STYLE: Any = {
    "figure.facecolor": "white",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "grid.alpha": 0.3,
    "image.cmap": "viridis",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "ristune",  # the same figure gives the same file
}


def scenes_of(count: int, **changes: Any) -> tuple[Scenes, PlanarArray, SceneConfig]:
    """Simulated scenes of the default convention, with changed settings."""
    config, array = SceneConfig().model_copy(update=changes), PlanarArray()
    scenes = simulate(count, config, array, generator=torch.Generator().manual_seed(SEED))
    return scenes, array, config


def at(azimuth_deg: float, elevation_deg: float, range_m: float) -> Tensor:
    """A position (3,)."""
    angles = math.radians(azimuth_deg), math.radians(elevation_deg)
    return torch.tensor([*angles, range_m], dtype=torch.float64)


def geometry(n_scenes: int, n_points: int) -> Figure:
    """The surface and a scene of five sources, from above and from the side."""
    del n_scenes, n_points
    scenes, array, config = scenes_of(1, min_sources=5, max_sources=5)
    points = to_cartesian(scenes.position[0])  # (K, 3) x, y, z
    azimuth, elevation, range_m = scenes.position[0].unbind(-1)
    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    views = (
        ("x [m]", 0, config.azimuth_deg, "from above"),
        ("y [m]", 1, config.elevation_deg, "from the side"),
    )
    axes = figure.subplots(1, 2, sharex=True)
    for axis, (label, across, bounds, title) in zip(axes, views, strict=True):
        elements = array.elements[:, across].unique()
        axis.plot([0.0] * len(elements), elements, "s", color=GREY, ms=3, label="elements")
        for bound in bounds:
            reach = config.range_m[1] * torch.tensor([0.0, 1.0])
            slope = math.tan(math.radians(bound))
            axis.plot(reach, reach * slope, color=GREY, lw=0.8, ls=":")
        axis.plot(points[:, 2], points[:, across], "o", color=ORANGE, label="sources")
        for k, (depth, offset) in enumerate(points[:, [2, across]].tolist()):
            axis.annotate(str(k + 1), (depth, offset), (4, 4), textcoords="offset points")
        axis.set(xlabel="z, boresight [m]", ylabel=label, title=title, xlim=(-0.4, 10.2))
        axis.set_ylim(-10, 10) if across == 0 else axis.set_ylim(-6, 6)
    named = zip(azimuth.tolist(), elevation.tolist(), range_m.tolist(), strict=True)
    rows = [
        f"{k}: {math.degrees(a):+.0f}°, {math.degrees(e):+.0f}°, {r:.1f} m"
        for k, (a, e, r) in enumerate(named, start=1)
    ]
    axes[0].legend(loc="upper left")
    figure.supxlabel("azimuth, elevation, range   " + "   ".join(rows), fontsize=8)
    return figure


def wavefronts(n_scenes: int, n_points: int) -> Figure:
    """Overlap of each model's steering vector with the exact one, by range."""
    del n_scenes
    array, config = PlanarArray(), SceneConfig()
    near, far = config.range_m
    ranges = torch.logspace(math.log10(near), math.log10(50 * far), n_points, dtype=torch.float64)
    angles = PolarGrid.covering(config, 13, 7, 1).positions(dtype=torch.float64)[..., 0, :2]
    position = torch.cat(
        [
            angles.reshape(-1, 1, 2).expand(-1, n_points, 2),
            ranges[:, None].expand(len(angles.reshape(-1, 2)), n_points, 1),
        ],
        dim=-1,
    )
    exact = steering_vector(position, array)
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    models: tuple[tuple[Wavefront, str], ...]
    models = (("fresnel", GREEN), ("paraxial", BLUE), ("planar", ORANGE))
    for model, colour in models:
        overlap = (steering_vector(position, array, model).conj() * exact).sum(-1).abs().square()
        axis.plot(ranges, overlap.mean(0), color=colour, label=model)
    axis.axvspan(near, far, color=GREY, alpha=0.12, lw=0)
    axis.set(
        xscale="log", ylim=(0, 1.02), xlabel="range [m]", ylabel="overlap with the exact vector"
    )
    axis.legend(loc="center right")
    return figure


def focus(n_scenes: int, n_points: int) -> Figure:
    """Power of a surface focused on a point, and of one steered to the point's direction."""
    del n_scenes
    array = PlanarArray()
    depth = torch.linspace(0.25, 10.0, n_points, dtype=torch.float64)
    across = torch.linspace(-3.0, 3.0, n_points, dtype=torch.float64)
    z, x = torch.meshgrid(depth, across, indexing="ij")
    field = steering_vector(from_cartesian(torch.stack([x, torch.zeros_like(x), z], -1)), array)
    target = at(20.0, 0.0, 2.5)
    figure = Figure(figsize=(8.0, 3.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    panels = (
        ("spherical: focused at 2.5 m", steering_vector(target, array, "spherical")),
        ("planar: steered to 20°", steering_vector(target, array, "planar")),
    )
    for axis, (title, code) in zip(axes, panels, strict=True):
        power = (field.conj() @ code).abs().square()
        level = 10.0 * power.clamp_min(1e-4).log10()
        mesh = axis.pcolormesh(z, x, level, vmin=-25, vmax=0, rasterized=True, shading="nearest")
        place = to_cartesian(target)
        axis.plot(place[2], place[0], "o", mec="white", mfc="none", ms=9, mew=1.6)
        axis.grid(visible=False)
        axis.set(xlabel="z, boresight [m]", title=title)
    axes[0].set_ylabel("x [m]")
    figure.colorbar(mesh, ax=axes, label="[dB]")
    return figure


def codebook(n_scenes: int, n_points: int) -> Figure:
    """Beams of one code with phases of one bit, of three bits, and continuous."""
    del n_scenes
    array = PlanarArray()
    azimuth = torch.linspace(-90, 90, 4 * n_points + 1, dtype=torch.float64)
    far = torch.full_like(azimuth, math.inf)
    position = torch.stack([azimuth.deg2rad(), torch.zeros_like(far), far], -1)
    a = steering_vector(position, array)  # (G, N)
    code = dft_codebook(array, torch.complex128)[2]  # spatial frequency 2/12: 19.5 degrees
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    for bits, colour in ((1, ORANGE), (3, BLUE), (None, GREY)):
        used = code if bits is None else quantize(code, bits)
        gain = (a @ used).abs().square() / array.size
        name = "continuous" if bits is None else f"{bits} bit" + "s" * (bits > 1)
        style = "--" if bits is None else "-"
        axis.plot(azimuth, 10 * gain.clamp_min(1e-6).log10(), style, color=colour, label=name)
    axis.set(xlabel="azimuth [°]", ylabel="gain of the best [dB]", ylim=(-40, 2), xlim=(-90, 90))
    axis.legend(loc="upper left")
    return figure


def filter_factors(n_scenes: int, n_points: int) -> Figure:
    """Fraction of each singular direction that a ridge solution keeps."""
    scenes, array, _ = scenes_of(n_scenes)
    phi = scenes.H * scenes.codes[:, :1]  # (B, M, N), of the first snapshot
    values = torch.linalg.svdvals(phi.to(torch.complex128))
    mean = values.square().sum(-1, keepdim=True) / array.size  # tr(Phi^H Phi)/N
    relative = (values / mean.sqrt()).flatten()
    axis_values = torch.logspace(-3, 1.5, n_points, dtype=torch.float64)
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    for regularization, colour in ((1e-1, ORANGE), (1e-3, BLUE), (1e-6, GREEN)):
        kept = axis_values**2 / (axis_values**2 + regularization)
        axis.plot(axis_values, kept, color=colour, label=rf"$\lambda$ = {regularization:g}")
    axis.set(xscale="log", xlabel=r"singular value $s\,/\sqrt{tr(\Phi^H\Phi)/N}$", ylim=(0, 1.02))
    axis.set_ylabel(r"filter factor $s^2/(s^2+\alpha)$")
    held = axis.twinx()
    held.hist(relative.numpy(), bins=torch.logspace(-3, 1.5, 60).tolist(), color=GREY, alpha=0.35)
    held.set(yticks=[], zorder=0)
    held.spines["right"].set_visible(False)
    axis.set(zorder=1, facecolor="none")
    axis.legend(loc=(0.01, 0.06), title=f"grey: {n_scenes} channels")
    return figure


def spectrum(n_scenes: int, n_points: int) -> Figure:
    """The MVDR spectrum of R_samp and of R_blend, and the true sources."""
    del n_scenes
    scenes, array, config = scenes_of(1, min_sources=3, max_sources=3, snr_db=(15.0, 15.0))
    localizer = Localizer.shipped()
    _, blended, _ = localizer.predict(scenes.y, scenes.H, scenes.codes, scenes.known_snr_db)
    grid = PolarGrid.covering(config, n_points, max(n_points // 2, 2), max(n_points // 10, 2))
    extent = (*config.azimuth_deg, *config.elevation_deg)
    figure = Figure(figsize=(8.0, 3.0), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    panels = (
        ("$R_{samp}$", sample_covariance(scenes.y, scenes.H, scenes.codes)),
        ("$R_{blend}$, the shipped network's", blended),
    )
    for axis, (title, covariance) in zip(axes, panels, strict=True):
        level = mvdr_spectrum(covariance, grid, array)[0].amax(-1)  # highest over range
        image = 10.0 * (level / level.max()).log10().mT
        drawn = axis.imshow(image, origin="lower", extent=extent, aspect="auto", vmin=-15, vmax=0)
        true = torch.rad2deg(scenes.position[0, :, :2])
        axis.plot(true[:, 0], true[:, 1], "o", mec="white", mfc="none", ms=10, mew=1.6)
        axis.grid(visible=False)
        axis.set(xlabel="azimuth [°]", title=title)
    axes[0].set_ylabel("elevation [°]")
    figure.colorbar(drawn, ax=axes, label="[dB]")
    return figure


@torch.no_grad()
def blending(n_scenes: int, n_points: int) -> Figure:
    """NMSE of R_blend over beta, with and without hardware errors."""
    localizer = Localizer.shipped()
    betas = torch.linspace(0.0, 1.0, min(n_points, 21)).tolist()
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    trained = localizer.config.scene
    kinds = ((SceneConfig(), "ideal hardware", BLUE), (trained, "hardware errors", ORANGE))
    for config, name, colour in kinds:
        changes = config.model_dump()
        scenes, array, _ = scenes_of(n_scenes, **changes)
        errors: list[Tensor] = []
        for start in range(0, n_scenes, 64):
            part = scenes[slice(start, start + 64)]
            prediction, _, features = localizer.predict(
                part.y, part.H, part.codes, part.known_snr_db
            )
            truth = part.covariance(array, config.wavefront)
            blends = (
                blended_covariance(prediction, features, BlendConfig(beta=beta, jitter=0.0))
                for beta in betas
            )
            errors.append(torch.stack([nmse(blended, truth) for blended in blends]))
        mean = torch.cat(errors, dim=1).double().mean(1)
        axis.plot(betas, 10.0 * mean.log10(), color=colour, label=name)
    axis.axvline(localizer.config.blend.beta, color=GREY, lw=1, ls=":")
    axis.set(xlabel=r"$\beta$, weight of $R_{samp}$", ylabel="NMSE of $R_{blend}$ [dB]")
    axis.set(xlim=(0, 1))
    axis.legend(loc="upper left")
    return figure


def rungs(n_scenes: int, n_points: int) -> Figure:
    """Recorded learning curves, and where successive halving would have stopped each."""
    del n_scenes, n_points
    recorded = json.loads(gzip.decompress(CURVES.read_bytes()))
    epochs = recorded["study"]["epochs"]
    wanted = {"search__grace_epochs": 1, "search__reduction_factor": 3, "training__epochs": epochs}
    study = load_study(None, search__scheduler="asha", **wanted)
    rule, trained = Halving(study), list[FrozenTrial]()
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axis = figure.subplots()
    for number, curve in enumerate(curves_of(recorded)):
        values: dict[int, float] = {}
        for epoch, value in enumerate(curve, start=1):
            values[epoch] = value
            if rule.stops(number, epoch, values, lambda: trained):
                break
        trained.append(create_trial(state=TrialState.PRUNED, intermediate_values=values))
        axis.plot(range(1, epochs + 1), curve, color=GREY, lw=0.6, alpha=0.5)
        _run(axis, list(values), list(values.values()), len(values) < epochs)
    for rung in rungs_of(study.search, epochs):
        axis.axvline(rung, color=GREY, lw=1, ls=":")
    axis.plot([], [], color=BLUE, label="trained")
    axis.plot([], [], "x", color=ORANGE, label="stopped")
    axis.plot([], [], color=GREY, lw=0.6, label="what it would have become")
    every = [value for curve in curves_of(recorded) for value in curve]
    middle = float(torch.tensor([curve[0] for curve in curves_of(recorded)]).quantile(0.8))
    axis.set_ylim(min(every) - 0.01, middle + 0.02)  # a few start far above
    axis.set(xscale="log", xlabel="epoch (dotted: rungs)", ylabel="objective: GOSPA [m]")
    axis.set_xticks([1, 3, 9, 27], labels=["1", "3", "9", "27"])
    axis.set_xticks([], minor=True)
    axis.legend()
    return figure


def _run(axis: Axes, steps: list[int], values: list[float], stopped: bool) -> None:
    axis.plot(steps, values, color=BLUE, lw=1.3)
    if stopped:
        axis.plot(steps[-1:], values[-1:], "x", color=ORANGE, ms=7)


def curves_of(recorded: dict[str, Any]) -> list[list[float]]:
    """The best objective so far of every recorded trial, by epoch."""
    return [trial["objective"] for trial in recorded["trials"]]


FIGURES: dict[str, Callable[[int, int], Figure]] = {
    "geometry.svg": geometry,
    "wavefronts.svg": wavefronts,
    "focus.png": focus,
    "codebook.svg": codebook,
    "filter-factors.svg": filter_factors,
    "spectrum.png": spectrum,
    "blending.svg": blending,
    "rungs.svg": rungs,
}


def draw(folder: Path, n_scenes: int, n_points: int, only: str | None = None) -> list[Path]:
    """Write the figures.

    Args:
        folder: output folder.
        n_scenes: number of scenes for averages.
        n_points: number of points along an axis.
        only: name of one figure; None draws all.

    Returns:
        The files written.
    """
    written = []
    with mpl.rc_context(STYLE):
        for name, make in FIGURES.items():
            if only in (None, name):
                path = folder / name
                date: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
                make(n_scenes, n_points).savefig(path, dpi=130, metadata=date)
                written.append(path)
    return written


def main() -> None:
    """Draw the requested figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--scenes", type=int, default=512)
    parser.add_argument("--points", type=int, default=161)
    parser.add_argument("--only", choices=FIGURES)
    args = parser.parse_args()
    for path in draw(args.out, args.scenes, args.points, args.only):
        print(path)


if __name__ == "__main__":
    main()
