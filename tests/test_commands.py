"""Every command and every block of Python in the documentation runs, in the order of the pages.

They run word for word in a copy of the repository, with a Ray, a PostgreSQL and an S3 store of
their own. What makes them short: the copy's studies are small (`SMALL`), and a few commands get
options that they are followed by here (`RUN`). What needs other machines, or would install
packages, is named in `ELSEWHERE` with the check that is left. A command that is in neither list
fails, and so does an entry that no command needs.

Later blocks find what earlier ones made: run them all, or a page with what it builds upon.
"""

from __future__ import annotations

import re
import shlex
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import optuna
import pytest
import typer
import yaml
from packaging.requirements import Requirement
from ray.scripts.scripts import cli as ray_cli

from tests.cluster_files import check_schema, read
from tests.pages import ROOT, Block, blocks
from tests.sandbox import Sandbox, sandbox
from tuner.config import load_study
from tuner.run import app

Check = Callable[[str, Sandbox], None]


@dataclass(frozen=True)
class Run:
    """Commands that run, with what is added to make them short."""

    pattern: str
    added: str = ""


@dataclass(frozen=True)
class Elsewhere:
    """Commands that cannot run here, and what is looked at in their place."""

    pattern: str
    check: Check


def cluster_file(command: str, _: Sandbox) -> None:
    """Ray knows the command and its options, and the file fits its schema."""
    words = shlex.split(command)
    known: click.Command = ray_cli
    for word in words[1:]:
        if isinstance(known, click.Group):
            known = known.commands[word]
        elif word.startswith("--"):
            assert any(word in p.opts + p.secondary_opts for p in known.params), word
        elif word.endswith(".yaml"):
            check_schema(read(word))


def understood(command: str, sandbox: Sandbox) -> None:
    """The tuner takes the options, and the study with them is a valid one."""
    given = typer.main.get_command(app).make_context("run", shlex.split(command)[3:]).params
    study = load_study(
        sandbox.tree / given["config"],
        given["set_"] or (),
        resources__gpus_per_trial=given["gpus_per_trial"],
        search__time_budget=given["time_budget"],
    )
    assert study.resources.gpus_per_trial == given["gpus_per_trial"]


def installed_by_pip(command: str, _: Sandbox) -> None:
    """What is asked for is well-formed, and extras of ours exist."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in shlex.split(command)[2:]:
        wanted = Requirement(word)
        if wanted.name == project["name"]:
            assert wanted.extras <= set(project["optional-dependencies"]), word


def event_files(command: str, sandbox: Sandbox) -> None:
    """The folder that TensorBoard would read holds the events of trials."""
    folder = shlex.split(command)[shlex.split(command).index("--logdir") + 1]
    assert list((sandbox.tree / folder).glob("trial-*/events.out.*")), folder


def optuna_study(command: str, sandbox: Sandbox) -> None:
    """The URL is that of an Optuna study in SQLite."""
    path = sandbox.tree / shlex.split(command)[1].removeprefix("sqlite:///")
    assert sqlite3.connect(path).execute("select count(*) from trials").fetchone()[0] > 0
    assert optuna.get_all_study_names(f"sqlite:///{path}")


def image(command: str, _: Sandbox) -> None:
    """The Dockerfile is there, and the tag is the one that the manifest takes."""
    words = shlex.split(command)
    if "-f" in words:
        assert (ROOT / words[words.index("-f") + 1]).is_file()
    tag = words[words.index("-t") + 1] if "-t" in words else words[-1]
    name, _, version = tag.rpartition("/")[2].partition(":")
    manifest = (ROOT / "deploy" / "kuberay.yaml").read_text(encoding="utf-8")
    assert re.search(rf"image: \S*/{name}:{re.escape(version)}\s", manifest), tag


def manifest(command: str, _: Sandbox) -> None:
    """What kubectl is asked for stands in the manifest, or is made of it by KubeRay."""
    text = (ROOT / "deploy" / "kuberay.yaml").read_text(encoding="utf-8")
    kinds = {(d["kind"], d["metadata"]["name"]) for d in yaml.safe_load_all(text) if d}
    words = shlex.split(command)
    if words[1] == "apply":
        assert (ROOT / words[words.index("-f") + 1]).is_file()
    elif words[1] in ("get", "describe") and words[2] != "secret":
        for kind in words[2].split(","):
            assert kind == "pods" or kind in {held.lower() for held, _ in kinds}, kind
        assert len(words) == 3 or ("RayJob", words[3]) in kinds, kinds
    elif words[1] == "get":  # KubeRay's secret is called as the cluster
        assert ("RayCluster", words[3]) in kinds, kinds
        assert "mode: token" in text
    elif words[1] == "exec":
        assert ("RayCluster", words[2][len("service/") : -len("-head-svc")]) in kinds, kinds
        assert f"name: {words[words.index('-c') + 1]}\n" in text
        (out,) = re.findall(r"--out (\S+)", text)
        assert words[words.index("cat") + 1] == f"{out}/report.html"
    elif words[1] == "delete":
        assert ("RayJob", words[3]) in kinds, kinds
    elif words[1] == "logs" and "-c" in words:
        assert words[words.index("-c") + 1] == "autoscaler", "KubeRay's name of it"
        assert "enableInTreeAutoscaling: true" in text
        assert ("RayCluster", words[2][len("service/") : -len("-head-svc")]) in kinds, kinds
    elif words[1] == "logs":
        job = words[words.index("-l") + 1].removeprefix("job-name=")
        assert ("Job", job) in kinds or ("RayJob", job) in kinds, kinds
    else:
        cluster = words[2].removeprefix("service/").removesuffix("-head-svc")
        assert ("RayCluster", cluster) in kinds, kinds


RUN = (
    Run(r"make run\b"),
    Run(r"make test$", 'ARGS="-q tests/physics/test_geometry.py"'),
    Run(r"make (lint|format|docs)$"),
    Run(r"python -m tuner\.run .*--dry-run"),
    Run(r"python -m tuner\.run --resume (?!.*--trials)"),
    Run(r"python -m tuner\.run --resume .*--trials", "--trials 3"),
    Run(r"python -m pdb "),
    Run(r"python -m tuner\.run .*scheduler=pbt", "--trials 10"),  # a whole population
    Run(r"python -m tuner\.run (?!.*--resume)", "--trials 2"),
    Run(r"python -m tuner\.(status|config|report) "),
    Run(r"python -m tuner\.evaluate .*--data "),
    Run(r"python -m tuner\.evaluate (?!.*--data )", "--scenes 8"),
    Run(r"python -m model\.locate "),
    Run(
        r"python -m benchmarks\.quality tuning ",
        "--seeds 1 --random 1 --scenes 16 --jobs 1 --threads 1",
    ),
    Run(r"create(user|db) "),
    Run(r"python3 tools/ensure_venv\.py "),  # the copy has its environment: see furnish
    Run(r"ray get-auth-token "),
    Run(r"(export|mkdir -p|chmod) "),
    Run(r"ray job (submit|logs|stop) "),
    Run(r"ray exec \S+\.yaml (--tmux )?'"),  # what is in the quotes, here instead of on the head
)

ELSEWHERE = (
    Elsewhere(
        r"ray (up|down|dashboard|monitor|rsync-down|start) ", cluster_file
    ),  # machines or a cloud
    Elsewhere(r"python -m tuner\.run .*--gpus-per-trial ", understood),  # a GPU
    Elsewhere(r"pip install ", installed_by_pip),  # would change the environment of the tests
    Elsewhere(r"tensorboard ", event_files),  # not installed; serves until it is stopped
    Elsewhere(r"optuna-dashboard ", optuna_study),  # the same
    Elsewhere(r"docker (build|push) ", image),
    Elsewhere(r"kubectl (apply|delete|describe|exec|get|logs|port-forward) ", manifest),
)

# What a reader has when a page begins, for blocks of Python that use it.
GIVEN = {
    "README.md": """\
import numpy as np, torch
held = np.load("snapshots.npz")
y, H, codes = (torch.from_numpy(held[name][0]) for name in ("y", "H", "codes"))
""",
}

RUNNING = [b for b in blocks() if b.commands() or b.language == "python"]


def entry_for(command: str) -> Run | Elsewhere:
    """The first entry that a command is for."""
    return next(e for e in (*ELSEWHERE, *RUN) if re.match(e.pattern, command))


def test_every_command_is_run_or_named_as_one_that_cannot_be() -> None:
    for block in RUNNING:
        for command in block.commands():
            assert any(re.match(e.pattern, command) for e in (*RUN, *ELSEWHERE)), (
                f"{block}: nothing says how to run {command!r}; see RUN and ELSEWHERE"
            )


def test_no_entry_is_left_of_commands_that_are_gone() -> None:
    used = {entry_for(command) for block in RUNNING for command in block.commands()}
    assert set(RUN) | set(ELSEWHERE) == used
    assert set(GIVEN) <= {block.page for block in RUNNING if block.language == "python"}


@pytest.fixture(scope="module")
def place(origin_shards: Path) -> Iterator[Sandbox]:
    """A copy of the repository with a Ray, a PostgreSQL and an S3 store."""
    with sandbox(origin_shards.resolve()) as made:
        yield made


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("block", RUNNING, ids=str)
def test_a_block_does_what_the_page_says(block: Block, place: Sandbox) -> None:
    place.turn_to(block.page)
    if block.language == "python":
        place.python(GIVEN.get(block.page, "") + block.text)
    for command in block.commands():
        entry = entry_for(command)
        if isinstance(entry, Elsewhere):
            entry.check(command, place)
        else:
            printed = place.shell(command, entry.added, typed=block.typed())
            for said in block.says():
                assert said in printed, printed
