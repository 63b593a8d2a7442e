"""Uncertainty of a score: bootstrap percentile intervals over resampled scenes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from physics.metrics import Matching


def bootstrap_interval(
    statistic: Callable[[Tensor], Tensor],
    n_scenes: int,
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a statistic over scenes resampled with replacement.

    Args:
        statistic: takes indices (R, n_scenes) int64 on the CPU, some resamples at a time, and
            returns (R,); NaN, where it is undefined, is left out.
        n_scenes, n_resamples: number of scenes, and how often that many are drawn.
        level, seed: nominal coverage, and the seed that makes the draws reproducible.

    Raises:
        ValueError: no scenes or resamples, a level outside (0, 1), a statistic of another shape.

    Source: Efron, "Bootstrap methods: another look at the jackknife", Ann. Statist. 7(1), 1979.
    """
    if n_scenes < 1 or n_resamples < 1 or not 0 < level < 1:
        got = f"n_scenes {n_scenes}, n_resamples {n_resamples} and level {level}"
        raise ValueError(f"got {got}; expected at least 1, at least 1 and between 0 and 1")
    generator = torch.Generator().manual_seed(seed)
    n_at_once = max(1, (1 << 22) // n_scenes)  # 32 MiB of indices
    values = []
    for start in range(0, n_resamples, n_at_once):
        shape = (min(n_at_once, n_resamples - start), n_scenes)
        value = statistic(torch.randint(n_scenes, shape, generator=generator))
        if value.shape != shape[:1]:
            got = f"what statistic returned has shape {tuple(value.shape)}"
            raise ValueError(f"{got}; expected {shape[:1]}, a number for each resample")
        values.append(value.detach().cpu().double())
    low, high = np.nanquantile(torch.cat(values).numpy(), [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def f1_interval(
    matching: Matching, minus: Matching | None = None, **options: Any
) -> tuple[float, float]:
    """:func:`bootstrap_interval` of ``matching.f1``, or of ``matching.f1 - minus.f1``.

    The difference is paired: both belong to the same scenes, which are resampled together.
    Raises ValueError where the true counts differ. ``options`` are ``n_resamples``, ``level`` and
    ``seed``.
    """
    if minus is not None and not torch.equal(matching.n_true, minus.n_true):
        got = f"{len(matching)} and {len(minus)} scenes of unlike true counts"
        raise ValueError(f"got {got}; expected the same scenes in the same order")

    def statistic(indices: Tensor) -> Tensor:
        f1 = resampled_f1(matching, indices)
        return f1 if minus is None else f1 - resampled_f1(minus, indices)

    return bootstrap_interval(statistic, len(matching), **options)


def mean_interval(
    values: Tensor, minus: Tensor | None = None, **options: Any
) -> tuple[float, float]:
    """:func:`bootstrap_interval` of the mean of ``values`` (S,), or of its difference.

    The difference from the mean of ``minus`` (S,) is paired: both belong to the same scenes in the
    same order. Raises ValueError where their number differs. ``options`` are as for
    :func:`f1_interval`.
    """
    if minus is not None and minus.shape != values.shape:
        got = f"values of {len(values)} and {len(minus)} scenes"
        raise ValueError(f"got {got}; expected the same scenes in the same order")
    each = (values if minus is None else values - minus).detach().cpu().double()
    return bootstrap_interval(lambda indices: each[indices].mean(-1), len(each), **options)


def resampled_f1(matching: Matching, indices: Tensor) -> Tensor:
    """Pooled F1 (R,) of the scenes in each row of ``indices`` (R, n_scenes) int64."""
    hits, whole = (
        counts[indices].sum(-1)
        for counts in (2 * matching.n_hits, matching.n_found + matching.n_true)
    )
    return torch.where(whole > 0, hits.double() / whole.clamp_min(1), 1.0)
