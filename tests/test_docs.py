"""The documentation says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tuner.config import StudyConfig
from tuner.explain import field_paths

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_configuration_page_is_up_to_date() -> None:
    from tools.configuration_reference import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), (
        "run python -m tools.configuration_reference --write"
    )


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files_that_exist(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_commands_name_modules_and_files_that_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for module in re.findall(r"python -m ((?:tuner|benchmarks|tools)\.\w+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module
    for config in re.findall(r"configs/[\w-]+\.yaml", text):
        assert (ROOT / config).exists(), config


def test_conventions_names_only_fields_that_exist() -> None:
    known = set(field_paths(StudyConfig))
    sections = set(StudyConfig.model_fields)
    text = "\n".join(p.read_text(encoding="utf-8") for p in PAGES)
    for name in re.findall(r"`((?:{})\.[a-z_]+)`".format("|".join(sorted(sections))), text):
        others = ("model.blending", "search.space", "decision.json")
        assert name in known or name.startswith(others), name


def test_the_conventions_table_holds_the_defaults() -> None:
    text = (ROOT / "docs" / "conventions.md").read_text(encoding="utf-8")
    study = StudyConfig()
    rows = re.findall(r"^\| `(\w+)\.(\w+)` \| `[A-Z_]+` \| ([\d.e-]+)", text, re.M)
    assert len(rows) == 6
    for section, field, value in rows:
        assert getattr(getattr(study, section), field) == yaml.safe_load(value) or float(
            value
        ) == getattr(getattr(study, section), field)
