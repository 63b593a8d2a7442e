from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from physics import PlanarArray, SceneConfig, Scenes, simulate, steering_vector
from tests.physics.helpers import relative_error

ARRAY = PlanarArray(6, 6)
FIELDS = ("y", "H", "codes", "position", "power", "n_sources", "snr_db")


def scenes(
    count: int = 16,
    seed: int = 0,
    array: PlanarArray = ARRAY,
    dtype: torch.dtype = torch.complex64,
    **config: Any,
) -> Scenes:
    return simulate(
        count,
        SceneConfig(**config),
        array,
        generator=torch.Generator().manual_seed(seed),
        dtype=dtype,
    )


def clean(**config: Any) -> Scenes:
    """The same scenes at 300 dB: in complex128 the noise is below the rounding."""
    return scenes(dtype=torch.complex128, **{**config, "snr_db": (300.0, 300.0)})


@pytest.mark.parametrize("mode", ["fluctuating", "constant"])
@pytest.mark.parametrize("snr_db", [-5.0, 12.0])
def test_noise_meets_the_drawn_snr_in_every_scene(mode: str, snr_db: float) -> None:
    settings = {"source_mode": mode, "n_snapshots": 64, "n_antennas": 32}
    noisy = scenes(dtype=torch.complex128, snr_db=(snr_db, snr_db), **settings)
    signal = clean(**settings).y
    noise = noisy.y - signal
    measured = signal.abs().square().mean((-2, -1)) / noise.abs().square().mean((-2, -1))
    # 2048 noise draws: a relative standard deviation of 2.2 %, 0.1 dB; five of them.
    assert (10 * measured.log10() - snr_db).abs().max() < 0.5
    assert torch.equal(noisy.snr_db, torch.full((16,), snr_db, dtype=torch.float64))


def surface_signal(batch: Scenes) -> Tensor:
    """x_l (B, L, N) that explains y without noise, where M >= N."""
    return (
        torch.linalg.lstsq(batch.H.unsqueeze(1), batch.y.unsqueeze(-1)).solution.squeeze(-1)
        / batch.codes
    )


def test_constant_symbols_stay_over_the_sweep_and_fluctuating_ones_do_not() -> None:
    for mode, varies in (("constant", False), ("fluctuating", True)):
        x = surface_signal(clean(source_mode=mode, n_antennas=48))
        spread = (x - x[:, :1]).abs().amax() / x.abs().amax()
        assert bool(spread > 0.1) == varies
        assert varies or spread < 1e-8


def test_measurement_follows_the_signal_model() -> None:
    batch = clean(n_antennas=48, max_sources=3)
    x = surface_signal(batch)
    a = steering_vector(batch.position, ARRAY)
    for b, k in enumerate(batch.n_sources.tolist()):
        q, _ = torch.linalg.qr(a[b, :k].mT)
        assert relative_error((q @ (q.mH @ x[b].mT)).mT, x[b]) < 1e-8


@pytest.mark.parametrize("mode", ["fluctuating", "constant"])
def test_power_model_matches_the_empirical_covariance(mode: str) -> None:
    batch = scenes(
        4, array=PlanarArray(3, 3), dtype=torch.complex128, source_mode=mode, n_snapshots=4000,
        n_antennas=12, snr_db=(300.0, 300.0), max_sources=2, range_m=(0.5, 3.0), code_bits=None,
    )  # fmt: skip
    array = PlanarArray(3, 3)
    x = surface_signal(batch)
    a = steering_vector(batch.position, array)
    coefficients = torch.linalg.lstsq(a.mT, x.mT).solution  # (B, K, L)
    measured = coefficients.abs().square().mean(-1)
    # Mean of 4000 exponential draws: 1.6 % each; constant symbols leave nothing to average.
    tolerance = 0.1 if mode == "fluctuating" else 1e-5
    for b, k in enumerate(batch.n_sources.tolist()):
        assert torch.allclose(measured[b, :k], batch.power[b, :k], rtol=tolerance)
        assert not batch.power[b, k:].any()


def test_amplitude_falls_with_range_to_the_exponent() -> None:
    for exponent in (0.0, 1.0, 2.0):
        batch = scenes(path_loss_exponent=exponent, max_sources=3)
        expected = batch.position[..., 2].pow(-2 * exponent) * batch.present
        assert torch.allclose(batch.power, expected, rtol=1e-5)


def test_scenes_without_sources_hold_unit_noise_and_know_nothing() -> None:
    batch = scenes(64, min_sources=0, max_sources=1)
    silent = batch.n_sources == 0
    assert silent.any()
    assert not silent.all()
    power = batch.y[silent].abs().square().mean()
    count = batch.y[silent].numel()
    assert float(power) == pytest.approx(1.0, abs=5 / count**0.5)
    R = batch[silent].covariance(ARRAY, "spherical")
    assert torch.equal(R.dense(), torch.eye(36, dtype=torch.complex64).expand_as(R.dense()))


@pytest.mark.parametrize(
    ("config", "array"),
    [
        ({"n_snapshots": 1}, ARRAY),
        ({"n_antennas": 1}, ARRAY),
        ({"n_antennas": 1, "n_snapshots": 1, "max_sources": 1}, PlanarArray(1, 1)),
        ({"codebook": "dft", "n_snapshots": 50}, ARRAY),
        ({"codebook": "hadamard"}, PlanarArray(4, 12)),
        ({"range_m": (2.0, 2.0), "snr_db": (0.0, 0.0)}, ARRAY),
    ],
)
def test_edge_configurations_give_finite_scenes(config: dict[str, Any], array: PlanarArray) -> None:
    batch = scenes(8, array=array, **config)
    for name in FIELDS:
        assert torch.isfinite(getattr(batch, name)).all(), name
    assert scenes(0, array=array, **config).y.shape == (0, *batch.y.shape[1:])


@pytest.mark.parametrize(
    "error",
    [
        {"element_jitter": 0.01},
        {"phase_error_deg": 10.0},
        {"amplitude_error_db": 1.0},
        {"dropout": 0.2},
    ],
)
def test_each_hardware_error_changes_the_measurement_and_nothing_else(
    error: dict[str, float],
) -> None:
    nominal, real = scenes(), scenes(**error)
    for name in FIELDS:
        same = torch.equal(getattr(nominal, name), getattr(real, name))
        assert same == (name != "y"), name
    assert torch.isfinite(real.y).all()


def test_hardware_errors_act_on_the_reflection_as_drawn() -> None:
    """With H inverted, amplitude and phase of each element's reflection show their spread."""
    sigma_db, sigma_deg = 1.0, 8.0
    common = {"n_antennas": 48, "max_sources": 1, "source_mode": "constant"}
    ideal = surface_signal(clean(**common))
    real = surface_signal(
        clean(**common, amplitude_error_db=sigma_db, phase_error_deg=sigma_deg, dropout=0.25)
    )
    ratio = (real / ideal)[:, 0]
    alive = ratio.abs() > 1e-3
    # 576 elements: sqrt(.25 * .75 / 576) = 1.8 % and 1 / sqrt(2 * 430) = 3.4 %; four of each.
    assert float(alive.double().mean()) == pytest.approx(0.75, abs=0.075)
    level, phase = 20 * ratio[alive].abs().log10(), ratio[alive].angle().rad2deg()
    assert float(level.std()) == pytest.approx(sigma_db, rel=0.14)
    assert float(phase.std()) == pytest.approx(sigma_deg, rel=0.14)


def test_varied_errors_are_absent_or_have_levels_of_their_own_in_every_scene() -> None:
    """Half of the scenes have none; in the others levels are uniform, each error's by itself."""
    common = {"count": 300, "n_antennas": 48, "max_sources": 1, "source_mode": "constant"}
    ideal = surface_signal(clean(**common))
    errors = {"phase_error_deg": 20.0, "dropout": 0.5}
    real = surface_signal(clean(**common, **errors, error_levels="varied"))
    fixed = surface_signal(clean(**common, **errors))

    def levels(signal: Tensor) -> tuple[Tensor, Tensor]:
        ratio = (signal / ideal)[:, 0]
        alive = ratio.abs() > 1e-3
        phase = torch.where(alive, ratio.angle().rad2deg(), 0.0)
        spread = (phase.square().sum(-1) / alive.sum(-1)).sqrt()
        return spread / 20.0, (~alive).double().mean(-1) / 0.5

    assert float(levels(fixed)[0].std()) < 0.2
    phase, dead = levels(real)
    for level in (phase, dead):
        # 300 scenes: within four times 2.9 %. A dead share below 1 in 144 is none.
        assert float((level < 0.02).double().mean()) == pytest.approx(0.5, abs=0.12)
        for quartile in (0.25, 0.5, 0.75):
            share = 0.5 + 0.5 * quartile
            assert float((level < quartile).double().mean()) == pytest.approx(share, abs=0.11)
    assert abs(float(torch.corrcoef(torch.stack([phase.double(), dead.double()]))[0, 1])) < 0.24
    both = ((phase >= 0.02) & (dead >= 0.02)).double().mean()
    assert float(both) == pytest.approx(0.25, abs=0.1), (
        "one error's absence says nothing of another"
    )


def test_a_share_of_arrays_has_no_error_at_all() -> None:
    common = {"count": 400, "n_antennas": 48, "max_sources": 1, "source_mode": "constant"}
    errors = {"phase_error_deg": 20.0, "element_jitter": 0.02, "error_levels": "varied"}
    errors |= {"true_wavefront": "paraxial", "amplitude_error_db": 1.0}

    def faultless(**more: Any) -> tuple[Tensor, Tensor]:
        """Which arrays have no error, and which scenes have nominal waves too."""
        y = clean(**common, **errors, **more).y
        kinds = [clean(**common, true_wavefront=waves).y for waves in (None, "paraxial")]
        nominal, other = (torch.isclose(y, kind).flatten(1).all(-1) for kind in kinds)
        return nominal | other, nominal

    by_chance, _ = faultless()
    every, nominal = faultless(faultless_share=0.4)
    # Of 400, within four standard deviations: an eighth by chance, and that of the others. Were
    # each error absent by itself, it would be 0.7^3 = 0.34.
    assert float(by_chance.double().mean()) == pytest.approx(0.125, abs=0.067)
    assert float(every.double().mean()) == pytest.approx(0.4 + 0.6 * 0.125, abs=0.1)
    assert float(nominal[every].double().mean()) == pytest.approx(0.5, abs=0.15)
    assert bool(faultless(faultless_share=1.0)[0].all())
    with pytest.raises(ValidationError, match="with error_levels fixed, where all"):
        SceneConfig(phase_error_deg=20.0, faultless_share=0.4)


def test_waves_of_another_model_change_the_measurement_alone() -> None:
    common = {"count": 40, "n_antennas": 48, "max_sources": 1, "source_mode": "constant"}
    common |= {"range_m": (0.5, 2.0)}
    nominal = clean(**common)
    near = clean(**common, true_wavefront="paraxial")
    for name in set(FIELDS) - {"y"}:
        assert torch.equal(getattr(near, name), getattr(nominal, name))
    assert torch.equal(clean(**common, true_wavefront="spherical").y, nominal.y)
    # What arrives at the elements is the paraxial steering vector, up to the source's symbol.
    x = surface_signal(near)[:, 0]
    a = steering_vector(near.position[:, 0], ARRAY, "paraxial").to(x.dtype)
    along = (a.conj() * x).sum(-1).abs().square() / x.abs().square().sum(-1)
    assert float(along.min()) > 1.0 - 1e-6
    assumed = steering_vector(near.position[:, 0], ARRAY, "spherical").to(x.dtype)
    off = (assumed.conj() * x).sum(-1).abs().square() / x.abs().square().sum(-1)
    assert float(off.mean()) < 0.9


def test_varied_errors_leave_half_of_the_scenes_their_nominal_waves() -> None:
    common = {"count": 300, "n_antennas": 48, "max_sources": 1, "source_mode": "constant"}
    errors = {"true_wavefront": "paraxial", "error_levels": "varied"}
    y = {
        "nominal": clean(**common).y,
        "paraxial": clean(**common, true_wavefront="paraxial").y,
        "varied": clean(**common, **errors).y,
    }

    def same(one: str, other: str) -> Tensor:
        return torch.isclose(y[one], y[other]).flatten(1).all(-1)

    assert bool((same("varied", "nominal") ^ same("varied", "paraxial")).all())
    share = same("varied", "nominal").double().mean()
    assert float(share) == pytest.approx(0.5, abs=0.12)  # four standard deviations
    both = clean(**common, **errors, phase_error_deg=20.0)
    alone = clean(**common, error_levels="varied", phase_error_deg=20.0)
    kept = torch.isclose(both.y, alone.y).flatten(1).all(-1).double().mean()
    assert float(kept) == pytest.approx(0.5, abs=0.12), "the other errors are drawn as before"


def test_the_same_seed_gives_the_same_scenes() -> None:
    a, b, c = scenes(seed=3), scenes(seed=3), scenes(seed=4)
    for name in FIELDS:
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert not torch.equal(a.y, c.y)


def test_counts_positions_and_levels_stay_within_their_bounds() -> None:
    config = SceneConfig(min_sources=2, max_sources=4)
    batch = simulate(500, config, ARRAY, generator=torch.Generator().manual_seed(0))
    assert set(batch.n_sources.tolist()) == {2, 3, 4}
    for axis, (low, high) in enumerate((config.azimuth_deg, config.elevation_deg, config.range_m)):
        values = batch.position[batch.present][:, axis]
        values = values if axis == 2 else values.rad2deg()
        assert float(values.min()) >= low - 1e-4
        assert float(values.max()) <= high + 1e-4
    assert float(batch.snr_db.min()) >= -5
    assert float(batch.snr_db.max()) <= 20


def test_complex128_is_complex128_throughout() -> None:
    batch = scenes(dtype=torch.complex128)
    assert {batch.y.dtype, batch.H.dtype, batch.codes.dtype} == {torch.complex128}
    assert {batch.position.dtype, batch.power.dtype, batch.snr_db.dtype} == {torch.float64}


def test_scenes_are_made_on_the_device_that_is_asked_for(device: torch.device) -> None:
    batch = simulate(
        4,
        SceneConfig(dropout=0.1, element_jitter=0.01),
        ARRAY,
        generator=torch.Generator(device).manual_seed(0),
        device=device,
    )
    assert {getattr(batch, name).device.type for name in FIELDS} == {device.type}
    assert {getattr(batch.to("cpu"), name).device.type for name in FIELDS} == {"cpu"}


def test_true_covariance_is_the_sum_of_the_sources_with_trace_n() -> None:
    batch = scenes(6, dtype=torch.complex128)
    R = batch.covariance(ARRAY, "spherical").dense()
    a = steering_vector(batch.position, ARRAY)
    for b in range(6):
        total = torch.zeros(36, 36, dtype=torch.complex128)
        for k in range(int(batch.n_sources[b])):
            total += batch.power[b, k] * torch.outer(a[b, k], a[b, k].conj())
        assert relative_error(R[b], total * (36 / torch.trace(total).real)) < 1e-12


def test_batches_join_and_split_without_change() -> None:
    batch = scenes(6)
    again = Scenes.concatenate([batch[:2], batch[torch.tensor([2, 3, 4, 5])]])
    for name in FIELDS:
        assert torch.equal(getattr(batch, name), getattr(again, name))
    assert len(again) == 6
    with pytest.raises(ValueError, match="at least one"):
        Scenes.concatenate([])


@pytest.mark.parametrize(
    "bad",
    [
        {"snr_db": (5.0, 0.0)},
        {"range_m": (0.0, 1.0)},
        {"range_m": (1.0, float("inf"))},
        {"azimuth_deg": (-100.0, 0.0)},
        {"dropout": 1.0},
        {"code_bits": 0},
        {"n_snapshots": 0},
        {"wavefront": "cubic"},
        {"true_wavefront": "cubic"},
        {"sources": 3},
    ],
)
def test_bad_scene_configuration_is_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        SceneConfig(**bad)


def test_bad_simulation_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="n_scenes is -1"):
        simulate(-1)
    with pytest.raises(ValueError, match="complex64"):
        simulate(1, dtype=torch.float32)
    with pytest.raises(ValidationError, match="min_sources 3"):
        SceneConfig(min_sources=3, max_sources=2)
    with pytest.raises(ValueError, match="Hadamard"):
        simulate(1, SceneConfig(codebook="hadamard"), ARRAY)
