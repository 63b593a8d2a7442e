"""What editors are told of a study's YAML is what a study takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from tests.tuner.support import ROOT, TINY, merged, run, write_study
from tuner.command import execute
from tuner.config import StudyConfig, load_study
from tuner.errors import ConfigError
from tuner.explain import field_paths, sections_of
from tuner.schema import app, defaults_text, schema_text, study_schema
from tuner.space import CategoricalSpace, FloatSpace, IntSpace
from tuner.yamlfile import parse_yaml, read_yaml

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = study_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def undescribed(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        kinds = sections_of(field.annotation)
        if not kinds and not field.description:
            yield prefix + name
        for kind in kinds:
            yield from undescribed(kind, f"{prefix}{name}.")


@pytest.mark.parametrize("model", [StudyConfig, FloatSpace, IntSpace, CategoricalSpace])
def test_every_field_is_described(model: type[BaseModel]) -> None:
    assert list(undescribed(model)) == []


def test_the_schema_in_configs_is_up_to_date() -> None:
    held = (ROOT / "configs" / "schema.json").read_text(encoding="utf-8")
    assert held == schema_text(), "run python -m tuner.config --schema > configs/schema.json"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_study_names_its_schema_and_suits_it(
    path: Path, validator: Draft202012Validator
) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=schema.json"
    assert [error.message for error in validator.iter_errors(read_yaml(path))] == []


CHANGES: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"traning": {"epochs": 3}}, False),
    ({"training": {"epoch": 3}}, False),
    ({"training": {"epochs": "many"}}, False),
    ({"training": {"epochs": 0}}, False),
    ({"blend": {"beta": 1.5}}, False),
    ({"objective": "gospa"}, True),
    ({"objective": "recall"}, False),
    ({"scene": {"snr_db": [0, 30]}}, True),
    ({"scene": {"snr_db": [0]}}, False),
    ({"network": {"family": "imaeg"}}, False),
    ({"network": {"range_bins": 24}}, False),
    ({"search": {"time_budget": "1h30m"}}, True),
    ({"search": {"time_budget": "soon"}}, False),
    ({"search": {"time_budget": "none", "target": "none"}}, True),
    ({"search": {"target": 0.9}}, True),
    ({"search": {"space": {"blend.beta": {"type": "float", "low": 0.0, "high": 0.6}}}}, True),
    ({"search": {"space": {"blend.beta": {"low": 0.0, "high": 0.6}}}}, False),
    ({"search": {"space": {"blend.beta": {"type": "float", "low": 0.0}}}}, False),
    ({"search": {"space": {"blend.bta": {"type": "float", "low": 0.0, "high": 1.0}}}}, False),
    ({"search": {"space": {"scene.snr_db": {"type": "int", "low": 0, "high": 1}}}}, False),
]


@pytest.mark.parametrize(("changes", "allowed"), CHANGES)
def test_the_schema_and_the_reader_agree(
    tmp_path: Path, validator: Draft202012Validator, changes: dict[str, Any], *, allowed: bool
) -> None:
    assert validator.is_valid(merged(TINY, changes)) == allowed
    try:
        load_study(write_study(tmp_path, **changes))
    except ConfigError:
        assert not allowed
    else:
        assert allowed


@pytest.mark.parametrize("family", ["snapshot", "image", "candidate"])
def test_families_have_their_own_fields(validator: Draft202012Validator, family: str) -> None:
    study = StudyConfig().replaced({"network": {"family": family}})
    assert validator.is_valid(study.model_dump(mode="json"))


def test_the_defaults_are_the_defaults_and_say_all(
    tmp_path: Path, validator: Draft202012Validator
) -> None:
    text = defaults_text()
    path = tmp_path / "defaults.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_study(path) == load_study(None)
    held = parse_yaml(text, "defaults")
    assert validator.is_valid(held)
    assert list(held) == list(StudyConfig.model_fields)
    for name in {path.rpartition(".")[2] for path in field_paths(StudyConfig)}:
        assert f"{name}:" in text, "a field is not shown, those of other families included"
    assert "  # element spacing [m] (> 0)\n  spacing: 0.15\n" in text
    assert "(bf16" not in text
    assert "(auto | off | bf16 | fp16)\n  amp: auto\n" in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_the_other_families_can_be_taken_by_uncommenting_them(tmp_path: Path) -> None:
    lines = defaults_text().splitlines()
    start = lines.index("  # Or, sizes of the image network.")
    end = lines.index("  # Or, sizes of the candidate network.")
    section = [f"  {line.removeprefix('  # ')}" for line in lines[start + 1 : end]]
    section = [line for line in section if not line.startswith("    ")]
    (tmp_path / "image.yaml").write_text("\n".join(["network:", *section]) + "\n")
    assert load_study(tmp_path / "image.yaml", ["search.space={}"]).network == (
        StudyConfig().replaced({"network": {"family": "image"}}).network
    )


def test_one_of_both_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--schema", "--defaults"]):
        assert execute(app, arguments) == 2
        assert "--schema or --defaults: one of them is expected" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_prints_them() -> None:
    finished = run("--schema", module="tuner.config")
    assert (finished.returncode, finished.stderr) == (0, "")
    assert json.loads(finished.stdout) == study_schema()
    assert run("--defaults", module="tuner.config").stdout == defaults_text()
