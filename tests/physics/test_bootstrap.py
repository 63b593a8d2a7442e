"""Percentile intervals: against the binomial, loops and what pairing must show."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from physics.bootstrap import bootstrap_interval, f1_interval, mean_interval, resampled_f1
from physics.metrics import Matching


def test_bootstrap_of_a_share_has_the_width_of_the_binomial() -> None:
    n, share, n_resamples = 1000, 0.3, 4000
    values = (torch.arange(n) < share * n).double()
    std = math.sqrt(share * (1 - share) / n)
    for level, z in ((0.95, 1.960), (0.6827, 1.0)):
        low, high = bootstrap_interval(
            lambda i: values[i].mean(-1), n, n_resamples=n_resamples, level=level
        )
        # Standard error of a quantile of R draws: sqrt(q (1 - q) / R) / phi(z), in units of std;
        # four of them, and the share moves in steps of 1 / n.
        q, phi = 0.5 - level / 2, math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        slack = 4 * math.sqrt(q * (1 - q) / n_resamples) / phi * std + 1 / n
        assert low == pytest.approx(share - z * std, abs=slack)
        assert high == pytest.approx(share + z * std, abs=slack)


def test_bootstrap_follows_its_seed_and_draws_in_parts_that_fit_in_memory() -> None:
    shapes = []

    def statistic(indices: Tensor) -> Tensor:
        shapes.append(tuple(indices.shape))
        assert indices.dtype == torch.int64
        assert int(indices.min()) >= 0
        assert int(indices.max()) < 50_000
        return indices.double().mean(-1)

    first = bootstrap_interval(statistic, 50_000, n_resamples=100)
    assert sum(rows for rows, _ in shapes) == 100
    assert {n for _, n in shapes} == {50_000}
    assert 1 < len(shapes) < 10
    assert max(rows for rows, _ in shapes) * 50_000 <= 1 << 22
    assert bootstrap_interval(statistic, 50_000, n_resamples=100) == first
    assert bootstrap_interval(statistic, 50_000, n_resamples=100, seed=1) != first


def test_bootstrap_leaves_undefined_resamples_out_and_refuses_nonsense() -> None:
    values = torch.arange(10.0)

    def statistic(indices: Tensor) -> Tensor:
        mean = values[indices].mean(-1)
        return torch.where(mean > 4.5, mean, torch.nan)

    low, high = bootstrap_interval(statistic, 10)
    assert 4.5 < low < high
    assert bootstrap_interval(lambda i: torch.full(i.shape[:1], 0.25), 5) == (0.25, 0.25)
    for options in ({"n_scenes": 0}, {"n_resamples": 0}, {"level": 1.0}, {"level": 0.0}):
        with pytest.raises(ValueError, match="expected at least 1"):
            bootstrap_interval(statistic, **({"n_scenes": 10} | options))
    with pytest.raises(ValueError, match="statistic returned"):
        bootstrap_interval(lambda i: i, 10)


def counts(hits: Tensor, n_found: Tensor, n_true: Tensor) -> Matching:
    return Matching(torch.full((len(hits), 1), -1), hits, n_found, n_true)


def drawn_counts(n: int, rate: float, seed: int) -> Matching:
    generator = torch.Generator().manual_seed(seed)
    n_true = torch.randint(0, 5, (n,), generator=torch.Generator().manual_seed(99))
    hits = torch.binomial(n_true.float(), torch.full((n,), rate), generator=generator).long()
    return counts(hits, hits + torch.randint(0, 2, (n,), generator=generator), n_true)


def test_f1_of_resampled_scenes_is_that_of_the_scenes_taken() -> None:
    matching = drawn_counts(30, 0.7, seed=0)
    indices = torch.randint(30, (6, 30), generator=torch.Generator().manual_seed(1))
    for row, value in zip(indices, resampled_f1(matching, indices), strict=True):
        assert float(value) == pytest.approx(matching[row].f1)
    nothing = counts(*(torch.zeros(4, dtype=torch.int64),) * 3)
    assert resampled_f1(nothing, torch.zeros(2, 4, dtype=torch.int64)).tolist() == [1.0, 1.0]


def test_f1_interval_holds_the_f1_and_shrinks_with_the_scenes() -> None:
    few, many_scenes = (f1_interval(drawn_counts(n, 0.7, seed=2)) for n in (50, 5000))
    matching = drawn_counts(5000, 0.7, seed=2)
    assert many_scenes[0] < matching.f1 < many_scenes[1]
    # A hundredfold of scenes makes it ten times as narrow.
    assert (few[1] - few[0]) / (many_scenes[1] - many_scenes[0]) == pytest.approx(10, rel=0.4)
    narrow = f1_interval(matching, level=0.5, n_resamples=500, seed=3)
    assert narrow[1] - narrow[0] < many_scenes[1] - many_scenes[0]
    with pytest.raises(ValueError, match="n_scenes 0"):
        f1_interval(matching[:0])


def test_a_paired_difference_sees_what_two_intervals_hide() -> None:
    worse = drawn_counts(400, 0.6, seed=4)
    gain = torch.zeros(400, dtype=torch.int64)
    gain[::16] = 1  # one more hit in every sixteenth scene, where there is room
    gain = torch.minimum(gain, worse.n_true - worse.n_hits)
    better = counts(worse.n_hits + gain, worse.n_found + gain, worse.n_true)
    low, high = f1_interval(better, worse)
    assert 0 < low < better.f1 - worse.f1 < high
    assert f1_interval(better)[0] < f1_interval(worse)[1]
    assert f1_interval(worse, worse) == (0.0, 0.0)
    negative = f1_interval(worse, better)
    assert negative == pytest.approx((-high, -low))
    for other in (worse[:399], worse[torch.arange(400).flip(0)]):
        with pytest.raises(ValueError, match="same scenes in the same order"):
            f1_interval(worse, other)


def test_the_interval_of_a_mean_is_that_of_the_normal_and_pairing_narrows_a_difference() -> None:
    generator = torch.Generator().manual_seed(3)
    scene = torch.randn(2000, generator=generator, dtype=torch.float64)
    one, two = (scene + 0.1 * torch.randn(2000, generator=generator) for _ in range(2))
    low, high = mean_interval(one, n_resamples=4000)
    half = 1.96 * float(one.std()) / math.sqrt(2000)
    assert (low, high) == pytest.approx(
        (float(one.mean()) - half, float(one.mean()) + half), abs=half / 8
    )
    low, high = mean_interval(one, two + 1.0, n_resamples=4000)
    half = 1.96 * float((one - two).std()) / math.sqrt(2000)
    middle = float((one - two).mean()) - 1.0
    assert (low, high) == pytest.approx((middle - half, middle + half), abs=half / 8)
    with pytest.raises(ValueError, match="2000 and 3 scenes"):
        mean_interval(one, two[:3])
