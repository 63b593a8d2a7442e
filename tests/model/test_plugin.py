from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from model import Trainer, TrialConfig, export_best
from model.data import simulate_split
from model.datacheck import check_data
from model.localizer import Localizer
from model.network import check_plugins
from model.plugin import PluginError, load_plugin, plugins_of
from physics import simulate

NETWORK = "examples.extension:SpectrumNetwork"
TERM = "examples.extension:few_slots"
NEARBY = "examples.extension:nearby"
MODULE = """
from dataclasses import replace
import torch
from physics import simulate
number = 3
def constant(prediction, scenes, value=2.0):
    return torch.tensor(value)
def by_scene(prediction, scenes):
    return prediction.existence.sum(-1)
def half(n_scenes, config, array, *, generator, device):
    return simulate(n_scenes // 2, config, array, generator=generator, device=device)
def zero_padded(n_scenes, config, array, **options):
    scenes = simulate(n_scenes, config, array, **options)
    return replace(scenes, position=scenes.position * scenes.present.unsqueeze(-1))
def nothing(*arguments, **options):
    return None
"""


@pytest.fixture
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's own."""
    (tmp_path / "their_module.py").write_text(MODULE)
    (tmp_path / "their_broken_module.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "their_module"
    for name in ("their_module", "their_broken_module"):
        sys.modules.pop(name, None)


def config(**changes: Any) -> TrialConfig:
    sections: dict[str, Any] = {
        "network": {
            "family": "custom",
            "builder": NETWORK,
            "options": {"hidden": 16},
            "azimuth_cells": 4,
            "elevation_cells": 3,
            "range_cells": 2,
        },
        "training": {"epochs": 2, "batch_size": 16},
        "data": {"train_scenes": 32, "val_scenes": 16},
    }
    for path, value in changes.items():
        section, _, field = path.partition("__")
        sections.setdefault(section, {})[field] = value
    return TrialConfig.model_validate(sections)


def test_a_network_of_ones_own_trains_is_saved_and_locates(tmp_path: Path) -> None:
    trainer = Trainer(config())
    first = trainer.run_epoch()
    assert first["loss"] > 0
    trainer.save(tmp_path / "checkpoint")
    again = Trainer(config())
    again.load(tmp_path / "checkpoint")
    assert again.run_epoch()["loss"] == trainer.run_epoch()["loss"]
    trainer.save(tmp_path / "checkpoint")
    export_best(tmp_path / "checkpoint", tmp_path / "best")
    scenes = trainer.source.validation().scenes
    found = Localizer.load(tmp_path / "best").locate(scenes.y, scenes.H, scenes.codes)
    assert len(found) == len(scenes)


def test_a_term_of_ones_own_has_its_weight_in_the_loss_and_a_gradient(theirs: str) -> None:
    def of(weight: float) -> dict[str, Any]:
        extra = {"mine": {"term": f"{theirs}:constant", "weight": weight, "options": {"value": 3}}}
        return dict(Trainer(config(loss__extra=extra)).run_epoch())

    none, some = of(0.0), of(0.5)
    assert "loss_mine" not in none
    assert some["loss_mine"] == 3.0
    # A constant moves no weight: what else there is stays, to the last bit.
    assert some["loss_nmse"] == none["loss_nmse"]
    assert some["loss"] == pytest.approx(none["loss"] + 1.5, rel=1e-6)
    pulled = Trainer(config(loss__extra={"few": {"term": TERM, "weight": 10.0}})).run_epoch()
    assert pulled["loss_nmse"] != none["loss_nmse"]


def test_scenes_are_those_of_the_simulator_in_every_split() -> None:
    own = config(data__simulator=NEARBY)
    near, far = own.scene.range_m
    for split in ("train", "val", "test"):
        for scenes in simulate_split(own.data, own.scene, own.array.build(), split, 300):
            assert float(scenes.position[scenes.present][:, 2].max()) <= (near + far) / 2
    trainer = Trainer(own)
    assert next(iter(trainer.source.train_batches(0, 8, 0))).unit_modulus is None  # looked at
    assert float(trainer.source.validation().scenes.position[..., 2].max()) <= (near + far) / 2
    assert NEARBY in check_data(own).said


def test_naming_the_physics_own_simulator_changes_no_scene() -> None:
    array = config().array.build()
    plain, named = config(), config(data__simulator="physics:simulate")
    a, b = (
        next(simulate_split(c.data, c.scene, array, "train", 20, epoch=3)) for c in (plain, named)
    )
    assert torch.equal(a.y, b.y)
    assert load_plugin("physics:simulate") is simulate


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module_here:f", "ModuleNotFoundError.*PYTHONPATH"),
        ("their_broken_module:f", "no_such_package_anywhere"),
        ("their_module:constent", "did you mean constant"),
        ("their_module:number", "is int, which cannot be called"),
    ],
)
def test_a_path_that_leads_nowhere_says_so(theirs: str, path: str, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        load_plugin(path)
    with pytest.raises(PluginError, match=message):
        check_plugins(config(loss__extra={"mine": {"term": path}}))
    with pytest.raises(PluginError, match=message):
        check_plugins(config(network__builder=path))


@pytest.mark.parametrize("path", ["module", "module.name", "module:a.b", "mo dule:f", ":f", "a:"])
def test_a_path_of_another_form_is_refused_with_the_configuration(path: str) -> None:
    with pytest.raises(ValidationError, match="pattern"):
        config(data__simulator=path)


def test_what_a_plug_in_gives_is_looked_at(theirs: str) -> None:
    with pytest.raises(PluginError, match=r"shape \(16,\)"):
        Trainer(config(loss__extra={"mine": {"term": f"{theirs}:by_scene"}})).run_epoch()
    with pytest.raises(PluginError, match="gave None"):
        Trainer(config(loss__extra={"mine": {"term": f"{theirs}:nothing"}})).run_epoch()
    with pytest.raises(PluginError, match="expected a SourceNetwork"):
        check_plugins(config(network__builder=f"{theirs}:nothing"))
    with pytest.raises(PluginError, match=r"y of shape \(128, .*expected \(256"):
        check_data(config(data__simulator=f"{theirs}:half"))
    with pytest.raises(PluginError, match=r"expected physics\.Scenes"):
        check_data(config(data__simulator=f"{theirs}:nothing"))


def test_a_network_with_what_no_checkpoint_holds_is_refused_and_one_that_shares_layers_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "their_networks.py").write_text(
        "import torch\n"
        "from examples.extension import SpectrumNetwork\n"
        "class Normed(SpectrumNetwork):\n"
        "    def __init__(self, *arguments):\n"
        "        super().__init__(*arguments)\n"
        "        self.norm = torch.nn.BatchNorm1d(4)\n"
        "class Constant(SpectrumNetwork):\n"
        "    def __init__(self, *arguments):\n"
        "        super().__init__(*arguments)\n"
        "        self.register_buffer('scale', torch.ones(3), persistent=False)\n"
        "class Shared(SpectrumNetwork):\n"
        "    def __init__(self, *arguments):\n"
        "        super().__init__(*arguments)\n"
        "        self.twin = self.pointer\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        with pytest.raises(PluginError, match=r"norm\.running_mean.*GroupNorm.*persistent=False"):
            check_plugins(config(network__builder="their_networks:Normed"))
        check_plugins(config(network__builder="their_networks:Constant"))
        trainer = Trainer(config(network__builder="their_networks:Shared"))
        trainer.run_epoch()
        trainer.save(tmp_path / "checkpoint")
        export_best(tmp_path / "checkpoint", tmp_path / "best")
        loaded = Localizer.load(tmp_path / "best").network
        assert loaded.twin is loaded.pointer
        trainer._set_weights(trainer.average.weights)
        assert torch.equal(loaded.twin.weight, trainer.network.twin.weight)
    finally:
        sys.modules.pop("their_networks", None)


def test_a_term_may_not_take_the_name_of_another() -> None:
    with pytest.raises(ValidationError, match="nmse is a term of the loss already"):
        config(loss__extra={"nmse": {"term": TERM}})


def test_all_paths_of_a_configuration_are_known() -> None:
    own = config(loss__extra={"mine": {"term": TERM}}, data__simulator=NEARBY)
    assert plugins_of(own) == [NETWORK, TERM, NEARBY]
    assert plugins_of(TrialConfig()) == []


def test_a_simulator_may_pad_slots_without_a_source_with_zeros(theirs: str) -> None:
    own = config(data__simulator=f"{theirs}:zero_padded")
    assert "zero_padded" in check_data(own).said
    losses = Trainer(own).run_epoch()
    assert losses["skipped_steps"] == 0
    assert losses["loss"] == Trainer(config(data__simulator="physics:simulate")).run_epoch()["loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("y=scenes.y * float('nan')", r"y with NaN or Inf in 256 of 256 scenes, first in scene 0"),
        ("H=scenes.H.real", r"H of torch.float32; expected complex values"),
        ("power=scenes.power - 1", "a power below 0"),
        ("power=scenes.power + 1", "above it in a slot without a source"),
        ("position=0.0 * scenes.position", "range is not above 0 m"),
        ("position=scenes.position / 0.0", "position with NaN or Inf"),
        ("position=scenes.position[:, :2]", r"position of shape \(256, 2, 3\)"),
        ("n_sources=scenes.n_sources + 9", r"n_sources outside 0..5 \(scene.max_sources\)"),
        (
            "n_sources=scenes.n_sources.float()",
            "n_sources of torch.float32; expected integer values",
        ),
        ("n_sources=scenes.n_sources[:, None]", r"n_sources of shape \(256, 1\)"),
        ("snr_db=scenes.snr_db[:7]", r"snr_db of shape \(7,\); expected \(256,\)"),
        ("snr_db=scenes.snr_db / 0.0", "snr_db of Inf"),
    ],
)
def test_values_that_a_simulator_may_not_make_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: str, message: str
) -> None:
    (tmp_path / "their_faulty_module.py").write_text(
        "from dataclasses import replace\n"
        "from physics import simulate\n"
        "def faulty(n_scenes, config, array, **options):\n"
        "    scenes = simulate(n_scenes, config, array, **options)\n"
        f"    return replace(scenes, {changes})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        with pytest.raises(PluginError, match=f"their_faulty_module:faulty: made .*{message}"):
            check_data(config(data__simulator="their_faulty_module:faulty"))
    finally:
        sys.modules.pop("their_faulty_module", None)
