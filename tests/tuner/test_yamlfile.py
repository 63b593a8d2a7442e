from __future__ import annotations

from pathlib import Path

import pytest

from tuner.config import load_study
from tuner.errors import ConfigError
from tuner.yamlfile import dump_yaml, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E5", 1e5), ("-2e+2", -200.0), (".5", 0.5), ("3.", 3.0), ("1.5e-7", 1.5e-7)],
)
def test_exponents_without_a_dot_are_numbers(text: str, value: float) -> None:
    read = parse_yaml(text, "x")
    assert isinstance(read, float)
    assert read == value


@pytest.mark.parametrize(("text", "value"), [("12", 12), ("e3", "e3"), ("1e", "1e"), ("~", None)])
def test_what_is_no_float_stays_what_it_is(text: str, value: object) -> None:
    assert parse_yaml(text, "x") == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("False", False), ("off", "off"), ("on", "on"), ("no", "no"), ("Yes", "Yes")],
)
def test_truth_values_are_true_and_false_alone(text: str, value: object) -> None:
    read = parse_yaml(text, "x")
    assert (type(read), read) == (type(value), value)
    assert parse_yaml(dump_yaml({"x": value}), "x") == {"x": value}


def test_mixed_precision_is_switched_off_by_its_word(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("precision:\n  amp: off\n")
    assert load_study(path).precision.amp == "off"
    assert load_study(None, ("precision.amp=off",)).precision.amp == "off"


def test_a_key_given_twice_is_refused_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"s.yaml, line 3, column 3: .*'epochs' is given twice"):
        parse_yaml("training:\n  epochs: 1\n  epochs: 2\n", "s.yaml")


def test_a_syntax_error_is_one_line_with_its_place() -> None:
    with pytest.raises(
        ConfigError, match=r"study.yaml, line \d+, column \d+: not valid YAML"
    ) as caught:
        parse_yaml("a: [1, 2\nb: 3\n", "study.yaml")
    assert "\n" not in str(caught.value)


def test_a_python_object_is_refused() -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_yaml("a: !!python/object/apply:os.system ['true']", "x")


def test_a_missing_file_a_folder_and_foreign_bytes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        read_yaml(tmp_path)
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="not a text file"):
        read_yaml(path)
    path.write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match="holds a list"):
        read_yaml(path)


def test_a_tilde_that_no_shell_has_seen_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "study.yaml").write_text("search: {trials: 3}\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_yaml(Path("~/study.yaml")) == {"search": {"trials": 3}}
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file"):
        read_yaml(Path("~/absent.yaml"))


def test_a_file_whose_name_begins_with_a_tilde_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "~nobody-of-this-name").write_text("")
    monkeypatch.chdir(tmp_path)
    assert read_yaml(Path("~nobody-of-this-name")) == {}


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert read_yaml(path) == {}


def test_floats_survive_a_round_trip_exactly() -> None:
    values = {"a": 1e-3, "b": 1 / 3, "c": 1e22, "d": 5e-324}
    assert parse_yaml(dump_yaml(values), "x") == values
