"""Compiled networks train as they would uncompiled, and go on from a checkpoint bit for bit."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

from model import Trainer, TrialConfig
from tests.model.test_step_sizes import config_of as small_config_of


def config_of(family: str, cache: Path, *, compiled: bool) -> TrialConfig:
    """A small training with a last batch of another size and with dropout."""
    content = small_config_of(family, 6, cache).model_dump()
    content["data"] |= {"train_scenes": 12, "val_scenes": 8}
    content["network"] |= {"dropout": 0.2}
    content["training"] |= {"epochs": 2, "batch_size": 8, "compile": compiled}
    return TrialConfig.model_validate(content)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    ["candidate", *(pytest.param(name, marks=pytest.mark.long) for name in ("image", "snapshot"))],
)
def test_a_compiled_training_is_the_same_to_rounding_and_resumes(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    plain = Trainer(config_of(family, tmp_path, compiled=False))
    wanted = [plain.run_epoch() for _ in range(2)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = Trainer(config_of(family, tmp_path, compiled=True))
        found = [trainer.run_epoch()]
    shown = [str(one.message) for one in said if one.category is not DeprecationWarning]
    assert not [line for line in shown if re.search("ynamo|nductor|_prims", line)]
    trainer.save(tmp_path / "checkpoint")
    found.append(trainer.run_epoch())
    for name in ("loss", "grad_norm", "objective"):
        assert [epoch[name] for epoch in found] == pytest.approx(
            [epoch[name] for epoch in wanted], rel=1e-4
        )
    again = Trainer(config_of(family, tmp_path, compiled=True))
    again.load(tmp_path / "checkpoint")
    again.run_epoch()
    for name, weight in again.network.state_dict().items():
        assert torch.equal(weight, trainer.network.state_dict()[name]), name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
