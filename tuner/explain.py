"""Turn a validation error into one line that a user can act on."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

_KINDS = ("float", "int", "categorical")  # discriminators that pydantic adds to a location
_LONGEST = 80


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean x?)`, or nothing where nothing is near."""
    known = list(known)
    near = get_close_matches(name, known, n=1, cutoff=0.6)
    if not near and "." in name:
        last = name.rpartition(".")[2]
        near = [path for path in known if path.rpartition(".")[2] == last][:1]
    return f" (did you mean {near[0]}?)" if near else ""


def field_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted paths of all fields that are no sections themselves."""
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is None:
            yield prefix + name
        else:
            yield from field_paths(section, f"{prefix}{name}.")


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first thing that is wrong: dotted field, what it held, what is allowed."""
    details = error.errors(include_url=False)
    first = details[0]
    location = first["loc"]
    where = _dotted(location)
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_fields(model, location[:-1])
        hint = did_you_mean(str(location[-1]), known)
        listed = hint or (f"; known here: {', '.join(sorted(known))}" if known else "")
        return f"{where}: unknown field{listed}{more}"
    if first["type"] == "missing":
        return f"{where}: is missing{more}"
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message[:1].lower() + message[1:]
    held = first["input"]
    if isinstance(held, BaseModel) or (isinstance(held, dict) and first["type"] == "value_error"):
        return f"{where}: {message}{more}" if where else f"{message}{more}"
    return f"{where}: got {_short(held)}; {message}{more}"


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _dotted(location: tuple[int | str, ...]) -> str:
    where = ""
    for index, part in enumerate(location):
        if isinstance(part, int) or "." in part:
            where += f"[{part}]"
        elif part in _KINDS and index >= 3 and location[:2] == ("search", "space"):
            continue
        else:
            where += f".{part}" if where else part
    return where


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model behind an annotation, also behind `Model | None`."""
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        annotation = kinds[0] if len(kinds) == 1 else None
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def _known_fields(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    here: type[BaseModel] | None = model
    for part in location:
        field = here.model_fields.get(str(part)) if here else None
        here = _section(field.annotation) if field else None
    return list(here.model_fields) if here else []
