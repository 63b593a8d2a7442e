"""What a training step allocates and decomposes, as the surface grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import Trainer, TrialConfig
from tests.tiny import TINY, TINY_CANDIDATE

SIDES = (12, 24)  # N = 144 and 576: four times as many elements
SCENES = 4
_DECOMPOSITIONS = {"_linalg_eigh", "_linalg_svd", "linalg_qr", "linalg_lstsq",
                   "linalg_cholesky_ex", "linalg_eig", "linalg_inv_ex", "linalg_lu_factor_ex",
                   "_linalg_solve_ex"}  # fmt: skip
NETWORKS: dict[str, dict[str, Any]] = {
    "snapshot": TINY["network"],
    "candidate": TINY_CANDIDATE,
    "image": {
        "family": "image",
        "width": 16,
        "depth": 1,
        "azimuth_cells": 8,
        "elevation_cells": 6,
        "range_cells": 2,
        "rank": 3,
    },
}


class Sizes(TorchDispatchMode):
    """The bytes of the largest tensor that is allocated, and the matrices that are decomposed."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.of = 0, ""
        self.decomposed: set[tuple[str, int]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = {
            leaf.untyped_storage().data_ptr()
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in given:
                n_bytes = leaf.untyped_storage().nbytes()
                if n_bytes > self.largest:
                    self.largest, self.of = n_bytes, f"{name} {tuple(leaf.shape)}"
        if name in _DECOMPOSITIONS:
            self.decomposed.add((name, max(args[0].shape[-2:])))
        return result


def config_of(family: str, side: int, cache: Path) -> TrialConfig:
    return TrialConfig.model_validate(
        {
            "array": {"n_horizontal": side, "n_vertical": side, "spacing": 0.15},
            "scene": TINY["scene"] | {"n_antennas": 6, "n_snapshots": 6},
            "network": NETWORKS[family],
            "data": {"train_scenes": SCENES, "val_scenes": SCENES, "cache": cache},
            "training": {"batch_size": SCENES},
            "loss": {"decoys": 8},
        }
    )


def sizes_of_a_step(config: TrialConfig) -> Sizes:
    trainer = Trainer(config)
    trainer.network.train()
    batch = next(iter(trainer.source.train_batches(0, config.training.batch_size, 0)))
    trainer._train_step(trainer._prepared(batch))  # so that the optimiser has its state
    with Sizes() as sizes:
        trainer._train_step(trainer._prepared(batch))
    return sizes


@pytest.mark.parametrize("family", sorted(NETWORKS))
def test_nothing_in_a_training_step_grows_with_the_square_of_the_surface(
    family: str, tmp_path: Path
) -> None:
    small, large = (
        sizes_of_a_step(config_of(family, side, tmp_path / str(side))) for side in SIDES
    )
    assert large.largest <= 4.2 * small.largest, f"{small.of} became {large.of}"
    assert large.largest < SCENES * SIDES[1] ** 4 * 8, f"{large.of} hides N x N of every scene"


@pytest.mark.parametrize("family", sorted(NETWORKS))
def test_a_training_step_decomposes_small_matrices_alone(family: str, tmp_path: Path) -> None:
    config = config_of(family, SIDES[0], tmp_path)
    decomposed = sizes_of_a_step(config).decomposed
    largest = config.network.slots + config.scene.n_snapshots
    eigh = {size for name, size in decomposed if name == "_linalg_eigh"}
    assert eigh, "the detector must see the eigendecomposition of R_blend's Gram matrix"
    assert max(eigh) <= largest
    others = {size for name, size in decomposed if name != "_linalg_eigh"}
    assert max(others, default=0) <= max(config.scene.n_antennas, largest)


def test_the_sizes_see_a_dense_covariance() -> None:
    factor = torch.randn(1, SIDES[1] ** 2, 3, dtype=torch.complex64)
    with Sizes() as sizes:
        torch.linalg.eigh((factor @ factor.mH)[:, :32, :32])
    assert sizes.largest == SIDES[1] ** 4 * 8
    assert ("_linalg_eigh", 32) in sizes.decomposed
