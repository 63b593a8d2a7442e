"""Candidates that are judged by other models of the waves too."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from physics import SceneConfig, Scenes, simulate
from physics.candidates import CandidateConfig, Candidates, _as_bent, find_candidates
from physics.fit import Measurement, normal_equations, position_of
from physics.order import symbol_powers
from physics.steering import steering_vector
from tests.physics.test_candidates import FIELD, MODES, dense, find, finite, same
from tests.physics.test_fit import ARRAY, scenes, steer
from tests.reference import candidates as reference
from tests.reference import estimation

THREE = CandidateConfig(count=3, range_cells=3, waves=("paraxial", "fresnel"))
OTHERS = ("other_coordinates", "other_evidence", "other_range_evidence", "wave_evidence")


def drawn(mode: Any, true: Any, n: int = 24, **more: Any) -> Scenes:
    """Two sources aside, of waves that may be of another model."""
    scene = SceneConfig(
        source_mode=mode, true_wavefront=true, min_sources=2, max_sources=2, snr_db=(20.0, 20.0),
        azimuth_deg=(20.0, 60.0), **(FIELD | {"n_snapshots": 12} | more),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    return simulate(n, scene, ARRAY, generator=generator, dtype=torch.complex128)


@pytest.mark.parametrize("mode", MODES)
def test_evidence_is_the_likelihood_ratio_by_waves_of_that_model(mode: Any) -> None:
    S = scenes(mode, 2)
    found = find(S, mode, snr_db=S.snr_db, config=THREE)
    assert found.likely.any()
    for b in range(len(S)):
        y, H, codes = dense(S, b)
        chosen = found.likely[b]
        deviances, misfits = [], [1.0]
        for w, wavefront in enumerate(("spherical", *THREE.waves)):
            of = found.coordinates[b] if w == 0 else found.other_coordinates[b, :, w - 1]
            points = of[chosen]
            tensors = (torch.from_numpy(t).unsqueeze(0) for t in (y, H, codes))
            m = Measurement.of(*tensors, ARRAY, wavefront, mode)
            told = m.energy / m.n_rows / (1 + 10 ** (S.snr_db[b : b + 1] / 10))
            fit = normal_equations(m, points.unsqueeze(0))[0]
            symbols = symbol_powers(m, fit, told)
            noise = float(symbols.noise_power)
            misfits.append(float(fit.cost) / m.n_rows / noise)
            place, power = points.numpy(), symbols.power[0].numpy()
            if mode == "fluctuating":
                C = estimation.stochastic_covariances(
                    place, power, noise, H, codes, steer(wavefront), constant=False
                )
                deviances.append(estimation.stochastic_deviance(y, C, constant=False))
            else:
                deviances.append(2.0 * float(fit.cost) / noise)
            for i in range(len(points) if w else 0):
                rest = (y, H, codes, steer(wavefront))
                case = (place, power, i, noise, *rest)
                constant = mode == "constant"
                expected = reference.evidence(*case, constant=constant)
                value = float(found.other_evidence[b, i, w - 1])
                assert value == pytest.approx(expected, rel=1e-6, abs=1e-6)
                for s, r in enumerate(found.range_m[b, i].tolist()):
                    expected = reference.evidence(*case, inverse_range=1 / r, constant=constant)
                    value = float(found.other_range_evidence[b, i, w - 1, s])
                    assert value == pytest.approx(expected, rel=1e-6, abs=1e-6)
        # Residuals beyond the noise count by the power that the best model leaves.
        gain = 0.5 * (deviances[0] - np.array(deviances[1:])) / max(1.0, min(misfits[1:]))
        np.testing.assert_allclose(found.wave_evidence[b].numpy(), gain, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_nominal_model_says_what_it_says_without_others(mode: Any) -> None:
    S = scenes(mode, 6)
    plain = find(S, mode, snr_db=S.snr_db, config=THREE.model_copy(update={"waves": ()}))
    found = find(S, mode, snr_db=S.snr_db, config=THREE)
    for name, value in plain.tensors().items():
        if name not in ("range_m", "range_evidence", *OTHERS):
            assert torch.equal(value, found.tensors()[name]), name
        elif name in OTHERS:
            assert 0 in value.shape
    rest = ~found.likely
    assert rest.any()
    assert torch.equal(found.range_m[rest], plain.range_m[rest])
    for name, nominal in (
        ("other_coordinates", found.coordinates),
        ("other_evidence", found.evidence),
        ("other_range_evidence", found.range_evidence),
    ):
        for w in range(2):
            assert torch.equal(found.tensors()[name][:, :, w][rest], nominal[rest])


@pytest.mark.parametrize("mode", MODES)
def test_the_model_that_the_waves_are_of_fits_best_and_nearest(mode: Any) -> None:
    config = CandidateConfig(count=2, waves=("paraxial",))

    def off(coordinates: Tensor, S: Scenes) -> Tensor:
        """Distance (B, K) [m] of every source from the nearest candidate."""
        apart = cartesian(position_of(coordinates)).unsqueeze(1) - cartesian(S.position).unsqueeze(
            2
        )
        return torch.linalg.vector_norm(apart, dim=-1).amin(-1)

    for true in ("spherical", "paraxial"):
        S = drawn(mode, true)
        found = find(S, mode, snr_db=S.snr_db, config=config)
        wrong = found.wave_evidence < 0 if true == "paraxial" else found.wave_evidence > 0
        assert float(wrong.double().mean()) <= 0.1
        nominal, other = off(found.coordinates, S), off(found.other_coordinates[:, :, 0], S)
        right, misled = (other, nominal) if true == "paraxial" else (nominal, other)
        assert float(right.median()) < 0.1
        assert float(right.median()) < 0.3 * float(misled.median())


@pytest.mark.parametrize("mode", MODES)
def test_cells_are_of_the_models_that_are_not_refuted(mode: Any) -> None:
    """A refuted model leaves the ranges of the nominal one as fine as they are without it."""
    one = CandidateConfig(count=2, range_cells=9, waves=("paraxial",))
    for true in ("spherical", "paraxial"):
        S = drawn(mode, true)
        found = find(S, mode, snr_db=S.snr_db, config=one)
        plain = find(S, mode, snr_db=S.snr_db, config=one.model_copy(update={"waves": ()}))
        refuted, alone = found.wave_evidence[:, 0] < -10.0, found.wave_evidence[:, 0] > 10.0
        assert float((refuted if true == "spherical" else alone).double().mean()) > 0.5
        for name in ("range_m", "range_evidence"):
            same_cells = found.tensors()[name][refuted], plain.tensors()[name][refuted]
            assert torch.equal(*same_cells), name
        open_ = ~refuted
        near = found.range_m[..., 0], plain.range_m[..., 0]
        both = open_ & ~alone
        assert bool((near[0] <= near[1])[both].all())
        assert bool((found.range_m[..., -1] >= plain.range_m[..., -1])[both].all())
        # Where the nominal one is refuted cells lie around the other one's range.
        chosen = found.other_coordinates[alone, :, 0, 2].reciprocal()
        assert bool((found.range_m[alone][..., 0] <= chosen + 1e-9).all())
        assert bool((found.range_m[alone][..., -1] >= chosen - 1e-9).all())


def cartesian(position: Tensor) -> Tensor:
    azimuth, elevation, range_m = position.unbind(-1)
    return range_m.unsqueeze(-1) * torch.stack(
        [
            elevation.cos() * azimuth.sin(),
            elevation.sin(),
            elevation.cos() * azimuth.cos(),
        ],
        dim=-1,
    )


@pytest.mark.parametrize(
    ("one", "two"),
    [("spherical", "paraxial"), ("paraxial", "fresnel"), ("fresnel", "spherical")],
)
def test_waves_bend_alike_at_the_range_that_a_fit_begins_with(one: Any, two: Any) -> None:
    """The fit of one model begins near the optimum of the other."""
    coordinates = torch.tensor([[0.6, 0.2, 0.3], [-0.5, 0.0, 0.4], [0.0, 0.0, 0.5]]).double()
    a = steering_vector(position_of(coordinates), ARRAY, one)
    bent = _as_bent(coordinates, one, two)
    assert torch.equal(bent[..., :2], coordinates[..., :2])

    def overlap(factor: float) -> Tensor:
        scaled = bent * torch.tensor([1.0, 1.0, factor])
        b = steering_vector(position_of(scaled), ARRAY, two)
        return (a.conj() * b).sum(-1).abs()

    assert bool((overlap(1.0) > 0.97).all())
    for factor in (0.6, 1.6):
        assert bool((overlap(1.0) > overlap(factor)).all())
    torch.testing.assert_close(_as_bent(bent, two, one), coordinates)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_depends_on_a_scale(mode: Any) -> None:
    S = scenes(mode, 3)
    scaled = replace(S, y=S.y * 1e6, H=S.H * 1e-3, codes=S.codes * 1e2)
    one, two = (find(s, mode, snr_db=S.snr_db, config=THREE) for s in (S, scaled))
    same(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("snr_db", [None, math.inf, -math.inf, 10.0])
@pytest.mark.parametrize("ugly", ["no signal", "no channel", "no noise"])
def test_ugly_measurements_give_finite_candidates(ugly: str, snr_db: float | None) -> None:
    for mode in MODES:
        S = scenes(mode, 2, snr_db=300.0 if ugly == "no noise" else 10.0)
        S = replace(S, y=0 * S.y) if ugly == "no signal" else S
        S = replace(S, H=0 * S.H) if ugly == "no channel" else S
        found = find(S, mode, snr_db=snr_db, config=THREE)
        assert finite(found), [n for n, v in found.tensors().items() if not v.isfinite().all()]


def test_no_scenes_have_no_candidates_of_the_same_shapes() -> None:
    S = scenes("constant", 2)
    full, none = (find(s, "constant", config=THREE) for s in (S, S[slice(0, 0)]))
    for name, value in full.tensors().items():
        assert none.tensors()[name].shape == (0, *value.shape[1:])
    same(Candidates.concatenate([none, full]), full, rtol=0, atol=0)


@pytest.mark.parametrize("waves", [("spherical",), ("paraxial", "paraxial")])
def test_a_model_that_stands_there_twice_is_refused(waves: Any) -> None:
    S = scenes("constant", 2)
    config = CandidateConfig(count=2, waves=waves)
    with pytest.raises(ValueError, match=f"{waves[-1]} stands there twice; name other models"):
        find_candidates(S.y, S.H, S.codes, array=ARRAY, config=config)


def test_plane_waves_are_no_model_among_others() -> None:
    S = scenes("constant", 2)
    config = CandidateConfig(count=2, waves=("spherical",))
    scene = SceneConfig(source_mode="constant", wavefront="planar", **FIELD)
    with pytest.raises(ValueError, match="plane waves have no range"):
        find_candidates(S.y, S.H, S.codes, array=ARRAY, scene=scene, config=config)
    with pytest.raises(ValidationError, match="'spherical', 'fresnel' or 'paraxial'"):
        CandidateConfig(waves=("planar",))  # type: ignore[arg-type]  # that is the mistake
