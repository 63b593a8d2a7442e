"""The documentation says what the code does."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import click
import pytest
import typer
import yaml
from pydantic import Field
from ray.scripts.scripts import cli as ray_cli

from model.plugin import ImportPath
from physics.config import Adjustable
from tests.pages import LANGUAGES, PAGES, ROOT, Block, blocks, name_of
from tuner.config import StudyConfig, load_study
from tuner.explain import field_paths
from tuner.gauges import COUNTERS, GAUGES, PREFIX
from tuner.run import app


def test_the_configuration_page_is_up_to_date() -> None:
    from tools.configuration_reference import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page(), (
        "run python -m tools.configuration_reference --write"
    )


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        (float | None, "number or null"),
        (Annotated[float, Field(ge=0)] | None, "number or null"),
        (ImportPath | None, "text or null"),
        (Adjustable[int], "integer"),
        (tuple[Annotated[float, Field(ge=0)], ...], "[number, …]"),
    ],
)
def test_the_configuration_page_names_the_type_and_not_how_it_is_annotated(
    annotation: Any, name: str
) -> None:
    from tools.configuration_reference import type_name

    assert type_name(annotation) == name


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_to_files_that_exist(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_commands_name_modules_and_files_that_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for module in re.findall(r"python -m ((?:tuner|model|benchmarks|tools)\.\w+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module
    for config in re.findall(r"configs/[\w-]+\.yaml", text):
        assert (ROOT / config).exists(), config


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_results_that_are_named_are_kept(path: Path) -> None:
    for name in re.findall(r"benchmarks/results/[\w-]+\.json", path.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), name


def test_the_command_that_records_curves_has_the_folder_that_it_needs() -> None:
    text = (ROOT / "docs" / "search-figures.md").read_text(encoding="utf-8")
    recorded = re.findall(r"python -m benchmarks\._curves record([^`]*)`", text)
    assert recorded
    assert all(re.match(r" \w", arguments) for arguments in recorded)


def test_every_block_says_what_it_holds() -> None:
    assert {str(block) for block in blocks() if block.language not in LANGUAGES} == set()


# YAML of others: the first key of each.
FOREIGN_YAML = {"scrape_configs", "apiVersion"}


@pytest.mark.parametrize("block", [b for b in blocks() if b.language == "yaml"], ids=str)
def test_a_piece_of_yaml_is_a_valid_piece_of_a_study(block: Block, tmp_path: Path) -> None:
    content = yaml.safe_load(block.text)
    if FOREIGN_YAML & content.keys():
        return
    if all("." in key for key in content):  # what stands in a search space
        content = {"search": {"space": content}}
    # The default space is for the default network.
    space = {"training.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2}}
    content["search"] = {"space": space} | content.get("search", {})
    path = tmp_path / "piece.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    load_study(path)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_the_tuners_commands_have_only_options_that_it_knows(path: Path) -> None:
    for line in (command for block in blocks(path) for command in block.commands()):
        for given in re.findall(r"python -m tuner\.run ([^#]*)", line):
            if given.count("'") % 2:  # the end of a command within quotes
                given = given.rstrip().removesuffix("'")
            arguments = shlex.split(given)
            typer.main.get_command(app).make_context("run", arguments)  # raises


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_rays_commands_and_their_options_exist_in_this_ray(path: Path) -> None:
    for line in (command for block in blocks(path) for command in block.commands()):
        if not line.startswith("ray "):
            continue
        words = shlex.split(line.partition(" -- ")[0], comments=True)
        command: click.Command = ray_cli
        for word in words[1:]:
            if isinstance(command, click.Group):
                assert word in command.commands, line
                command = command.commands[word]
            elif word.startswith("--"):
                assert any(word in p.opts + p.secondary_opts for p in command.params), line
            elif word.endswith(".yaml"):
                assert (ROOT / word).exists(), line


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_a_page_that_launches_on_aws_says_first_what_that_needs(path: Path) -> None:
    typed = [command for block in blocks(path) for command in block.commands()]
    if "ray up cluster.yaml" in typed:
        before = typed[: typed.index("ray up cluster.yaml")]
        assert "python3 tools/ensure_venv.py --extra aws" in before
        assert "ray get-auth-token --generate" in before


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_a_study_that_is_started_from_afar_outlives_the_connection(path: Path) -> None:
    for command in (command for block in blocks(path) for command in block.commands()):
        if command.startswith("ray exec") and "tuner.run" in command:
            assert " --tmux " in command, command


def test_a_folder_is_there_before_something_is_copied_into_it() -> None:
    for path in PAGES:
        typed = [command for block in blocks(path) for command in block.commands()]
        for at, command in enumerate(typed):
            if command.startswith("ray rsync-down"):
                parent = Path(shlex.split(command)[-1]).parent
                assert f"mkdir -p {parent}" in typed[:at], command


def test_the_operations_page_names_every_metric_and_no_other() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    exported = {f"ray_{PREFIX}{name}" for name in GAUGES}
    exported |= {f"ray_{PREFIX}{name}_total" for name in COUNTERS}
    assert set(re.findall(r"ray_ristune_\w+", text)) == exported


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


def _citations(docstring: str) -> set[str]:
    """What must stand in the references: quoted titles of sources, and (author, year)."""
    flat = " ".join(docstring.split())
    found = set()
    for source in re.findall(r"(?:Source: |\([A-Z][a-z]+ and [A-Z][a-z]+, \").*", flat):
        found |= {title.rstrip(",.") for title in re.findall(r'"([A-Z][^"]{8,})"', source)}
    for authors, year in re.findall(r"([A-Z]\w+(?: and [A-Z]\w+)?), (\d{4})\b", flat):
        found.add(f"{authors} ({year})")
    return found


def test_every_source_that_a_docstring_cites_is_listed_in_the_references() -> None:
    text = " ".join((ROOT / "docs" / "references.md").read_text(encoding="utf-8").split())
    listed = text.replace("ä", "a").replace("ü", "u").lower()
    cited = set()
    for path in (
        p for package in ("physics", "model", "tuner") for p in (ROOT / package).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                cited |= _citations(ast.get_docstring(node) or "")
    assert len(cited) > 20
    assert {citation for citation in cited if citation.lower() not in listed} == set()


def test_the_monitor_finds_every_pod_of_the_cluster_and_its_port() -> None:
    text = (ROOT / "deploy" / "kuberay.yaml").read_text(encoding="utf-8")
    (cluster,) = [m for m in yaml.safe_load_all(text) if m["kind"] == "RayCluster"]
    shown = [
        yaml.safe_load(b.text)
        for b in blocks(ROOT / "docs" / "operations.md")
        if b.language == "yaml"
    ]
    (monitor,) = [m for m in shown if m.get("kind") == "PodMonitor"]
    # A label that KubeRay gives every pod of a cluster.
    wanted = {"ray.io/cluster": cluster["metadata"]["name"]}
    assert monitor["spec"]["selector"]["matchLabels"] == wanted
    (port,) = [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]]
    for group in (cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert port in {named["name"] for named in container["ports"]}, container["name"]


def test_who_installs_by_hand_reads_which_driver_a_gpu_needs() -> None:
    image = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    (needed,) = re.findall(r"driver has to be (\d+) or newer", image)
    for name in ("README.md", "docs/getting-started.md", "docs/how-to/on-prem.md"):
        text = " ".join((ROOT / name).read_text(encoding="utf-8").split())
        assert re.search(rf"NVIDIA driver \(?{needed} or newer", text), name
