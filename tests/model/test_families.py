"""Which network a configuration asks for, and how it says what is wrong with it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from model import (
    CandidateNetwork,
    CandidateNetworkConfig,
    Localizer,
    SnapshotConfig,
    SnapshotNetwork,
    SourceNetwork,
    Trainer,
    TrialConfig,
    build_network,
)
from model.checkpoint import CheckpointError, parse_config
from model.decode import detect
from model.image import ImageNetwork
from model.network import FAMILIES, dotted
from model.prediction import Prediction
from physics import PlanarArray, SceneConfig, steering_vector
from physics.candidates import CandidateConfig
from physics.metrics import match
from tests.tiny import TINY_CANDIDATE, tiny_candidate_config, tiny_config
from tuner.explain import explain, field_paths


def refused(sections: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        TrialConfig.model_validate(sections)
    return explain(caught.value, TrialConfig)


def test_a_network_is_of_snapshots_unless_its_family_is_named() -> None:
    assert isinstance(TrialConfig().network, SnapshotConfig)
    for section in ({}, {"rank": 6}, {"family": "snapshot"}):
        network = TrialConfig.model_validate({"network": section}).network
        assert isinstance(network, SnapshotConfig)
        assert network.family == "snapshot"
        assert network.slots == section.get("rank", 8)
        assert network.front_end is None
    named = TrialConfig.model_validate({"network": {"family": "candidate"}}).network
    assert isinstance(named, CandidateNetworkConfig)
    assert named.slots == 6
    assert named.front_end == CandidateConfig()


@pytest.mark.parametrize(
    "config", [tiny_config(), tiny_candidate_config()], ids=["snapshot", "candidate"]
)
def test_a_configuration_reads_back_as_the_same_family(config: TrialConfig) -> None:
    assert TrialConfig.model_validate_json(config.model_dump_json()) == config
    assert TrialConfig.model_validate(config.model_dump()) == config
    assert TrialConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("config", "kind"),
    [(tiny_config(), SnapshotNetwork), (tiny_candidate_config(), CandidateNetwork)],
    ids=["snapshot", "candidate"],
)
def test_the_family_decides_what_is_built_and_all_share_the_dictionary(
    config: TrialConfig, kind: type[SourceNetwork]
) -> None:
    array = config.array.build()
    network = build_network(config.network, config.scene, array)
    assert type(network) is kind
    assert network.dictionary.shape == (48, 36)
    assert network.cells.shape == (48, 3)
    torch.testing.assert_close(network.cells[:, 2].unique(), torch.tensor([0.1, 2.0]))
    span = torch.tensor([120.0 / 5, 60.0 / 3]).deg2rad()
    torch.testing.assert_close(network.cell_size, torch.cat([span, torch.tensor([1.9])]))
    assert not {"dictionary", "cells", "cell_size"} & set(network.state_dict())


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ({"family": "candidate", "rank": 8}, "network.rank: unknown field"),
        ({"family": "candidate", "conv_channels": 8}, "network.conv_channels: unknown field"),
        ({"family": "snapshot", "candidates": {}}, "network.candidates: unknown field"),
        ({"candidates": {"count": 6}}, "network.candidates: unknown field"),
        (
            {"family": "candidate", "candidates": {"cout": 6}},
            "network.candidates.cout: unknown field (did you mean count?)",
        ),
        ({"family": "candidate", "dept": 1}, "network.dept: unknown field (did you mean depth?)"),
        ({"family": "candidate", "candidates": {"count": 0}}, "network.candidates.count: got 0"),
        (
            {"family": "candidate", "candidates": {"search": {"joint_iterations": -1}}},
            "network.candidates.search.joint_iterations: got -1",
        ),
        ({"family": "candidate", "width": 9}, "network: width 9 is not a multiple of heads 4"),
        ({"width": "wide"}, "network.width: got 'wide'"),
    ],
)
def test_an_error_names_the_field_and_not_the_family(network: dict[str, Any], said: str) -> None:
    message = refused({"network": network})
    assert message.startswith(said)
    assert "network.candidate." not in message
    assert "network.snapshot" not in message


def test_the_image_family_is_one_of_them() -> None:
    config = TrialConfig.model_validate(
        {"network": {"family": "image", "rank": 5}, "array": {"n_horizontal": 6, "n_vertical": 6}}
    )
    assert config.network.slots == 5
    assert config.network.front_end is None
    network = build_network(config.network, config.scene, config.array.build())
    assert isinstance(network, ImageNetwork)
    message = refused({"network": {"family": "image", "heads": 2}})
    assert message.startswith("network.heads: unknown field")
    message = refused({"network": {"family": "image", "rank": 4}})
    assert message.startswith("network.rank 4 is below scene.max_sources 5")


def test_fields_that_are_known_are_those_of_the_family() -> None:
    message = refused({"network": {"family": "candidate", "bogus": 1}})
    known = message.partition("known here: ")[2].split(", ")
    assert "candidates" in known
    assert "depth" in known
    assert "rank" not in known
    message = refused({"network": {"bogus": 1}})
    known = message.partition("known here: ")[2].split(", ")
    assert "rank" in known
    assert "candidates" not in known


def test_an_unknown_family_is_refused_with_those_that_there_are() -> None:
    message = refused({"network": {"family": "snapshots"}})
    assert "network" in message
    for family in FAMILIES:
        assert f"'{family}'" in message


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (
            {"family": "candidate", "candidates": {"count": 4}},
            "network.candidates.count 4 is below scene.max_sources 5",
        ),
        ({"rank": 4}, "network.rank 4 is below scene.max_sources 5"),
    ],
)
def test_fewer_slots_than_sources_are_refused(network: dict[str, Any], said: str) -> None:
    assert refused({"network": network}).startswith(said)
    TrialConfig.model_validate({"network": network, "scene": {"max_sources": 4}})


def test_paths_of_fields_are_those_of_all_families_once_each() -> None:
    paths = list(field_paths(TrialConfig))
    assert len(paths) == len(set(paths))
    assert {
        "network.rank", "network.width", "network.candidates.count", "network.family",
        "network.candidates.search.joint_iterations", "decision.goal", "data.cache", "objective",
    } <= set(paths)  # fmt: skip


def test_a_path_leaves_out_the_family_and_only_there() -> None:
    assert dotted(("network", "candidate", "candidates", "count")) == "network.candidates.count"
    assert dotted(("network", "snapshot", "rank")) == "network.rank"
    assert dotted(("network",)) == "network"
    assert dotted(("snapshot", "candidate")) == "snapshot.candidate"
    assert dotted(()) == ""


def test_a_damaged_configuration_of_a_checkpoint_is_named_by_field(tmp_path: Any) -> None:
    text = tiny_candidate_config().model_dump_json().replace('"count":3', '"count":0')
    with pytest.raises(CheckpointError, match=r"network\.candidates\.count holds '0'"):
        parse_config(tmp_path / "config.json", text)
    text = tiny_config().model_dump_json().replace('"rank":3', '"rank":0')
    with pytest.raises(CheckpointError, match=r": network\.rank holds '0'"):
        parse_config(tmp_path / "config.json", text)


@pytest.mark.parametrize("family", ["snapshot", "candidate", "image"])
@pytest.mark.parametrize("fixed", [{"elevation_deg": (0.0, 0.0)}, {"range_m": (3.0, 3.0)}])
def test_every_family_trains_where_a_direction_or_the_range_is_fixed(
    family: str, fixed: dict[str, Any]
) -> None:
    small: dict[str, Any] = {"family": family, "width": 16, "depth": 1, "rank": 3}
    if family == "candidate":
        small = {**TINY_CANDIDATE}
    config = tiny_config(scene={**fixed, "n_antennas": 6, "n_snapshots": 6})
    config = TrialConfig.model_validate(config.model_dump() | {"network": small})
    trainer = Trainer(config)
    grid = trainer.network.grid
    assert len(trainer.network.cells.unique(dim=0)) == math.prod(grid.shape)
    assert 1 in grid.shape
    metrics = trainer.run_epoch()
    assert metrics["skipped_steps"] == 0
    assert math.isfinite(metrics["gospa"])


def test_snapshot_networks_do_not_name_a_source_once_for_every_plane_of_a_fixed_axis() -> None:
    scene = SceneConfig(elevation_deg=(0.0, 0.0), min_sources=3, max_sources=3, snr_db=(30.0, 30.0))
    array = PlanarArray()
    config = TrialConfig(scene=scene)
    localizer = Localizer(config, build_network(config.network, scene, array))
    azimuth = torch.tensor([[-0.86, 0.28, -0.09]])
    position = torch.stack([azimuth, torch.zeros(1, 3), torch.tensor([[1.5, 3.0, 2.0]])], dim=-1)
    factor = steering_vector(position, array).mT
    existence = torch.tensor([[5.0, 5.0, 5.0, -5.0]])
    said = Prediction(factor, existence, torch.zeros(1, 4, 1), torch.zeros(1, 4, 3))
    found = detect(said, said.covariance, localizer.grid, array, scene.wavefront)
    assert match(found, position, torch.ones(1, 3, dtype=torch.bool)).f1 == 1.0
