"""`python -m tuner.config`: the configuration as a JSON schema, and as YAML with comments."""

from __future__ import annotations

import json
import math
import sys
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from model.config import TrialConfig
from tuner.command import DONE, execute
from tuner.config import StudyConfig
from tuner.errors import StudyError
from tuner.explain import field_paths, sections_of
from tuner.space import is_unsearchable
from tuner.yamlfile import dump_yaml

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_WIDTH = 100
_DURATION = r"^(none|\d+(\.\d+)?|(\d+(\.\d+)?d)?(\d+(\.\d+)?h)?(\d+(\.\d+)?m)?(\d+(\.\d+)?s)?)$"


@app.command()
def config(
    schema: Annotated[
        bool, typer.Option("--schema", help="JSON schema, by which editors complete and check.")
    ] = False,
    defaults: Annotated[
        bool, typer.Option("--defaults", help="YAML of every field, with what it may hold.")
    ] = False,
) -> int:
    """Print what a study's YAML may hold. Exit codes: 0 done; 2 bad arguments."""
    if schema == defaults:
        raise StudyError("--schema or --defaults: one of them is expected")
    typer.echo(schema_text() if schema else defaults_text(), nl=False)
    return DONE


def main() -> int:
    """Run the command."""
    return execute(app)


# The schema


def schema_text() -> str:
    """Return the schema as stored in configs/schema.json."""
    return json.dumps(study_schema(), indent=2, allow_nan=False) + "\n"


def study_schema() -> dict[str, Any]:
    """Return the JSON schema (2020-12) of a study's YAML, before it is resolved.

    It covers names, types, ranges and the searchable paths. Rules between fields, such as a width
    that the heads must divide, are checked when a study is loaded.
    """
    schema = StudyConfig.model_json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    for definition in definitions.values():
        _tidy(definition)
        kind = definition.get("properties", {})
        for tag in ("type", "family"):
            # The type of a section determines its other fields; "snapshot" may be omitted.
            value = kind.get(tag, {}).get("const")
            if value is not None and value != "snapshot":
                definition["required"] = [tag, *definition.get("required", [])]
    search = definitions["SearchConfig"]["properties"]
    _also(search["time_budget"], {"type": "string", "pattern": _DURATION})
    _also(search["target"], {"const": "none"})
    search["space"] = _space_schema(search["space"])
    _tidy(schema)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A study of ristune",
        "description": "python -m tuner.run --config FILE",
        **{key: value for key, value in schema.items() if key not in ("title", "description")},
    }


def _tidy(definition: dict[str, Any]) -> None:
    """Drop entries that editors do not support or show needlessly."""
    definition.pop("title", None)
    definition["description"] = " ".join(definition.get("description", "").split())
    for field in definition.get("properties", {}).values():
        field.pop("title", None)
        field.pop("discriminator", None)


def _also(field: dict[str, Any], kind: dict[str, Any]) -> None:
    """Add a type that a validator accepts and converts to the field's type."""
    field["anyOf"] = [*field["anyOf"], kind]


def _space_schema(field: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of the search space: one parameter for each searchable path."""
    parameter = {k: v for k, v in field["additionalProperties"].items() if k != "discriminator"}
    paths = [path for path in field_paths(TrialConfig) if not is_unsearchable(path)]
    return {
        "type": "object",
        "description": field["description"],
        "properties": dict.fromkeys(dict.fromkeys(paths), parameter),
        "additionalProperties": False,
    }


# The defaults


def defaults_text() -> str:
    """Return every default as YAML that `tuner.run --config` reads back as the defaults."""
    lines = [
        "# Every field of a study at its default. What a study leaves out is as here.",
        "# python -m tuner.run --config FILE",
        "",
    ]
    study = StudyConfig()
    for name, field in StudyConfig.model_fields.items():
        lines += [*_field(name, field, getattr(study, name), ""), ""]
    return "\n".join(lines).rstrip() + "\n"


def _field(name: str, field: FieldInfo, value: Any, indent: str) -> Iterator[str]:
    kinds = sections_of(field.annotation)
    if isinstance(value, BaseModel):
        yield from _comment(_first_line(type(value)), indent)
        yield f"{indent}{name}:"
        for key, inner in type(value).model_fields.items():
            yield from _field(key, inner, getattr(value, key), indent + "  ")
        for other in kinds:
            if not isinstance(value, other):
                yield from _other(other, indent + "  ")
        return
    allowed = ", ".join(part for part in (choices(field.annotation), limits(field)) if part)
    words = [field.description or "", f"({allowed})" if allowed else ""]
    yield from _comment(" ".join(word for word in words if word), indent)
    if name == "space":
        yield f"{indent}{name}:"
        for path, parameter in value.items():
            shown = parameter.model_dump(mode="json", exclude_defaults=True)
            inside = ", ".join(f"{k}: {_inline(v)}" for k, v in shown.items())
            yield f"{indent}  {path}: {{type: {parameter.type}, {inside}}}"
        return
    yield f"{indent}{name}: {_inline(to_jsonable_python(value))}"


def _other(model: type[BaseModel], indent: str) -> Iterator[str]:
    """Yield the fields of another type of a section, commented out."""
    yield f"{indent}# Or, {_first_line(model)[:1].lower()}{_first_line(model)[1:]}"
    for key, inner in model.model_fields.items():
        value = inner.get_default(call_default_factory=True)
        if inner.is_required():
            value = next(iter(inner.examples or ()))
        for line in _field(key, inner, value, ""):
            text = f"#   {line.removeprefix('# ')}" if line.startswith("#") else f"# {line}"
            yield indent + text


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0].replace("``", "")


def _comment(text: str, indent: str) -> Iterator[str]:
    for line in textwrap.wrap(text, _WIDTH - len(indent) - 2):
        yield f"{indent}# {line}"


def _inline(value: Any) -> str:
    """Return a value as one line of YAML."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(_inline(one) for one in value)}]"
    return dump_yaml(value).removesuffix("\n...\n").strip()


def choices(annotation: Any) -> str:
    """Return the values of a Literal as text."""
    if get_origin(annotation) is Literal:
        return " | ".join(str(value) for value in get_args(annotation))
    return ""


def limits(field: FieldInfo) -> str:
    """Return the bounds that pydantic checks as text."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = []
    for rule in field.metadata:
        for name, sign in signs.items():
            bound = getattr(rule, name, None)
            if bound is not None and math.isfinite(bound):
                found.append(f"{sign} {bound:g}")
    return ", ".join(found)


if __name__ == "__main__":
    sys.exit(main())
