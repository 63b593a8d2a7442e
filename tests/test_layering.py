"""Imports run one way, physics <- model <- tuner, and only tuner/ knows Ray and Optuna."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("physics", "model", "tuner")
# What each package may not import; a layer also may not import those above it.
SEARCH_LIBRARIES = {"ray", "optuna"}
OUTSIDE = {"tests", "benchmarks", "examples", "tools"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Line and top-level name of every import, those inside functions and strings too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.split(".")[0]
        elif isinstance(node, ast.Call) and _is_dynamic_import(node.func):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value.split(".")[0]


def _is_dynamic_import(function: ast.expr) -> bool:
    if isinstance(function, ast.Attribute):
        return function.attr == "import_module"
    return isinstance(function, ast.Name) and function.id in {"import_module", "__import__"}


def forbidden_for(package: str) -> set[str]:
    above = set(LAYERS[LAYERS.index(package) + 1 :])
    return above | OUTSIDE | (SEARCH_LIBRARIES if package != "tuner" else set())


def violations(package: str, source: str) -> list[tuple[int, str]]:
    return [(line, name) for line, name in imported(source) if name in forbidden_for(package)]


def loaded_by(statement: str, names: set[str]) -> set[str]:
    """Which of `names` stand in sys.modules after `statement` ran in a fresh interpreter."""
    program = f"import sys; {statement}; print(*({names!r} & sys.modules.keys()))"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


@pytest.mark.parametrize("package", LAYERS)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    files = sources(package)
    assert files, f"no sources in {package}/"
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name in violations(package, path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("physics", "import model.network"),
        ("physics", "def f():\n    from tuner import config"),
        ("model", "from ray import tune"),
        ("model", "import importlib\nimportlib.import_module('optuna.samplers')"),
        ("model", "if True:\n    import tuner.space as s"),
        ("tuner", "from tests.reference import steering"),
    ],
)
def test_the_check_sees_a_wrong_import(package: str, source: str) -> None:
    assert violations(package, source)


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("physics", "from . import steering"),
        ("model", "from physics import steering_vector"),
        ("tuner", "import ray, optuna\nfrom model import Localizer"),
    ],
)
def test_the_check_lets_a_right_import_pass(package: str, source: str) -> None:
    assert not violations(package, source)


def test_physics_and_model_load_neither_ray_nor_optuna() -> None:
    assert loaded_by("import physics, model", SEARCH_LIBRARIES | {"tuner"}) == set()


def test_physics_loads_without_model() -> None:
    assert loaded_by("import physics", {"model", "tuner"}) == set()


def test_physics_and_model_work_where_ray_and_optuna_are_not_installed() -> None:
    # None in sys.modules makes an import fail as if there were no such package.
    absent = "; ".join(f"sys.modules[{name!r}] = None" for name in sorted(SEARCH_LIBRARIES))
    assert loaded_by(f"{absent}; import physics, model", {"tuner"}) == set()


def test_the_command_line_loads_nothing_heavy_until_it_is_needed() -> None:
    # `--help` and a message about a bad argument should not wait seconds for libraries.
    assert loaded_by("import tuner.run", SEARCH_LIBRARIES | {"torch"}) == set()
