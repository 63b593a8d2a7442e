"""R_samp: the ridge solver `auto` against least squares on the augmented matrix.

    python -m benchmarks.sample_covariance [--json FILE]

B=64 scenes, L=16 snapshots, M=16 antennas, N=144 elements, complex64, on the CPU. Prints times,
memory and errors with their targets; a missed target changes no exit status.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks._timing import alternate, median_ratio, parser, peak_bytes, save, verdict
from physics import PlanarArray, random_codes, rician_channel, sample_covariance, tikhonov_solve
from physics.tikhonov import Solver

B, L, M, ARRAY = 64, 16, 16, PlanarArray()
SPEEDUP = {"unit-modulus": 100.0, "general": 30.0}
EXTRA_MB = 25.0
RELATIVE_ERROR = 1e-4


def measurement(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """y, H and codes; general codes have amplitudes of 0.5 to 1."""
    g = torch.Generator().manual_seed(0)
    station = torch.tensor([0.3, 0.1, 30.0]).expand(B, 3)
    H = rician_channel(M, ARRAY, base_station=station, batch=(B,), generator=g)
    codes = random_codes(L, ARRAY, batch=(B,), generator=g)
    if kind == "general":
        codes = codes * (0.5 + 0.5 * torch.rand(codes.shape, generator=g))
    x = torch.randn(B, L, ARRAY.size, generator=g, dtype=torch.complex64)
    return (codes * x) @ H.mT, H, codes


def largest_error(scenes: tuple[Tensor, Tensor, Tensor], solver: Solver) -> float:
    """Largest over the scenes of ||a - a*|| / ||a*||, a* by SVD in complex128."""
    exact, _ = tikhonov_solve(*(t.to(torch.complex128) for t in scenes), solver="svd")
    a, _ = tikhonov_solve(*scenes, solver=solver)
    error = (a - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    return float(error.max())


def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    figures: dict[str, Any] = {}
    print(f"B={B} L={L} M={M} N={ARRAY.size} complex64, {arguments.threads} threads")
    print(f"{'codes':<14}{'solver':<8}{'median':>12}{'extra memory':>15}{'relative error':>16}")
    for kind in SPEEDUP:
        scenes = measurement(kind)
        solvers: tuple[Solver, ...] = ("auto", "lstsq")
        calls = {s: partial(sample_covariance, *scenes, solver=s) for s in solvers}
        seconds = alternate(calls, arguments.rounds)
        row: dict[str, Any] = {"speedup": median_ratio(seconds["lstsq"], seconds["auto"])}
        for solver, call in calls.items():
            row[solver] = {
                "median_ms": 1e3 * statistics.median(seconds[solver]),
                "extra_mb": peak_bytes(call) / 1e6,
                "relative_error": largest_error(scenes, solver),
            }
            print(
                f"{kind:<14}{solver:<8}{row[solver]['median_ms']:>9.2f} ms"
                f"{row[solver]['extra_mb']:>12.1f} MB{row[solver]['relative_error']:>16.1e}"
            )
        figures[kind] = row
    for kind, target in SPEEDUP.items():
        ratio, auto = figures[kind]["speedup"], figures[kind]["auto"]
        print(f"{kind}: {ratio:.0f} times faster, target {target:.0f}: {verdict(ratio >= target)}")
        print(
            f"{kind}: {auto['extra_mb']:.1f} MB more, target under {EXTRA_MB:.0f} MB: "
            f"{verdict(auto['extra_mb'] < EXTRA_MB)}"
        )
        print(
            f"{kind}: relative error {auto['relative_error']:.1e}, target under "
            f"{RELATIVE_ERROR:.0e}: {verdict(auto['relative_error'] < RELATIVE_ERROR)}"
        )
    save(figures, arguments.json)


if __name__ == "__main__":
    main()
