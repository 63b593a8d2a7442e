"""Writes docs/configuration.md from the configuration's own fields.

python -m tools.configuration_reference          # prints it
python -m tools.configuration_reference --write  # to docs/configuration.md
"""

from __future__ import annotations

import argparse
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from physics.config import AmidTraining
from tuner.config import StudyConfig
from tuner.explain import sections_of
from tuner.schema import limits

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

HEAD = """# Configuration

<!-- written by python -m tools.configuration_reference --write -->

A study is one YAML file with the sections below. Omitted fields take their defaults. An unknown key
or a value that is not allowed ends the command with exit code 2 and one line that names the field.
Any field can be changed on the command line: `--set section.field=VALUE`, with the value in YAML.
Fields with a star may change while a network keeps its weights: `search.scheduler: pbt` changes
those of them that are searched, and `loss.extra.NAME.weight`.
"""


def type_name(annotation: Any) -> str:
    """A readable name of a type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        names = [type_name(a) for a in arguments if a is not type(None)]
        return " or ".join([*names, *(["null"] if type(None) in arguments else [])])
    if origin is tuple:
        return f"[{', '.join('…' if a is Ellipsis else type_name(a) for a in arguments)}]"
    if origin is not None:
        return str(origin.__name__)
    if annotation is Path:
        return "path"
    return {float: "number", int: "integer", bool: "true/false", str: "text"}.get(
        annotation, getattr(annotation, "__name__", str(annotation))
    )


def escaped(field: FieldInfo) -> str:
    """The description, escaped for a table."""
    return (field.description or "").replace("|", "\\|")


def default(field: FieldInfo) -> str:
    """The default as written in YAML."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, dict):
        return "see below"
    if isinstance(value, float) and value != 0 and abs(value) < 1e-2:
        return f"`{value:g}`"
    return f"`{json.dumps(value)}`"


def section(name: str, model: type[BaseModel], prefix: str = "") -> str:
    """One section's table; the paths of its fields start with ``prefix``, by default its name."""
    lines = [f"## {name}", ""]
    if model.__doc__:
        lines += [model.__doc__.strip().splitlines()[0], ""]
    lines += ["| field | default | type | allowed | |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *rows(prefix or name, model)]) + "\n"


def rows(prefix: str, model: type[BaseModel]) -> Iterator[str]:
    """Yield the rows of a section and of its nested sections."""
    for key, field in model.model_fields.items():
        path, inner = f"{prefix}.{key}", sections_of(field.annotation)
        if inner:
            yield from rows(path, inner[0])
            continue
        star = " \\*" if any(isinstance(mark, AmidTraining) for mark in field.metadata) else ""
        yield (
            f"| `{path}`{star} | {default(field)} | {type_name(field.annotation)} "
            f"| {limits(field)} | {escaped(field)} |"
        )


def page() -> str:
    """The whole page."""
    scalars, sections = [], []
    for name, field in StudyConfig.model_fields.items():
        kinds = sections_of(field.annotation)
        if len(kinds) == 1:
            sections.append(section(name, kinds[0]))
        for kind in kinds if len(kinds) > 1 else ():
            family = kind.model_fields["family"].default
            sections.append(section(f"{name}, `family: {family}`", kind, name))
        if not kinds:
            scalars.append(
                f"- `{name}`, default {default(field)}. {field.description or ''}".strip()
            )
    space = [
        "## search.space",
        "",
        "The space that is searched if a study defines none:",
        "",
        "```yaml",
    ]
    for path, parameter in StudyConfig().search.space.items():
        shown = parameter.model_dump(exclude_defaults=True) | {"type": parameter.type}
        inside = ", ".join(
            f"{k}: {json.dumps(shown[k])}"
            for k in sorted(shown, key=lambda k: (k != "type", k != "low", k))
        )
        space.append(f"{path}: {{{inside}}}")
    return "\n".join([HEAD, *scalars, "", *sections, *space, "```", ""])


def main() -> None:
    """Print the page or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    if parser.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())


if __name__ == "__main__":
    main()
