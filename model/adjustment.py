"""What may change in a configuration while a training keeps its weights, and what may not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from model.config import TrialConfig
from physics.config import AmidTraining


def adjustable_paths(config: BaseModel, prefix: str = "") -> Iterator[str]:
    """Dotted paths of the fields that are marked as adjustable, in the configuration's own kinds.

    Args:
        config: with the network's family that it has, and the loss terms that it has.
        prefix: of the paths.
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
    """The configuration in plain values, without what changes no result.

    A step's parts are a matter of memory, its threads of time, and scenes are the same wherever
    they lie.
    """
    data = config.model_dump()
    data["training"] |= {"accumulation": 1, "threads": 1}
    data["data"] |= {"shards": config.data.shards is not None, "cache": None, "keep_images": True}
    return data


def lasting(config: TrialConfig) -> dict[str, Any]:
    """What must be the same for one training to take over the weights of another.

    All but the seed and the adjustable fields.
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
    """The first field in which two configurations in plain values differ, for messages."""
    for name in dict.fromkeys([*theirs, *ours]):
        path = prefix + name
        there, here = theirs.get(name), ours.get(name)
        if there == here:
            continue
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            return first_difference(there, here, f"{path}.")
        return f"{path} is {there!r} there and {here!r} here"
    return "no field differs"
