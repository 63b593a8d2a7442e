from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest

from model.config import TrialConfig
from tests.tuner.support import tiny_study
from tuner.config import _joint_points
from tuner.errors import ConfigError
from tuner.explain import field_paths
from tuner.space import (
    CategoricalSpace,
    FloatSpace,
    IntSpace,
    SearchSpace,
    default_space,
    n_points,
    suggest,
)


def with_space(folder: Path, **space: dict[str, Any]) -> None:
    tiny_study(folder, search={"space": {k.replace("__", "."): v for k, v in space.items()}})


@pytest.mark.parametrize(
    ("path", "spec", "said"),
    [
        ("training__learning_rat", {"type": "float", "low": 0, "high": 1}, "did you mean"),
        ("learning_rate", {"type": "float", "low": 0, "high": 1}, "training.learning_rate?"),
        ("network", {"type": "int", "low": 0, "high": 1}, "names no searchable field"),
        ("training__learning_rate", {"type": "float", "low": 0, "high": 1}, "0.0 is not allowed"),
        ("network__dropout", {"type": "float", "low": 0, "high": 1}, "1.0 is not allowed"),
        ("network__depth", {"type": "float", "low": 1, "high": 2.5}, "2.5 is not allowed"),
        ("network__depth", {"type": "int", "low": 3, "high": 2}, "low 3 is above high 2"),
        ("network__depth", {"type": "int", "low": 1, "high": 4, "step": 2}, "whole steps of 2"),
        ("network__depth", {"type": "categorical", "choices": [1, "many"]}, "'many'"),
        ("network__depth", {"type": "categorical", "choices": []}, "choices"),
        ("network__depth", {"type": "categorical", "choices": [1, 1]}, "twice"),
        ("network__depth", {"type": "integer", "low": 1, "high": 2}, "'float', 'int'"),
        ("network__depth", {"type": "int", "low": 1}, "high: is missing"),
        ("blend__beta", {"type": "float", "low": 0, "high": 1, "log": True}, "above 0"),
        ("precision__amp", {"type": "categorical", "choices": ["off", "fp8"]}, "'fp8'"),
        ("network__heads", {"type": "categorical", "choices": [2, 3]}, "network.heads=3"),
    ],
)  # fmt: skip
def test_a_space_that_cannot_be_run_is_refused_before_anything_starts(
    tmp_path: Path, path: str, spec: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        with_space(tmp_path, **{path: spec})
    assert said in str(caught.value)
    assert path.replace("__", ".") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_joint_choices_that_cannot_be_built_are_refused(tmp_path: Path) -> None:
    widths = {"type": "categorical", "choices": [8, 12]}
    heads = {"type": "categorical", "choices": [2, 8]}
    with pytest.raises(ConfigError, match=r"network.width=12, network.heads=8 cannot be built"):
        with_space(tmp_path, network__width=widths, network__heads=heads)


@pytest.mark.parametrize("sizes", [(64, 64, 4), (2, 3, 5), (64, 64), (48,) * 5, (2,) * 40])
def test_of_many_joint_choices_a_part_is_tried_with_all_values_equally_often(
    sizes: tuple[int, ...],
) -> None:
    space: SearchSpace = {f"a.p{i}": IntSpace(low=1, high=high) for i, high in enumerate(sizes)}
    points = list(_joint_points(space, list(space)))
    assert len(points) == min(4096, math.prod(sizes))
    for path, high in zip(space, sizes, strict=True):
        counts = Counter(point[path] for point in points)
        assert len(counts) == high
        assert max(counts.values()) - min(counts.values()) <= 1
    # 4096 draws of 16384 points meet 3624 of them.
    assert len({tuple(point.values()) for point in points}) > 0.85 * len(points)


def test_choices_that_only_fit_each_other_are_allowed(tmp_path: Path) -> None:
    widths = {"type": "categorical", "choices": [9, 15]}  # the base has two heads
    heads = {"type": "categorical", "choices": [1, 3]}
    with_space(tmp_path, network__width=widths, network__heads=heads)


@pytest.mark.parametrize(
    "path",
    ["seed", "search.trials", "data.val_scenes", "scene.max_sources", "array.spacing",
     "training.epochs", "training.threads", "resources.concurrent"],
)  # fmt: skip
def test_what_defines_the_objective_may_not_be_searched(tmp_path: Path, path: str) -> None:
    space = {path: {"type": "int", "low": 1, "high": 2}}
    with pytest.raises(ConfigError, match="may not be searched"):
        tiny_study(tmp_path, search={"space": space})


def test_the_default_space_covers_the_promised_parameters() -> None:
    space = default_space()
    known = set(field_paths(TrialConfig))
    assert set(space) <= known
    for section in ("training", "network", "loss", "blend", "tikhonov"):
        assert any(path.startswith(section + ".") for path in space)
    assert {f"loss.{term}" for term in ("cov_pred", "subspace_align", "peak_contrast",
                                        "existence", "position")} <= set(space)  # fmt: skip


def test_suggestions_lie_in_the_space() -> None:
    space: SearchSpace = {
        "a": FloatSpace(low=0.1, high=0.9, step=0.2),
        "b": IntSpace(low=1, high=64, log=True),
        "c": CategoricalSpace(choices=(1, "x", None)),
    }
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(50):
        point = suggest(space, study.ask())
        assert all(space[path].contains(value) for path, value in point.items())


def test_containment_is_by_value_and_type() -> None:
    assert not IntSpace(low=0, high=1).contains(True)
    assert not CategoricalSpace(choices=(1, 2)).contains(1.0)
    assert FloatSpace(low=0, high=1).contains(1)
    assert not FloatSpace(low=0, high=1, step=0.5).contains(0.3)


@pytest.mark.parametrize(
    ("parameter", "size"),
    [
        (FloatSpace(low=0.0, high=0.6), math.inf),
        (FloatSpace(low=0.1, high=0.7, step=0.1), 7),
        (FloatSpace(low=0.3, high=0.3), 1),
        (IntSpace(low=1, high=9, step=2), 5),
        (CategoricalSpace(choices=(16, "a", None)), 3),
    ],
)
def test_the_size_of_a_space_is_the_product_of_its_parameters(
    parameter: FloatSpace | IntSpace | CategoricalSpace, size: float
) -> None:
    assert parameter.size == size
    assert n_points({"a": parameter, "b": IntSpace(low=1, high=2)}) == 2 * size


@pytest.mark.parametrize(
    ("path", "spec", "kept"),
    [
        ("tikhonov__regularization", {"type": "float", "low": 1e-4, "high": 1e-1}, False),
        ("tikhonov__regularization", {"type": "float", "low": 1, "high": 2, "step": 0.5}, True),
        ("tikhonov__regularization", {"type": "categorical", "choices": [1e-3, 1e-2]}, True),
        ("network__azimuth_cells", {"type": "int", "low": 4, "high": 11}, True),
        ("network__azimuth_cells", {"type": "int", "low": 4, "high": 12}, False),
        ("training__learning_rate", {"type": "float", "low": 1e-4, "high": 1e-1}, True),
        ("blend__beta", {"type": "float", "low": 0.1, "high": 0.2}, True),
    ],
)  # fmt: skip
def test_images_are_kept_unless_every_trial_would_have_its_own(
    tmp_path: Path, path: str, spec: dict[str, Any], kept: bool
) -> None:
    study = tiny_study(tmp_path, search={"space": {path.replace("__", "."): spec}})
    assert study.trial_config({}, seed=0).data.keep_images is kept
    judging = study.replaced({"network": {"family": "candidate", "candidates": {"count": 2}}})
    assert judging.trial_config({}, seed=0).data.keep_images, "it reads no spectra"
    never = study.replaced({"data.keep_images": False})
    assert not never.trial_config({}, seed=0).data.keep_images
