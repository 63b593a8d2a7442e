from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from physics import (
    PlanarArray,
    SceneConfig,
    Scenes,
    crb,
    nomp,
    scene_crb,
    simulate,
    steering_vector,
)
from physics.fit import normal_equations, position_of
from tests.physics.test_fit import ARRAY, MODES, measured, scenes, steer
from tests.reference import estimation as reference

WAVEFRONTS: list[Any] = ["spherical", "fresnel", "paraxial", "planar"]


def amplitudes(S: Scenes, mode: Any) -> Tensor:
    return normal_equations(measured(S, mode), position_of(S.position))[0].amplitude


@pytest.mark.parametrize("wavefront", WAVEFRONTS[:3])
@pytest.mark.parametrize("mode", MODES)
def test_deterministic_bound_matches_finite_difference_information(
    mode: Any, wavefront: Any
) -> None:
    S = scenes(mode)
    amplitude, noise = amplitudes(S, mode), torch.linspace(0.1, 2.0, len(S), dtype=torch.float64)
    found = crb(
        S.position,
        S.H,
        S.codes,
        noise,
        amplitude=amplitude,
        array=ARRAY,
        wavefront=wavefront,
        source_mode=mode,
    )
    for b in range(len(S)):
        coordinates = position_of(S.position[b]).numpy()
        information = reference.deterministic_information(
            coordinates,
            amplitude[b].numpy(),
            float(noise[b]),
            S.H[b].numpy(),
            S.codes[b].numpy(),
            steer(wavefront),
            constant=mode == "constant",
        )
        for k, block in enumerate(reference.bound(information, coordinates)):
            assert np.allclose(found[b, k].numpy(), block, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("wavefront", WAVEFRONTS[:3])
@pytest.mark.parametrize("mode", MODES)
def test_stochastic_bound_matches_finite_difference_information(mode: Any, wavefront: Any) -> None:
    S = scenes(mode)
    noise = torch.linspace(0.01, 0.2, len(S), dtype=torch.float64)
    found = crb(
        S.position,
        S.H,
        S.codes,
        noise,
        source_power=S.power,
        array=ARRAY,
        wavefront=wavefront,
        source_mode=mode,
    )
    for b in range(len(S)):
        coordinates = position_of(S.position[b]).numpy()
        information = reference.stochastic_information(
            coordinates,
            S.power[b].numpy(),
            float(noise[b]),
            S.H[b].numpy(),
            S.codes[b].numpy(),
            steer(wavefront),
            constant=mode == "constant",
        )
        for k, block in enumerate(reference.bound(information, coordinates)):
            assert np.allclose(found[b, k].numpy(), block, rtol=1e-3, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_bounds_scale_with_noise_and_ignore_common_scales(mode: Any) -> None:
    S = scenes(mode)
    amplitude = amplitudes(S, mode)
    noise = torch.full((len(S),), 0.3, dtype=torch.float64)

    def bound(H: Tensor, noise: Tensor) -> Tensor:
        return crb(
            S.position, H, S.codes, noise, amplitude=amplitude, array=ARRAY, source_mode=mode
        )

    plain = bound(S.H, noise)
    assert torch.allclose(bound(S.H, 4.0 * noise), 4.0 * plain)
    assert torch.allclose(bound(S.H * 1e6, 1e12 * noise), plain)
    single = crb(
        S.position.float(),
        S.H.to(torch.complex64),
        S.codes.to(torch.complex64),
        noise.float(),
        amplitude=amplitude.to(torch.complex64),
        array=ARRAY,
        source_mode=mode,
    )
    assert single.dtype == torch.float64
    assert torch.allclose(single, plain, rtol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_another_source_never_helps_and_an_absent_one_changes_nothing(mode: Any) -> None:
    S = scenes(mode)
    amplitude, noise = amplitudes(S, mode), torch.ones(len(S), dtype=torch.float64)
    known = {"array": ARRAY, "source_mode": mode}
    both = crb(S.position, S.H, S.codes, noise, amplitude=amplitude, **known)
    alone = crb(S.position[:, :1], S.H, S.codes, noise, amplitude=amplitude[..., :1], **known)
    diagonal = both.diagonal(dim1=-2, dim2=-1)
    assert (diagonal[:, :1] >= alone.diagonal(dim1=-2, dim2=-1) * (1 - 1e-9)).all()
    present = torch.tensor([True, False]).expand(len(S), 2)
    for extra in (S.position, torch.cat([S.position[:, :1], 0 * S.position[:, 1:]], dim=1)):
        masked = crb(extra, S.H, S.codes, noise, amplitude=amplitude, present=present, **known)
        assert torch.allclose(masked[:, :1], alone)
        assert torch.isinf(masked[:, 1].diagonal(dim1=-2, dim2=-1)).all()
        power = amplitude.abs().square().mean(1)
        masked = crb(extra, S.H, S.codes, noise, source_power=power, present=present, **known)
        one = crb(S.position[:, :1], S.H, S.codes, noise, source_power=power[:, :1], **known)
        assert torch.allclose(masked[:, :1], one, rtol=1e-6)


def test_what_the_data_cannot_tell_apart_has_no_finite_bound() -> None:
    S = scenes("constant")
    amplitude, noise = amplitudes(S, "constant"), torch.ones(len(S), dtype=torch.float64)
    known: dict[str, Any] = {"array": ARRAY, "source_mode": "constant", "amplitude": amplitude}
    planar = crb(S.position, S.H, S.codes, noise, wavefront="planar", **known)
    deviation = planar.diagonal(dim1=-2, dim2=-1)
    assert torch.isinf(deviation[..., 2]).all()  # a plane wave has no range
    assert torch.isfinite(deviation[..., :2]).all()
    twins = S.position[:, :1].expand(-1, 2, -1)
    bound = crb(
        twins,
        S.H,
        S.codes,
        noise,
        source_power=torch.ones(len(S), 2),
        array=ARRAY,
        source_mode="fluctuating",
    )
    assert torch.isinf(bound.diagonal(dim1=-2, dim2=-1)).all()
    # Known amplitudes of different phase tell even coincident sources apart, to first order.
    assert torch.isfinite(crb(twins, S.H, S.codes, noise, **known)).all()


def test_bad_arguments_are_refused() -> None:
    S = scenes("constant")
    noise, amplitude = torch.ones(len(S)), amplitudes(S, "constant")
    for known, message in (
        ({}, "got neither"),
        ({"amplitude": amplitude, "source_power": S.power}, "got both"),
        ({"amplitude": amplitude[..., :1]}, r"amplitude has shape .* expected \(4, 1, 2\)"),
        ({"source_power": S.power[:2]}, "source_power has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            crb(S.position, S.H, S.codes, noise, array=ARRAY, source_mode="constant", **known)
    for bad in (torch.zeros(len(S)), torch.full((len(S),), math.nan)):
        with pytest.raises(ValueError, match="noise_power"):
            crb(
                S.position,
                S.H,
                S.codes,
                bad,
                array=ARRAY,
                source_mode="constant",
                amplitude=amplitude,
            )


@pytest.mark.parametrize("given", ["amplitude", "source_power"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_arguments_and_unknown_modes_are_refused_by_name(given: str, bad: float) -> None:
    S = scenes("constant")
    known: dict[str, Any] = {
        "position": S.position,
        "H": S.H,
        "codes": S.codes,
        "noise_power": torch.ones(len(S)),
        given: amplitudes(S, "constant") if given == "amplitude" else S.power,
    }
    for name, value in known.items():
        broken = value.clone()
        broken[(1,) + (0,) * (value.ndim - 1)] = bad
        with pytest.raises(ValueError, match=f"{name} holds 1 non-finite"):
            crb(**(known | {name: broken}), array=ARRAY, source_mode="constant")
    with pytest.raises(ValueError, match="source_mode 'nonsense' unknown; choose from"):
        crb(**known, array=ARRAY, source_mode="nonsense")  # type: ignore[arg-type]


@pytest.mark.parametrize("level", [0.0, 20.0])
@pytest.mark.parametrize("mode", MODES)
def test_bounds_of_scenes_are_those_at_their_own_amplitudes_and_noise(
    mode: Any, level: float
) -> None:
    S = scenes(mode, 40, snr_db=level)
    found = scene_crb(S, ARRAY, "spherical", mode)
    assert found.shape == (40, 2, 3, 3)
    noise = S.y.abs().square().mean((1, 2)) / (1.0 + 10.0 ** (level / 10.0))
    if mode == "constant":
        known = {"amplitude": amplitudes(S, mode)}
    else:  # powers scaled so that the expected energy is the measured one
        signals = measured(S, mode).rows(steering_vector(S.position, ARRAY))
        expected_power = (signals.abs().square().sum((1, 3)) * S.power).sum(-1) / S.y[0].numel()
        clean = S.y.abs().square().mean((1, 2)) - noise
        known = {"source_power": S.power * (clean / expected_power).unsqueeze(-1)}
    expected = crb(S.position, S.H, S.codes, noise, array=ARRAY, source_mode=mode, **known)
    assert torch.allclose(found, expected, rtol=1e-6)
    scaled = Scenes(**{**S.__dict__, "y": S.y * 1e-20, "H": S.H * 1e20})
    assert torch.allclose(scene_crb(scaled, ARRAY, "spherical", mode), found, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("nothing", ["received", "sent"])
def test_a_dead_recording_has_no_bound_and_leaves_the_others_alone(mode: Any, nothing: str) -> None:
    S = scenes(mode, 6)
    whole = scene_crb(S, ARRAY, "spherical", mode)
    dead = torch.arange(6) == 2
    if nothing == "received":
        S = replace(S, y=S.y.masked_fill(dead[:, None, None], 0.0))
    else:
        S = replace(S, snr_db=S.snr_db.masked_fill(dead, torch.inf))
    found = scene_crb(S, ARRAY, "spherical", mode)
    assert torch.equal(found[~dead], whole[~dead])
    assert torch.isinf(found[dead].diagonal(dim1=-2, dim2=-1)).all()


@pytest.mark.parametrize("mode", MODES)
def test_a_scene_of_unknown_snr_has_no_bound_and_leaves_the_others_alone(mode: Any) -> None:
    S = scenes(mode, 6)
    whole = scene_crb(S, ARRAY, "spherical", mode)
    unknown = torch.arange(6) % 2 == 0
    S = replace(S, snr_db=S.snr_db.masked_fill(unknown, torch.nan))
    found = scene_crb(S, ARRAY, "spherical", mode)
    assert torch.equal(found[~unknown], whole[~unknown])
    assert torch.isinf(found[unknown].diagonal(dim1=-2, dim2=-1)).all()


@pytest.mark.parametrize("mode", MODES)
def test_the_pursuits_errors_meet_the_bound_at_high_snr(mode: Any) -> None:
    """One scene, many noises: the variance of an efficient estimate is its bound.

    With 300 draws a standard deviation is known to 4 per cent (1 / sqrt(2 n)).
    """
    array = PlanarArray(8, 8)
    config = SceneConfig(
        source_mode=mode, min_sources=2, max_sources=2, snr_db=(25.0, 25.0), range_m=(0.8, 2.0)
    )
    generator = torch.Generator().manual_seed(5)
    one = simulate(1, config, array, generator=generator, dtype=torch.complex128)
    n = 300
    S = one[torch.zeros(n, dtype=torch.int64)]
    m = normal_equations(measured_as(one, mode, array), position_of(one.position))[0]
    amplitude = m.amplitude
    clean = one.y - m.residual.reshape(one.y.shape)
    noise = float(clean.abs().square().mean()) * 10 ** (-2.5)
    draws = torch.randn(n, *one.y.shape[1:], generator=generator, dtype=torch.complex128)
    y = clean + draws * math.sqrt(noise)
    bound = crb(
        one.position, one.H, one.codes, torch.tensor([noise]),
        amplitude=amplitude, array=array, source_mode=mode,
    )  # fmt: skip
    std = bound.diagonal(dim1=-2, dim2=-1).sqrt()[0]
    result = nomp(y, S.H, S.codes, array=array, scene=config, snr_db=25.0)
    assert (result.detections.count == 2).all()
    distance = (result.detections.position[:, :, None] - one.position[:, None]).abs() / std
    order = distance.sum(-1).argmin(-1)  # which truth each detection is of
    assert (order.sort(-1).values == torch.tensor([0, 1])).all()
    error = result.detections.position - one.position[0][order]
    for k in range(2):
        measured_std = error[order == k].square().mean(0).sqrt()
        # 4 per cent of chance each; conditional ML of fluctuating amplitudes is efficient here.
        assert torch.allclose(measured_std / std[k], torch.ones(3, dtype=torch.float64), atol=0.17)
    told = result.detections.covariance
    assert told is not None
    ratio = told.diagonal(dim1=-2, dim2=-1).sqrt() / std[order]
    assert 0.9 < float(ratio.median()) < 1.1
    for k in range(2):  # the signs and sizes of what is across coordinates, too
        blocks = told[order == k].median(dim=0).values / std[k].unsqueeze(-1) / std[k]
        known = bound[0, k] / std[k].unsqueeze(-1) / std[k]
        assert torch.allclose(blocks, known, atol=0.1)


def measured_as(S: Scenes, mode: Any, array: PlanarArray) -> Any:
    from physics.fit import Measurement

    return Measurement.of(S.y, S.H, S.codes, array, "spherical", mode)


def test_no_sources_have_no_bounds() -> None:
    S = scenes("constant")
    nothing = S.position[:, :0]
    noise = torch.ones(len(S))
    for known in ({"amplitude": S.y[:, :1, :0]}, {"source_power": S.power[:, :0]}):
        bound = crb(nothing, S.H, S.codes, noise, array=ARRAY, source_mode="constant", **known)
        assert bound.shape == (4, 0, 3, 3)
