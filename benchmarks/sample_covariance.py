"""R_samp: the ridge solver `auto` against the two N x N forms, and how its cost grows.

    python -m benchmarks.sample_covariance [--json FILE] [--threads 2]

First, for B=64 scenes, L=16 snapshots, M=16 antennas, N=144 elements, complex64, on the CPU: `auto`
against least squares on the augmented matrix (`lstsq`) and against a Cholesky factorisation of the
N x N normal equations (`gram`), and against the operations that every dual form needs: H H^H, the
Cholesky factor of the M x M kernel, two triangular solves and the product with H^H. Then the sizes
grow one at a time, and at N=1,024 the other forms are timed on one scene, since 512 do not fit in
memory.
Prints times, memory and errors with their targets; a missed target changes no exit status.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks._timing import alternate, median_ratio, parser, peak_bytes, save, verdict
from model.memory import keep_freed_memory
from physics import PlanarArray, random_codes, rician_channel, sample_covariance, tikhonov_solve
from physics.tikhonov import Solver

_PER_ROUND = 20  # rounds of the millisecond calls per round of the solvers
SPEEDUP = {"unit-modulus": 150.0, "general": 30.0}
EXTRA_MB = 25.0
RELATIVE_ERROR = 1e-4
OVER_UNAVOIDABLE = 2.0


@dataclass(frozen=True)
class Sizes:
    """B scenes of L snapshots, M antennas and N elements."""

    B: int = 64
    L: int = 16
    M: int = 16
    N: int = 144

    def __str__(self) -> str:
        return f"B={self.B} L={self.L} M={self.M} N={self.N}"


GROWTH = {"B": (64, 128, 256, 512), "L": (16, 32, 64), "M": (16, 32, 64), "N": (144, 400, 1024)}


def measurement(kind: str, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """y, H and codes; general codes have amplitudes of 0.5 to 1."""
    n_scenes, n_snapshots, n_antennas, n_elements = astuple(sizes)
    side = math.isqrt(n_elements)
    array = PlanarArray(n_horizontal=side, n_vertical=side)
    g = torch.Generator().manual_seed(0)
    station = torch.tensor([0.3, 0.1, 30.0]).expand(n_scenes, 3)
    H = rician_channel(n_antennas, array, base_station=station, batch=(n_scenes,), generator=g)
    codes = random_codes(n_snapshots, array, batch=(n_scenes,), generator=g)
    if kind == "general":
        codes = codes * (0.5 + 0.5 * torch.rand(codes.shape, generator=g))
    x = torch.randn(n_scenes, n_snapshots, n_elements, generator=g, dtype=torch.complex64)
    return (codes * x) @ H.mT, H, codes


def unavoidable(y: Tensor, H: Tensor, codes: Tensor) -> Tensor:
    """Only the matrix operations of the dual form with unit-modulus codes."""
    kernel = H @ H.mH
    kernel.diagonal(dim1=-2, dim2=-1).add_(1.0)
    cholesky, _ = torch.linalg.cholesky_ex(kernel)
    z = torch.linalg.solve_triangular(cholesky, y.mT, upper=False)
    z = torch.linalg.solve_triangular(cholesky.mH, z, upper=True)
    return z.mH @ H  # conjugated; the product with the codes would undo that


def largest_error(scenes: tuple[Tensor, Tensor, Tensor], solver: Solver) -> float:
    """Largest ||a - a*|| / ||a*|| over the scenes, with a* by SVD in complex128."""
    y, H, codes = (t.to(torch.complex128) for t in scenes)
    exact, _ = tikhonov_solve(y, H, codes, solver="svd")
    a, _ = tikhonov_solve(*scenes, solver=solver)
    error = (a - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    return float(error.max())


def _ms(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds)


def against_other_forms(kind: str, rounds: int) -> dict[str, Any]:
    """Times, memory and errors of the solvers, with alternating calls."""
    scenes = measurement(kind, Sizes())
    solvers: tuple[Solver, ...] = ("auto", "gram", "lstsq")
    calls: dict[str, Callable[[], object]] = {
        s: partial(sample_covariance, *scenes, solver=s) for s in solvers
    }
    seconds = alternate(calls, rounds)
    row: dict[str, Any] = {
        f"{other}_ratio": median_ratio(seconds[other], seconds["auto"]) for other in solvers[1:]
    }
    if kind == "unit-modulus":
        row |= against_the_unavoidable(scenes, _PER_ROUND * rounds)
    for solver in solvers:
        row[solver] = {
            "median_ms": _ms(seconds[solver]),
            "extra_mb": peak_bytes(calls[solver]) / 1e6,
            "relative_error": largest_error(scenes, solver),
        }
        print(
            f"{kind:<14}{solver:<8}{row[solver]['median_ms']:>9.2f} ms"
            f"{row[solver]['extra_mb']:>12.1f} MB{row[solver]['relative_error']:>16.1e}"
        )
    return row


def against_the_unavoidable(scenes: tuple[Tensor, Tensor, Tensor], rounds: int) -> dict[str, float]:
    """Time of the solution and of its unavoidable part; both take about a millisecond."""
    solve, least = partial(tikhonov_solve, *scenes), partial(unavoidable, *scenes)
    seconds = alternate({"solve": solve, "unavoidable": least}, rounds)
    return {
        "solve_ms": _ms(seconds["solve"]),
        "unavoidable_ms": _ms(seconds["unavoidable"]),
        "of_unavoidable": median_ratio(seconds["solve"], seconds["unavoidable"]),
    }


def growth(rounds: int) -> dict[str, Any]:
    """Time of `auto` as one size grows, with the exponent from the smallest and largest size."""
    figures: dict[str, Any] = {}
    print(f"\n{'auto, unit-modulus codes, from ' + str(Sizes()):<44}{'exponent':>9}")
    for name, values in GROWTH.items():
        scenes = {v: measurement("unit-modulus", replace(Sizes(), **{name: v})) for v in values}
        calls = {str(v): partial(sample_covariance, *scenes[v]) for v in values}
        row = {v: _ms(s) for v, s in alternate(calls, rounds).items()}
        first, last = str(values[0]), str(values[-1])
        exponent = math.log(row[last] / row[first]) / math.log(values[-1] / values[0])
        figures[name] = {"exponent": exponent} | {f"{v}_ms": ms for v, ms in row.items()}
        times = "  ".join(f"{v}: {ms:.1f} ms" for v, ms in row.items())
        print(f"  {name} = {times:<58}{exponent:>6.2f}")
    return figures


def large(rounds: int) -> dict[str, Any]:
    """Times for N=1,024: 512 scenes with `auto`, and one scene with the others."""
    many, one = Sizes(B=512, N=1024), Sizes(B=1, N=1024)
    scenes = measurement("unit-modulus", many)
    figures: dict[str, Any] = {
        "auto_ms": _ms(alternate({"auto": partial(sample_covariance, *scenes)}, rounds)["auto"])
    }
    a_scene = figures["auto_ms"] / many.B
    print(f"\n{many}: auto {figures['auto_ms']:.0f} ms, {a_scene:.3f} ms a scene")
    del scenes
    scenes = measurement("unit-modulus", one)
    others: tuple[Solver, ...] = ("gram", "lstsq")
    calls: dict[str, Callable[[], object]] = {
        s: partial(sample_covariance, *scenes, solver=s) for s in others
    }
    for solver, seconds in alternate(calls, 2).items():
        figures[solver] = {"scene_ms": _ms(seconds), "ratio": _ms(seconds) / a_scene}
        print(f"{one}: {solver} {_ms(seconds):.0f} ms, {_ms(seconds) / a_scene:,.0f} times as long")
    return figures


def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as every training does
    figures: dict[str, Any] = {}
    print(f"{Sizes()} complex64, {arguments.threads} threads")
    print(f"{'codes':<14}{'solver':<8}{'median':>12}{'extra memory':>15}{'relative error':>16}")
    for kind in SPEEDUP:
        figures[kind] = against_other_forms(kind, arguments.rounds)
    for kind, target in SPEEDUP.items():
        row, auto = figures[kind], figures[kind]["auto"]
        for other in ("lstsq", "gram"):
            ratio = row[f"{other}_ratio"]
            print(
                f"{kind}: {ratio:.0f} times faster than {other}, target {target:.0f}: "
                f"{verdict(ratio >= target)}"
            )
        print(
            f"{kind}: {auto['extra_mb']:.1f} MB more, target under {EXTRA_MB:.0f} MB: "
            f"{verdict(auto['extra_mb'] < EXTRA_MB)}"
        )
        print(
            f"{kind}: relative error {auto['relative_error']:.1e}, target under "
            f"{RELATIVE_ERROR:.0e}: {verdict(auto['relative_error'] < RELATIVE_ERROR)}"
        )
        if "of_unavoidable" in row:
            print(
                f"{kind}: the solution takes {row['solve_ms']:.2f} ms, its matrix operations alone "
                f"{row['unavoidable_ms']:.2f} ms: {row['of_unavoidable']:.1f} times, target "
                f"{OVER_UNAVOIDABLE:.0f}: {verdict(row['of_unavoidable'] <= OVER_UNAVOIDABLE)}"
            )
    figures["growth"] = growth(arguments.rounds)
    figures["large"] = large(arguments.rounds)
    save(figures, arguments.json, "cpu")


if __name__ == "__main__":
    main()
