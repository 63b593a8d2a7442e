from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from physics import PlanarArray, SceneConfig, Scenes, nomp, simulate, somp
from physics.channel import complex_normal as draw_normal
from physics.fit import position_of
from physics.nomp import NompConfig
from physics.pursuit import Search, pursuit_grid
from tests.physics.test_fit import ARRAY, MODES, steer
from tests.reference import estimation as reference

STILL = {"new_iterations": 0, "joint_iterations": 0}


def draw(mode: Any, n: int = 6, *, seed: int = 0, **changes: Any) -> tuple[SceneConfig, Scenes]:
    config = SceneConfig(
        **{
            "source_mode": mode,
            "n_antennas": 8,
            "n_snapshots": 6,
            "snr_db": (15.0, 15.0),
            "max_sources": 3,
            "range_m": (0.6, 3.0),
        }
        | changes
    )
    generator = torch.Generator().manual_seed(seed)
    return config, simulate(n, config, ARRAY, generator=generator, dtype=torch.complex128)


def grid_of(config: SceneConfig, oversampling: float = 1.0) -> torch.Tensor:
    """All points (P, 3) azimuth, elevation, range."""
    grid = pursuit_grid(config, ARRAY, oversampling)
    return grid.positions(dtype=torch.float64).reshape(-1, 3)


def search(S: Scenes, config: SceneConfig, **more: Any) -> Any:
    known = {"array": ARRAY, "scene": config, "oversampling": 1.0}
    return somp(S.y, S.H, S.codes, **known | more)


def by_the_reference(
    S: Scenes, item: int, config: SceneConfig, n_picks: int
) -> tuple[list[int], list[float]]:
    points = position_of(grid_of(config)).numpy()
    y, H, codes = (t[item].numpy() for t in (S.y, S.H, S.codes))
    constant = config.source_mode == "constant"
    return reference.greedy_pursuit(
        points, n_picks, y, H, codes, steer(config.wavefront), constant=constant
    )


@pytest.mark.parametrize("wavefront", ["spherical", "paraxial", "planar"])
@pytest.mark.parametrize("mode", MODES)
def test_it_picks_what_the_plain_pursuit_picks(mode: Any, wavefront: Any) -> None:
    config, S = draw(mode, 4, min_sources=2, wavefront=wavefront)
    pursuit = NompConfig(oversampling=1.0, candidates=512, **STILL)
    search = Search(ARRAY, config, pursuit, S.y, S.H, S.codes)
    ((_, measurement, _),) = search.chunks(None, None)
    coordinates, residual = search.points.new_zeros(len(S), 0, 3), measurement.y
    costs = []
    for _ in range(4):
        fit, _ = search.grow(measurement, coordinates, residual)
        coordinates, residual = fit.coordinates, fit.residual
        costs.append(fit.cost / measurement.energy)
    for b in range(len(S)):
        picked, energies = by_the_reference(S, b, config, 4)
        assert torch.equal(coordinates[b], search.points[picked])
        total = float(S.y[b].abs().square().sum())
        np.testing.assert_allclose([float(c[b]) for c in costs], np.array(energies) / total)


def test_it_keeps_as_many_as_the_criterion_says() -> None:
    """BIC by hand: 2 cost / sigma^2 + 5 k log 2 L M, ended by the first pick without a gain."""
    config, S = draw("constant", 12, min_sources=0, snr_db=(0.0, 15.0))
    found = search(S, config, snr_db=S.snr_db).detections
    counts = set()
    for b in range(len(S)):
        picked, energies = by_the_reference(S, b, config, 3)
        energy = float(S.y[b].abs().square().sum())
        level = 10.0 ** (float(S.snr_db[b]) / 10.0)
        noise = energy / 48 / (1.0 + level)
        price = 5 * math.log(2 * 48)
        values = [2 * cost / noise + k * price for k, cost in enumerate([energy, *energies])]
        count = 0
        while count < 3 and values[count + 1] < values[count]:
            count += 1
        counts.add(count)
        here = found.position[b, found.present[b]]
        assert len(here) == count
        expected = grid_of(config)[picked[:count]]
        torch.testing.assert_close(here.sort(dim=0).values, expected.sort(dim=0).values)
    assert len(counts) > 1


@pytest.mark.parametrize("mode", MODES)
def test_amplitudes_are_those_of_least_squares_at_the_first_picks(mode: Any) -> None:
    config, S = draw(mode, 4, min_sources=2)
    result = search(S, config)
    for b in range(len(S)):
        present = result.detections.present[b]
        count = int(present.sum())
        picked, energies = by_the_reference(S, b, config, count)
        here = position_of(result.detections.position[b, present])
        expected = position_of(grid_of(config)[picked])
        order = torch.cdist(here, expected).argmin(dim=-1)
        torch.testing.assert_close(here, expected[order])
        y, H, codes = (t[b].numpy() for t in (S.y, S.H, S.codes))
        G = reference.signals(here.numpy(), H, codes, steer())
        amplitude = result.amplitude[b][:, present].expand(len(G), -1).numpy()
        left = y - np.stack([A @ row for A, row in zip(G, amplitude, strict=True)])
        np.testing.assert_allclose(np.sum(np.abs(left) ** 2), energies[-1])
        strength = np.mean(np.abs(amplitude) ** 2, axis=0)
        assert (np.diff(strength) <= 0).all()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_source_on_the_grid_is_found_exactly(
    mode: Any, known: bool, dtype: torch.dtype, device: torch.device
) -> None:
    config, S = draw(mode, 8, min_sources=1, max_sources=1)
    points = grid_of(config, 3.0)
    position = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(1))[:8]]
    a = torch.stack([torch.from_numpy(steer()(p.numpy())) for p in position_of(position)])
    symbols = draw_normal((8, 6, 1), generator=torch.Generator().manual_seed(2)).to(a.dtype)
    if mode == "constant":
        symbols = symbols[:, :1]
    y = (symbols * a.unsqueeze(1) * S.codes) @ S.H.mT
    noise = draw_normal(y.shape, generator=torch.Generator().manual_seed(3))
    y = y + noise * (1e-3 * y.abs().square().mean((1, 2), keepdim=True).sqrt())
    y, H, codes = (t.to(device, dtype) for t in (y, S.H, S.codes))
    wide = config.model_copy(update={"max_sources": 3})
    snr_db = 60.0 if known else None
    found = somp(y, H, codes, array=ARRAY, scene=wide, snr_db=snr_db).detections
    assert (found.count == 1).all()
    tight = 1e-5 if dtype == torch.complex64 else 1e-12
    torch.testing.assert_close(
        found.position[found.present].cpu().double(), position, rtol=tight, atol=tight
    )
    assert found.covariance is None


def test_a_finer_grid_leaves_less() -> None:
    config, S = draw("fluctuating", 24, min_sources=1, max_sources=1, snr_db=(30.0, 30.0))
    noise = [float(search(S, config, oversampling=o).noise_power.sum()) for o in (1.0, 2.0, 4.0)]
    noise.append(float(nomp(S.y, S.H, S.codes, array=ARRAY, scene=config).noise_power.sum()))
    assert noise == sorted(noise, reverse=True)
    assert noise[0] > 3 * noise[2]


@pytest.mark.parametrize("mode", MODES)
def test_zero_measurements_and_channels_hold_no_source(mode: Any) -> None:
    config, S = draw(mode, 3)
    for y, H in ((0 * S.y, S.H), (S.y, 0 * S.H), (0 * S.y, 0 * S.H)):
        for snr_db in (None, 10.0):
            result = somp(y, H, S.codes, array=ARRAY, scene=config, snr_db=snr_db)
            assert int(result.detections.count.sum()) == 0
            assert torch.isfinite(result.detections.position).all()
            assert torch.isfinite(result.snr_db).all()


@pytest.mark.parametrize("mode", MODES)
def test_noise_alone_holds_no_source(mode: Any) -> None:
    config, S = draw(mode, 40, min_sources=0, max_sources=1)
    noise = draw_normal(S.y.shape, generator=torch.Generator().manual_seed(1))
    found = somp(noise.to(S.y.dtype), S.H, S.codes, array=ARRAY, scene=config).detections
    # The criterion's threshold lets a false alarm through in a few per cent of the scenes.
    assert int(found.count.sum()) <= 4


@pytest.mark.parametrize("mode", MODES)
def test_one_snapshot_or_one_antenna_is_enough_to_answer(mode: Any) -> None:
    for sizes in ({"n_snapshots": 1}, {"n_antennas": 1}, {"n_snapshots": 1, "n_antennas": 1}):
        config, S = draw(mode, 5, **sizes)
        found = search(S, config).detections
        assert torch.isfinite(found.position).all()
        assert int(found.count.max()) <= config.max_sources
    one, S = draw("fluctuating", 4, n_antennas=1)
    assert int(search(S, one).detections.count.max()) == 0


def test_no_scenes_give_no_detections() -> None:
    config, S = draw("fluctuating", 2)
    empty = search(S[slice(0, 0)], config)
    assert len(empty.detections) == 0
    assert empty.snr_db.shape == (0,)


def test_bad_arguments_are_refused() -> None:
    config, S = draw("constant", 3)
    y = S.y.clone()
    y[1, 2, 3] = math.nan
    calls: list[tuple[dict[str, Any], str]] = [
        ({"y": y}, r"y holds 1 non-finite .* \(1, 2, 3\)"),
        ({"array": PlanarArray(5, 5)}, "5 x 5 array"),
        ({"snr_db": torch.zeros(2)}, r"snr_db has shape \(2,\)"),
        ({"snr_db": math.nan}, "snr_db holds NaN"),
        ({"oversampling": 0.0}, "oversampling"),
        ({"criterion": "hqc"}, "criterion"),
    ]
    for change, message in calls:
        known: dict[str, Any] = {
            "y": S.y, "H": S.H, "codes": S.codes, "array": ARRAY, "scene": config,
        } | change  # fmt: skip
        with pytest.raises(ValueError, match=message):
            somp(**known)
