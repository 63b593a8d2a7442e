"""Seeds of simulated scenes: a stream for each chunk of each split."""

from __future__ import annotations

from functools import lru_cache
from itertools import count
from typing import Literal

import numpy as np

Split = Literal["train", "val", "test"]
_BRANCH: dict[Split, int] = {"train": 0, "val": 1, "test": 2}
_BEFORE: dict[Split, tuple[Split, ...]] = {"val": (), "test": ("val",), "train": ("val", "test")}
_HELD_OUT = 1024  # chunks of validation and of test whose seeds no other split uses
_WORD = 2**32 - 1  # mask of the bits of a seed that a CPU generator keeps


def simulation_seed(seed: int, split: Split, epoch: int, chunk: int) -> int:
    """Seed of one chunk of simulated scenes.

    Splits, epochs and chunks are branches of one ``numpy.random.SeedSequence`` per study seed
    (seed + i would share streams). On a CPU a ``torch.Generator`` keeps 32 bits of a seed, so after
    some 65,000 chunks two chunks of a training may coincide by chance. No training chunk ever
    coincides with one of the first chunks of validation or test, and these two never coincide.
    """
    held_out = [_first_words(seed, other) for other in _BEFORE[split]]
    drawn = (_drawn(seed, split, epoch, chunk, attempt) for attempt in count())
    return next(found for found in drawn if not any(found & _WORD in words for words in held_out))


def _drawn(seed: int, split: Split, epoch: int, chunk: int, attempt: int) -> int:
    again = (attempt,) if attempt else ()
    sequence = np.random.SeedSequence(seed, spawn_key=(_BRANCH[split], epoch, chunk, *again))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


@lru_cache(maxsize=64)
def _first_words(seed: int, split: Split) -> frozenset[int]:
    """The 32 bits that a CPU generator keeps of the seeds of a split's first chunks."""
    return frozenset(simulation_seed(seed, split, 0, chunk) & _WORD for chunk in range(_HELD_OUT))
