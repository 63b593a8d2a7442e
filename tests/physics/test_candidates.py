from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from physics import NompConfig, PlanarArray, PursuitConfig, SceneConfig, Scenes, nomp, simulate
from physics.candidates import CandidateConfig, Candidates, find_candidates
from physics.fit import Measurement, normal_equations, position_of
from physics.order import symbol_powers
from physics.pursuit import Search
from tests.physics.test_fit import ARRAY, scenes, steer
from tests.reference import candidates as reference
from tests.reference import estimation

MODES: list[Any] = ["constant", "fluctuating"]
FIELD = {"range_m": (0.6, 3.0), "n_antennas": 8, "n_snapshots": 6}
SMALL = CandidateConfig(count=4, range_cells=5)


def find(S: Scenes, mode: Any, wavefront: Any = "spherical", **more: Any) -> Candidates:
    scene = SceneConfig(source_mode=mode, wavefront=wavefront, **FIELD)
    return find_candidates(
        S.y, S.H, S.codes, **{"array": ARRAY, "scene": scene, "config": SMALL} | more
    )


def dense(S: Scenes, b: int) -> tuple[Any, Any, Any]:
    """y, H and codes at the scale that powers refer to: the largest part of each is 1."""
    y, H, codes = (
        (t[b] / torch.view_as_real(t[b]).abs().max()).numpy() for t in (S.y, S.H, S.codes)
    )
    return y, H, codes


@dataclass(frozen=True)
class State:
    """Sources as a fit leaves them: coordinates, powers and noise of every scene."""

    coordinates: Tensor  # (B, K, 3)
    power: Tensor  # (B, K)
    noise_power: Tensor  # (B,)
    cost: Tensor  # (B,)

    def of(self, b: int) -> tuple[Any, Any]:
        return self.coordinates[b].numpy(), self.power[b].numpy()


def crowd(S: Scenes, mode: Any, wavefront: Any, config: CandidateConfig, snr_db: Any) -> State:
    """All sources of the pursuit together."""
    scene = SceneConfig(source_mode=mode, wavefront=wavefront, **FIELD)
    search = Search(ARRAY, scene, config.search, S.y, S.H, S.codes)
    ((_, measurement, noise),) = search.chunks(snr_db, None)
    coordinates, residual = search.points.new_zeros(len(S), 0, 3), measurement.y
    for _ in range(config.count):
        fit, _ = search.grow(measurement, coordinates, residual)
        coordinates, residual = fit.coordinates, fit.residual
    symbols = symbol_powers(measurement, fit, noise)
    return State(coordinates, symbols.power, symbols.noise_power, fit.cost)


def kept(
    S: Scenes, found: Candidates, b: int, mode: Any, wavefront: Any, known: bool
) -> tuple[Any, Any, float]:
    """Coordinates and powers of those that the criterion keeps in a scene, and its noise."""
    y, H, codes = (torch.from_numpy(t).unsqueeze(0) for t in dense(S, b))
    m = Measurement.of(y, H, codes, ARRAY, wavefront, mode)
    told = m.energy / m.n_rows / (1 + 10 ** (S.snr_db[b : b + 1] / 10)) if known else None
    points = found.coordinates[b : b + 1, found.likely[b]]
    symbols = symbol_powers(m, normal_equations(m, points)[0], told)
    return points[0].numpy(), symbols.power[0].numpy(), float(symbols.noise_power)


def same(one: Candidates, two: Candidates, **tolerance: float) -> None:
    for name, value in one.tensors().items():
        torch.testing.assert_close(value, two.tensors()[name], **tolerance)


def finite(found: Candidates) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in found.tensors().values())


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("wavefront", ["spherical", "paraxial"])
@pytest.mark.parametrize("mode", MODES)
def test_evidence_is_the_likelihood_ratio_of_dense_covariances(
    mode: Any, wavefront: Any, known: bool
) -> None:
    S = scenes(mode, 2, wavefront=wavefront)
    three = CandidateConfig(count=3, range_cells=3)
    snr_db = S.snr_db if known else None
    found = find(S, mode, wavefront, snr_db=snr_db, config=three)
    every = crowd(S, mode, wavefront, three, snr_db)
    assert found.likely.any()
    assert not found.likely.all()
    for b in range(len(S)):
        y, H, codes = dense(S, b)

        def ratio(
            points: Any, power: Any, i: int, noise: float, b: int = b, **cell: float
        ) -> float:
            rest = (*dense(S, b), steer(wavefront))
            return reference.evidence(
                points, power, i, noise, *rest, constant=mode == "constant", **cell
            )

        points, power, noise = kept(S, found, b, mode, wavefront, known)
        if known:
            told = np.mean(np.abs(y) ** 2) / (1 + 10 ** (float(S.snr_db[b]) / 10))
            assert noise == pytest.approx(told, rel=1e-6)
        crowded, noise_of_all = every.of(b), float(every.noise_power[b])
        for i in range(3):
            expected = ratio(*crowded, i, noise_of_all)
            assert float(found.crowded[b, i]) == pytest.approx(expected, rel=1e-6, abs=1e-6)
            # Who is kept comes before all others, and is judged beside its like alone.
            case = (points, power, i, noise) if found.likely[b, i] else (*crowded, i, noise_of_all)
            own, level = case[1][i], case[3]
            assert float(found.power[b, i]) == pytest.approx(own / level, rel=1e-6)
            expected = ratio(*case)
            assert float(found.evidence[b, i]) == pytest.approx(expected, rel=1e-6, abs=1e-6)
            for s, r in enumerate(found.range_m[b, i].tolist()):
                expected = ratio(*case, inverse_range=1 / r)
                value = float(found.range_evidence[b, i, s])
                assert value == pytest.approx(expected, rel=1e-6, abs=1e-6)
            gain = reference.received(
                *case, H, codes, steer(wavefront), constant=mode == "constant"
            )
            assert float(found.received[b, i]) == pytest.approx(gain, rel=1e-6, abs=1e-12)
        assert float(found.misfit[b]) == pytest.approx(
            float(every.cost[b]) / y.size / noise_of_all, rel=1e-6
        )
        a = np.stack([steer(wavefront)(point) for point in found.coordinates[b].numpy()])
        np.testing.assert_allclose(found.coherence[b].numpy(), np.abs(a.conj() @ a.T), atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_a_single_candidate_is_judged_against_noise_alone(mode: Any) -> None:
    S = scenes(mode, 2, n_sources=1)
    found = find(S, mode, snr_db=S.snr_db, config=CandidateConfig(count=1, range_cells=2))
    assert found.likely.all()
    torch.testing.assert_close(found.crowded, found.evidence, rtol=0.05, atol=0)
    for b in range(len(S)):
        points, power, noise = kept(S, found, b, mode, "spherical", True)
        expected = reference.evidence(
            points, power, 0, noise, *dense(S, b), steer(), constant=mode == "constant"
        )
        assert float(found.evidence[b, 0]) == pytest.approx(expected, rel=1e-6)
        assert found.coherence[b].item() == pytest.approx(1.0)


@pytest.mark.parametrize("max_sources", [1, 5])
@pytest.mark.parametrize("criterion", ["bic", "aic"])
@pytest.mark.parametrize("mode", MODES)
def test_the_criterion_keeps_the_first_ones_of_the_least_price(
    mode: Any, criterion: Any, max_sources: int
) -> None:
    S = scenes(mode, 8, snr_db=8.0)
    scene = SceneConfig(source_mode=mode, max_sources=max_sources, **FIELD)
    config = CandidateConfig(count=4, range_cells=2, search=PursuitConfig(criterion=criterion))
    found = find(S, mode, snr_db=S.snr_db, scene=scene, config=config)
    parameters = 5 if mode == "constant" else 4
    price = parameters * (2.0 if criterion == "aic" else math.log(2 * 48))
    value = found.deviance + price * torch.arange(5)
    count = value[:, : max_sources + 1].argmin(-1)
    assert torch.equal(found.likely, torch.arange(4) < count.unsqueeze(-1))
    assert count.max() == max_sources if max_sources == 1 else count.max() >= 2


@pytest.mark.parametrize("mode", MODES)
def test_what_is_kept_stands_where_a_patient_nomp_finds_it(mode: Any) -> None:
    S = scenes(mode, 6)
    # Both refine what is kept until nothing moves any more.
    patient = NompConfig(patience=4, joint_iterations=30, final_iterations=30)
    config = CandidateConfig(count=4, search=PursuitConfig(joint_iterations=30))
    found = find(S, mode, snr_db=S.snr_db, config=config)
    scene = SceneConfig(source_mode=mode, max_sources=4, **FIELD)
    result = nomp(
        S.y, S.H, S.codes, array=ARRAY, scene=scene, snr_db=S.snr_db, config=patient
    ).detections
    assert torch.equal(found.likely.sum(-1), result.count)
    place = position_of(found.coordinates)
    for b in range(len(S)):
        one, two = place[b, found.likely[b]], result.position[b, result.present[b]]
        for point in one:
            assert float((two - point).abs().sum(-1).min()) < 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_cells_reach_four_deviations_to_both_sides_within_the_field_of_view(mode: Any) -> None:
    S = scenes(mode, 6, snr_db=25.0)
    found = find(S, mode, snr_db=S.snr_db - 6.0)  # no residual is stronger than that noise
    q, std = found.coordinates[..., 2], found.covariance[..., 2, 2].sqrt()
    near = 1 / (q + 4 * std).clamp(1 / 3.0, 1 / 0.6)
    far = 1 / (q - 4 * std).clamp(1 / 3.0, 1 / 0.6)
    torch.testing.assert_close(found.range_m[..., 0], near)
    torch.testing.assert_close(found.range_m[..., -1], far)
    inside = (near > 0.6001) & (far < 2.999)
    assert bool(inside.any()), "some cells must end before the field of view does"
    assert bool((~inside).any())
    step = found.range_m.diff(dim=-1)
    torch.testing.assert_close(step, step[..., :1].expand_as(step))
    assert bool((step >= 0).all())


@pytest.mark.parametrize("mode", MODES)
def test_cells_reach_farther_where_the_residual_is_stronger_than_the_noise(mode: Any) -> None:
    """As if the noise were as strong as the residual is."""
    S = scenes(mode, 12, n_sources=1)
    one = CandidateConfig(count=1, range_cells=4)
    found = find(S, mode, snr_db=S.snr_db + 10.0, config=one)
    assert bool((found.misfit > 5.0).all())
    q, std = found.coordinates[..., 2], found.covariance[..., 2, 2].sqrt()
    width = 4 * std * found.misfit.sqrt().unsqueeze(-1)
    torch.testing.assert_close(found.range_m[..., 0], 1 / (q + width).clamp(1 / 3.0, 1 / 0.6))
    torch.testing.assert_close(found.range_m[..., -1], 1 / (q - width).clamp(1 / 3.0, 1 / 0.6))
    assert bool((found.range_m[..., -1] < 2.999).any())


@pytest.mark.parametrize("mode", MODES)
def test_deviance_starts_with_none_and_ends_with_all(mode: Any) -> None:
    S = scenes(mode, 3)
    found = find(S, mode, snr_db=S.snr_db)
    every = crowd(S, mode, "spherical", SMALL, S.snr_db)
    assert found.deviance.shape == (3, SMALL.count + 1)
    for b in range(len(S)):
        (points, power), noise = every.of(b), float(every.noise_power[b])
        y, H, codes = dense(S, b)
        none = 2 * np.sum(np.abs(y) ** 2) / noise
        assert float(found.deviance[b, 0]) == pytest.approx(none, rel=1e-6)
        if mode == "constant":
            rest = estimation.residual_energy(points, y, H, codes, steer(), constant=True)
            expected = 2 * rest / noise
        else:
            C = estimation.stochastic_covariances(
                points, power, noise, H, codes, steer(), constant=False
            )
            expected = estimation.stochastic_deviance(y, C, constant=False)
            expected -= 2 * y.size * math.log(noise)
        assert float(found.deviance[b, -1]) == pytest.approx(expected, rel=1e-6)
    # The first two are the sources; what follows explains noise.
    gain = -found.deviance.diff(dim=-1)
    assert bool((gain[:, :2].amin(-1) > gain[:, 2:].amax(-1)).all())


@pytest.mark.parametrize("mode", MODES)
def test_sources_have_evidence_and_what_was_made_up_has_little(mode: Any) -> None:
    S = scenes(mode, 12, n_sources=1, snr_db=20.0)
    found = find(S, mode, snr_db=S.snr_db)
    off = (position_of(found.coordinates) - S.position).abs()
    assert float(off[:, 0, :2].max()) < math.radians(2.0)
    assert float(found.evidence[:, 0].min()) > 20.0
    assert float(found.evidence[:, 1:].median()) < 3.0
    # The likelihood of range, as it is, puts the source where it stands.
    weight = torch.softmax(found.range_evidence[:, 0], -1)
    mean = (weight * found.range_m[:, 0]).sum(-1)
    assert float((mean - S.position[:, 0, 2]).abs().max()) < 0.3


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_depends_on_a_scale(mode: Any, known: bool) -> None:
    S = scenes(mode, 2)
    snr_db = S.snr_db if known else None
    one = find(S, mode, snr_db=snr_db)
    for scale_y, scale_h, scale_codes in ((1e12, 1, 1), (1, 1e-12, 1), (1e-12, 1e12, 1e-12)):
        scaled = Scenes(**(vars(S) | {
            "y": S.y * scale_y, "H": S.H * scale_h, "codes": S.codes * scale_codes,
        }))  # fmt: skip
        same(one, find(scaled, mode, snr_db=snr_db), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("mode", MODES)
def test_measurements_without_signal_give_finite_candidates_without_evidence(
    mode: Any, dtype: torch.dtype
) -> None:
    S = scenes(mode, 2)
    y, H, codes = (t.to(dtype) for t in (S.y, S.H, S.codes))
    scene = SceneConfig(source_mode=mode, **FIELD)
    for bad in ((0 * y, H), (y, 0 * H), (0 * y, 0 * H)):
        for snr_db in (None, 10.0):
            found = find_candidates(
                *bad, codes, array=ARRAY, scene=scene, snr_db=snr_db, config=SMALL
            )
            assert finite(found)
            assert float(found.evidence.abs().max()) < 1e-3
            assert float(found.range_evidence.abs().max()) < 1e-3


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("snr_db", [None, math.inf, -math.inf])
@pytest.mark.parametrize("mode", MODES)
def test_measurements_without_noise_and_levels_without_end_give_finite_candidates(
    mode: Any, snr_db: float | None, dtype: torch.dtype
) -> None:
    S = scenes(mode, 2, snr_db=200.0)
    y, H, codes = (t.to(dtype) for t in (S.y, S.H, S.codes))
    scene = SceneConfig(source_mode=mode, **FIELD)
    found = find_candidates(y, H, codes, array=ARRAY, scene=scene, snr_db=snr_db, config=SMALL)
    assert finite(found)


@pytest.mark.parametrize("mode", MODES)
def test_plane_waves_have_one_range(mode: Any) -> None:
    S = scenes(mode, 2, wavefront="planar")
    found = find(S, mode, "planar", snr_db=S.snr_db)
    assert finite(found)
    assert torch.equal(found.range_m, found.range_m[:1, :1, :1].expand_as(found.range_m))
    torch.testing.assert_close(
        found.range_evidence, found.evidence.unsqueeze(-1).expand_as(found.range_evidence)
    )


@pytest.mark.parametrize("mode", MODES)
def test_one_snapshot_is_enough_for_as_many_as_it_holds(mode: Any) -> None:
    S = scenes(mode, 3)
    y, codes = S.y[:, :1], S.codes[:, :1]
    scene = SceneConfig(source_mode=mode, **FIELD)
    # Of 16 real observations each source takes 5 parameters.
    three = CandidateConfig(count=3, range_cells=4)
    found = find_candidates(y, S.H, codes, array=ARRAY, scene=scene, config=three)
    assert finite(found)
    assert found.range_evidence.shape == (3, 3, 4)
    with pytest.raises(
        ValueError, match=rf"4 candidates asked; 1 snapshots of 8 antennas .* 3 {mode} sources"
    ):
        find_candidates(y, S.H, codes, array=ARRAY, scene=scene, config=SMALL)


def test_more_candidates_than_antennas_tell_apart_are_refused() -> None:
    S = scenes("fluctuating", 2)
    y, H = S.y[..., :4], S.H[:, :4]
    scene = SceneConfig(source_mode="fluctuating", **FIELD)
    with pytest.raises(ValueError, match=r"4 candidates asked; .* at most 3 fluctuating sources"):
        find_candidates(y, H, S.codes, array=ARRAY, scene=scene, config=SMALL)
    three = CandidateConfig(count=3, range_cells=2)
    assert finite(find_candidates(y, H, S.codes, array=ARRAY, scene=scene, config=three))


@pytest.mark.parametrize("mode", MODES)
def test_no_scenes_have_no_candidates_of_the_same_shapes(mode: Any) -> None:
    S = scenes(mode, 2)
    full, none = find(S, mode), find(S[slice(0, 0)], mode)
    assert len(none) == 0
    for name, value in full.tensors().items():
        assert none.tensors()[name].shape == (0, *value.shape[1:])
        assert none.tensors()[name].dtype == value.dtype
    same(Candidates.concatenate([none, full]), full, rtol=0, atol=0)


def test_scenes_do_not_depend_on_their_company_or_order() -> None:
    S = scenes("constant", 66)  # more than one chunk
    few = CandidateConfig(count=2, range_cells=3, search=PursuitConfig(joint_iterations=2))
    whole = find(S, "constant", snr_db=S.snr_db, config=few)
    order = torch.tensor([65, 3, 64, 0])
    some = find(S[order], "constant", snr_db=S.snr_db[order], config=few)
    same(whole[order], some, rtol=1e-6, atol=1e-9)
    assert len(whole) == 66


def test_channel_and_codes_may_be_common_to_all_scenes() -> None:
    S = scenes("constant", 3)
    scene = SceneConfig(source_mode="constant", **FIELD)
    wide = find_candidates(S.y, S.H[0], S.codes[0], array=ARRAY, scene=scene, config=SMALL)
    H, codes = S.H[:1].expand(3, -1, -1), S.codes[:1].expand(3, -1, -1)
    same(wide, find_candidates(S.y, H, codes, array=ARRAY, scene=scene, config=SMALL))


def test_bad_arguments_are_refused() -> None:
    S = scenes("constant", 3)
    with pytest.raises(ValueError, match="snr_db holds NaN"):
        find(S, "constant", snr_db=torch.tensor([1.0, math.nan, 2.0]))
    with pytest.raises(ValueError, match=r"snr_db has shape \(2,\)"):
        find(S, "constant", snr_db=torch.zeros(2))
    with pytest.raises(ValueError, match="5 x 5 array"):
        find(S, "constant", array=PlanarArray(5, 5))


def test_candidates_of_single_precision_agree_with_those_of_double() -> None:
    S = scenes("fluctuating", 3, n_sources=1, snr_db=20.0)
    one = CandidateConfig(count=1, range_cells=6)
    exact = find(S, "fluctuating", snr_db=S.snr_db, config=one)
    scene = SceneConfig(source_mode="fluctuating", **FIELD)
    y, H, codes = (t.to(torch.complex64) for t in (S.y, S.H, S.codes))
    found = find_candidates(
        y, H, codes, array=ARRAY, scene=scene, snr_db=S.snr_db.float(), config=one
    )
    assert torch.equal(found.likely, exact.likely)
    for name, value in found.tensors().items():
        if name == "likely":
            continue
        assert value.dtype == torch.float32
        # Sums of some fifty squares of single precision, and the fit's own rounding.
        torch.testing.assert_close(
            value.double(), exact.tensors()[name], rtol=5e-3, atol=5e-3, msg=name
        )


def test_default_array_and_scene_are_the_physics_defaults() -> None:
    S = simulate(1, SceneConfig(), PlanarArray(), generator=torch.Generator().manual_seed(0))
    quick = CandidateConfig(count=1, range_cells=2, search=PursuitConfig(new_iterations=1))
    plain = find_candidates(S.y, S.H, S.codes, config=quick)
    told = find_candidates(
        S.y, S.H, S.codes, array=PlanarArray(), scene=SceneConfig(), snr_db=None, config=quick
    )
    same(plain, told, rtol=0, atol=0)


def test_every_field_is_picked_joined_and_moved() -> None:
    S = scenes("constant", 3)
    found = find(S, "constant")
    parts = [found[slice(0, 1)], found[torch.tensor([1, 2])]]
    same(Candidates.concatenate(parts), found, rtol=0, atol=0)
    same(found.to("cpu"), found, rtol=0, atol=0)
    assert set(found.tensors()) == {f.name for f in fields(Candidates)}
    shapes: dict[str, Tensor] = found[slice(1, 3)].tensors()
    assert all(value.shape[0] == 2 for value in shapes.values())
