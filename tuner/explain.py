"""Turn a validation error into one line that a user can act on."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from itertools import chain
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from model.network import FAMILIES

_SPACES = ("float", "int", "categorical")
_LONGEST = 80
_MOST = 3  # problems that are listed
# Messages in YAML terms for pydantic errors that are worded in Python terms.
_KINDS = {
    "tuple_type": "expected a list, such as [1, 2]",
    "list_type": "expected a list, such as [1, 2]",
    "dict_type": "expected fields with values, such as {a: 1}",
    "model_type": "expected fields with values, such as {a: 1}",
    "model_attributes_type": "expected fields with values, such as {a: 1}",
}
_A_SPACE = "expected a kind and its values, such as {type: float, low: 0.1, high: 1}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean x?)`, or an empty string if no name is similar."""
    known = list(known)
    near = get_close_matches(name, known, n=1, cutoff=0.6)
    if not near and "." in name:
        last = name.rpartition(".")[2]
        near = [path for path in known if path.rpartition(".")[2] == last][:1]
    return f" (did you mean {near[0]}?)" if near else ""


def field_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted paths of all fields that are not sections."""
    for name, field in model.model_fields.items():
        sections = sections_of(field.annotation)
        if not sections:
            yield prefix + name
        paths = (field_paths(section, f"{prefix}{name}.") for section in sections)
        yield from dict.fromkeys(chain.from_iterable(paths))


def explain(
    error: ValidationError,
    model: type[BaseModel],
    source: str = "",
    said: Mapping[str, str] | None = None,
) -> str:
    """Describe errors in one line: source, dotted field, its value, and what is allowed.

    Args:
        error: pydantic's error.
        model: the validated model.
        source: origin of the data, such as a file.
        said: options that set fields, such as ``--trials``, by dotted path.
    """
    problems: dict[str, list[str]] = {}
    # If an item of a list matches no branch of a union, only the first branch is reported.
    details = list({_item(d["loc"]): d for d in reversed(error.errors(include_url=False))}.values())
    details.reverse()
    for detail in details[:_MOST]:
        place, new = _place(detail), detail["type"] == "extra_forbidden"
        blamed = _blamed(place, source, said or {}, new=new)
        problems.setdefault(blamed, []).append(_problem(detail, model))
    text = "; ".join(
        (f"{blamed}: " if blamed else "") + "; ".join(found) for blamed, found in problems.items()
    )
    return text + (f" (and {len(details) - _MOST} more)" if len(details) > _MOST else "")


def _blamed(where: str, source: str, said: Mapping[str, str], *, new: bool) -> str:
    """Return a value's origin: an option at or above it, or the source with options below it.

    An unknown (``new``) field is attributed to an option below it alone.
    """
    here = where.replace("[", ".").replace("]", "")
    above = [path for path in said if f"{here}.".startswith(f"{path}.")]
    made = [path for path in said if new and here and path.startswith(f"{here}.")]
    if above or made:
        return said[max(above or made, key=len)]
    below = [
        label
        for path, label in said.items()
        if not here or path.startswith(f"{here}.") or here.startswith(_kind_of(path))
    ]
    return " with ".join([source] * bool(source) + [", ".join(dict.fromkeys(below))] * bool(below))


def _kind_of(path: str) -> tuple[str, ...]:
    """Return the prefix of fields that depend on a path: `network.` for `network.family`."""
    section, _, name = path.rpartition(".")
    return (f"{section}.",) if name in ("family", "type") else ()


def _item(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Return a location without the union branch that was tried for an item of a list."""
    is_branch = [isinstance(part, int) for part in location[-2:]] == [True, False]
    return location[:-1] if is_branch else location


def _place(detail: ErrorDetails) -> str:
    """Return the dotted field; for a section of unknown type the field that names its type."""
    where = _dotted(detail["loc"])
    if detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
        where += "." + detail["ctx"]["discriminator"].strip("'")
    return where


def _problem(detail: ErrorDetails, model: type[BaseModel]) -> str:
    location, where = detail["loc"], _place(detail)
    if detail["type"] == "extra_forbidden":
        known = _known_fields(model, location[:-1])
        name = str(location[-1])
        hint = did_you_mean(name, known)
        if not hint and len(location) == 1:  # a field without its section
            inside = [path for path in field_paths(model) if path.endswith(f".{name}")]
            hint = f" (did you mean {inside[0]}?)" if inside else ""
        listed = hint or (f"; known here: {', '.join(sorted(known))}" if known else "")
        return f"{where}: unknown field{listed}"
    if detail["type"] in ("missing", "union_tag_not_found"):
        return f"{where}: is missing"
    if detail["type"] == "union_tag_invalid":
        allowed = detail["ctx"]["expected_tags"]
        return f"{where}: got {_short(detail['ctx']['tag'])}; expected one of {allowed}"
    message = _KINDS.get(detail["type"]) or _own_words(detail["msg"])
    if detail["type"] in _KINDS and location[:2] == ("search", "space") and len(location) == 3:
        message = _A_SPACE
    held = detail["input"]
    if isinstance(held, BaseModel) or (isinstance(held, dict) and detail["type"] == "value_error"):
        return f"{where}: {message}" if where else message
    return f"{where}: got {_short(held)}; {message}"


def _own_words(message: str) -> str:
    """Return a validator's message without pydantic's prefix."""
    message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return message[:1].lower() + message[1:]


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _dotted(location: tuple[int | str, ...]) -> str:
    where = ""
    for index, part in enumerate(location):
        if isinstance(part, int) or "." in part:
            where += f"[{part}]"
        elif _is_kind(location, index):
            continue
        else:
            where += f".{part}" if where else part
    return where


def _is_kind(location: tuple[int | str, ...], index: int) -> bool:
    """Return whether a part of a location names the type of a section, not a field."""
    if location[:2] == ("search", "space"):
        return index >= 3 and location[index] in _SPACES
    return location[index - 1 : index] == ("network",) and location[index] in FAMILIES


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """Return the models in an annotation: one, that of `Model | None`, or all of a union."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    union = get_origin(annotation) in (Union, types.UnionType)
    kinds = get_args(annotation) if union else (annotation,)
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _known_fields(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    here = [model]
    for index, part in enumerate(location):
        if _is_kind(location, index):
            here = [kind for kind in here if kind.model_fields["family"].default == part]
            continue
        fields = [kind.model_fields.get(str(part)) for kind in here]
        here = [s for field in fields if field for s in sections_of(field.annotation)]
    return list(dict.fromkeys(name for kind in here for name in kind.model_fields))
