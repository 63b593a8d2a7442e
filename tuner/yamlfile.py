"""Strict YAML: duplicate keys are errors, 1e-3 is a number, and `off` is a string."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from tuner.errors import ConfigError

# YAML 1.1 requires a dot and a signed exponent, so that plain loaders read 1e-3 as a string.
_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
# YAML 1.1 also reads on, off, yes and no as booleans; `precision.amp: off` names a choice.
_BOOL_TAG = "tag:yaml.org,2002:bool"
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that reads floats such as 1e-3 and rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be plain text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key}' is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL_TAG]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_StrictLoader.add_implicit_resolver(_BOOL_TAG, _BOOL, list("tTfF"))


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML; a syntax error becomes a one-line ConfigError with its position."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{source}{place}: not valid YAML: {problem}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file; an empty file is an empty mapping.

    A leading `~` is expanded to the home folder, as a launcher may quote it so that no shell does.
    """
    # Path.expanduser raises if `~name` is not a user; here that is a file name.
    path = Path(os.path.expanduser(path))  # noqa: PTH111
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; a YAML file is expected")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    data = parse_yaml(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds a {type(data).__name__}; sections of keys are expected")
    return data


def dump_yaml(data: Any) -> str:
    """Return YAML text that keeps the order of the data."""
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
