"""Which configuration fields may change while a training keeps its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from model.config import TrialConfig
from physics.config import AmidTraining


def adjustable_paths(config: BaseModel, prefix: str = "") -> Iterator[str]:
    """Dotted paths of the fields marked as adjustable, for the configuration's actual types.

    Args:
        config: determines the network family and the loss terms.
        prefix: prepended to the paths.
    """
    for name, field in type(config).model_fields.items():
        path, value = prefix + name, getattr(config, name)
        if any(isinstance(mark, AmidTraining) for mark in field.metadata):
            yield path
        elif isinstance(value, BaseModel):
            yield from adjustable_paths(value, f"{path}.")
        elif isinstance(value, Mapping):
            for key, item in value.items():
                if isinstance(item, BaseModel):
                    yield from adjustable_paths(item, f"{path}.{key}.")


def undivided(config: TrialConfig) -> dict[str, Any]:
    """The configuration as plain values, with the fields that change no result normalised.

    The number of parts of a step affects only memory, the number of threads only time, and scenes
    are the same wherever they are stored.
    """
    data = config.model_dump()
    data["training"] |= {"accumulation": 1, "threads": 1}
    data["data"] |= {"shards": config.data.shards is not None, "cache": None, "keep_images": True}
    return data


def lasting(config: TrialConfig) -> dict[str, Any]:
    """The fields that must agree for one training to take over the weights of another.

    These are all fields except the seed and the adjustable ones.
    """
    data = undivided(config)
    del data["seed"]
    for path in adjustable_paths(config):
        *parents, last = path.split(".")
        here = data
        for part in parents:
            here = here[part]
        del here[last]
    return data


def first_difference(theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> str:
    """Describe the first field in which two configurations (plain values) differ, for messages."""
    for name in dict.fromkeys([*theirs, *ours]):
        path = prefix + name
        there, here = theirs.get(name), ours.get(name)
        if there == here:
            continue
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            return first_difference(there, here, f"{path}.")
        return f"{path} is {there!r} there and {here!r} here"
    return "no field differs"
