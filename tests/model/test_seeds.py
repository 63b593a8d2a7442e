"""Streams of simulated scenes: none of training is one of validation or test."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from model import seeds
from model.seeds import simulation_seed

WORD = 2**32 - 1


def test_no_two_streams_share_a_seed() -> None:
    seeds = [
        simulation_seed(s, split, e, c)
        for s, split, e, c in itertools.product(
            (0, 1, 123, 456), ("train", "val", "test"), range(4), range(4)
        )
    ]
    assert len(set(seeds)) == len(seeds)


def test_a_cpus_generator_keeps_32_bits_of_a_seed() -> None:
    """What the guard is for; when PyTorch keeps more it can go."""
    one, two = (torch.Generator().manual_seed(seed) for seed in (5, 5 + 2**32))
    assert torch.equal(torch.rand(4, generator=one), torch.rand(4, generator=two))


def test_a_training_stream_that_would_be_one_of_validation_is_drawn_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(seeds, "_HELD_OUT", 2**15)
    seeds._first_words.cache_clear()
    held_out = {simulation_seed(7, "val", 0, chunk) & WORD for chunk in range(2**15)}
    test = {simulation_seed(7, "test", 0, chunk) & WORD for chunk in range(2**15)}
    assert not held_out & test
    held_out |= test
    met = 0
    for chunk in range(400_000):
        sequence = np.random.SeedSequence(7, spawn_key=(0, 0, chunk))
        plain = int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
        if plain & WORD in held_out:
            met += 1
            assert simulation_seed(7, "train", 0, chunk) & WORD not in held_out
            if met == 2:
                break
    assert met, "the case must hold a stream that would be met"
    seeds._first_words.cache_clear()
