from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tuner.pages.support import material, record
from tests.tuner.support import kill, read_until, run, start, tiny_study, write_study
from tuner.command import execute
from tuner.config import StudyConfig
from tuner.folder import RunFolder
from tuner.pages.material import Material
from tuner.records import State
from tuner.report import app, page, sections
from tuner.study import Ledger

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028\u202e🛰 'quoted' \"twice\" &amp;"
MEGABYTES = 1_000_000


def ledger_with(folder: Path, *ends: str, **changes: Any) -> Ledger:
    search = {"trials": 20, "sampler": "random"}
    study = tiny_study(folder, search=search, **changes)
    (folder / "config.yaml").write_text(study.to_yaml())
    ledger = Ledger(folder / "study.db", study)
    for index, end in enumerate(ends):
        trial = ledger.ask()
        assert trial is not None
        objective = 2.0 - 0.1 * index
        ledger.report(trial.number, {"epoch": 1, "objective": objective, "skipped_steps": index})
        if end == "done":
            ledger.finish(trial.number, "done", objective=objective)
        elif end in ("pruned", "failed"):
            ledger.finish(trial.number, end, reason="<b>because</b>")  # type: ignore[arg-type]
    return ledger


def page_of(folder: Path, *ends: str, **changes: Any) -> str:
    return page(Material.read(RunFolder(folder), ledger_with(folder, *ends, **changes)))


@pytest.mark.parametrize(
    "ends",
    [
        (),
        ("running",),
        ("failed", "failed"),
        ("done",),
        ("done", "done", "pruned"),
        ("done", "failed", "done", "pruned", "done", "done", "running", "done"),
    ],
    ids=len,
)
def test_a_page_is_drawn_whatever_has_finished(tmp_path: Path, ends: tuple[str, ...]) -> None:
    text = page_of(tmp_path, *ends)
    assert "cannot be drawn" not in text
    assert ("there is no winner" in text) == ("done" not in ends)
    assert ("PED-ANOVA" in text) == (ends.count("done") >= 3)
    for number in range(len(ends)):
        assert f"<td>{number:04d}<td" in text
    for title, _ in sections(StudyConfig()):
        assert f"<h2>{title}</h2>" in text


@pytest.mark.parametrize(
    ("objective", "words"),
    [("nmse", "validation NMSE of R_pred"), ("f1", "1 - F1"), ("gospa", "validation GOSPA [m]")],
)
def test_the_page_says_what_was_minimised(tmp_path: Path, objective: str, words: str) -> None:
    assert f"with the lowest {words}" in page_of(tmp_path, "done", objective=objective)


def test_the_page_says_with_which_command_the_study_goes_on(tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    (tmp_path / "over").mkdir()
    on = f"python -m tuner.run --resume {tmp_path}"
    assert f"<code>{on}/cut</code>" in page_of(tmp_path / "cut", "done", "running")
    assert f"<code>{on}/over --trials 40</code>" in page_of(tmp_path / "over", *["done"] * 20)


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    text = page_of(tmp_path, "done", "done", "done", "done")
    assert "Plotly.react" in text
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.S)  # plotly's own text holds links
    addresses = re.findall(r"(?:src|href|url)\s*[=(]\s*['\"]?([^'\")> ]*)", own)
    assert all(a == "data:," or a.startswith("#") for a in addresses), addresses


def test_reasons_are_shown_as_text(tmp_path: Path) -> None:
    text = page_of(tmp_path, "failed")
    assert "&lt;b&gt;because&lt;/b&gt;" in text
    assert "<b>because</b>" not in text


def test_hostile_names_and_reasons_stay_text(tmp_path: Path) -> None:
    states: list[State] = ["done", "done", "done", "failed", "pruned", "running"]
    trials = [
        record(n, state, node=HOSTILE, reason=HOSTILE, traceback=HOSTILE)
        for n, state in enumerate(states)
    ]
    trials[3].params["network.heads"] = HOSTILE  # what cannot be built fails
    text = page(material(tmp_path, *trials))
    assert "<img" not in text
    # What the page writes itself: a script for each chart, plotly and its own.
    assert text.count("</script>") == text.count("type='application/json'") + 2
    assert "🛰" in text


def test_a_thousand_trials_stay_under_six_megabytes_and_are_drawn_in_seconds(
    tmp_path: Path,
) -> None:
    rng = np.random.default_rng(0)
    states: list[State] = ["done", "pruned", "pruned", "failed"]
    trials = []
    for number in range(1000):
        state = states[int(rng.integers(4))]
        trials.append(
            record(
                number,
                state,
                n_epochs=50 if state == "done" else int(rng.integers(1, 50)),
                begin=float(number // 8 * 510),
                node=f"node-{number % 2}",
                gpu=str(number // 2 % 4),
                level=float(rng.lognormal()),
                budget=50,
                reason=None if state == "done" else f"reason {number % 70}: " + 400 * "x",
                traceback=8000 * "x" if state == "failed" else None,
            )
        )
    found = material(
        tmp_path, *trials, seconds=65_000.0, training={"epochs": 50}, search={"trials": 1000}
    )
    begun = time.process_time()
    text = page(found)
    assert time.process_time() - begun < 20, "of one core; some 3 s where nothing else runs"
    # The scoreboard and the scenes of a real study take some 0.2 MB more.
    assert len(text.encode()) < 5.75 * MEGABYTES
    assert "Of 1,000 trials 300 are drawn" in text


def test_the_command_writes_the_page_beside_the_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger_with(tmp_path, "done").close()
    assert execute(app, [str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert execute(app, [str(tmp_path / "absent")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_the_command_looks_at_a_study_that_runs_and_changes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    study = tiny_study(tmp_path)
    folder = RunFolder.fresh(out)  # locked, as by a driver
    (out / "config.yaml").write_text(study.to_yaml())
    driver = Ledger(out / "study.db", study)
    begun = driver.optuna_study.get_trials()
    assert execute(app, [str(out)]) == 0
    assert driver.optuna_study.get_trials() == begun, "the reader proposed for the driver"
    trial = driver.ask()
    assert trial is not None
    assert trial.params == study.base_point()
    driver.report(trial.number, {"epoch": 1, "objective": 0.5})
    before = [t.user_attrs for t in driver.optuna_study.get_trials()]
    assert execute(app, [str(out)]) == 0
    assert [t.user_attrs for t in driver.optuna_study.get_trials()] == before
    assert "1 unfinished" in (out / "report.html").read_text()
    folder.release()


@pytest.mark.slow
@pytest.mark.long
def test_a_report_can_be_had_while_a_search_runs(tmp_path: Path) -> None:
    config = write_study(tmp_path, training={"epochs": 10_000}, search={"scheduler": "none"})
    search = start("--config", config, "--local", "--out", tmp_path / "run")
    try:
        read_until(search, "epoch 3/10000")
        finished = run(tmp_path / "run", module="tuner.report")
        assert search.poll() is None, "the search has ended"
    finally:
        kill(search)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.strip() == str(tmp_path / "run" / "report.html")
    text = (tmp_path / "run" / "report.html").read_text()
    assert "of 1 trial, 1 unfinished" in text
    assert "No trial has finished" in text
    assert "in 1 slot at 1 place" in text


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("evaluation.json", "{", "No evaluation.json"),
        ("evaluation.json", "[]", "No evaluation.json"),
        ("evaluation.json", json.dumps({"suites": {}}), "evaluation.json is of another form"),
        ("scenes.json", "\x00", "No scenes.json"),
        ("scenes.json", json.dumps({"views": []}), "scenes.json is of another form"),
    ],
)
def test_damaged_files_beside_the_ledger_cost_their_section_alone(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    (tmp_path / name).write_text(text)
    assert words in page_of(tmp_path, "done")


def test_a_scoreboard_of_an_earlier_winner_is_told_as_such(tmp_path: Path) -> None:
    found = material(tmp_path, record(0), record(1, level=0.5))
    config = found.study.trial_config(record(1).params, 1).model_dump(mode="json")
    assert found.is_of_winner(config)
    earlier = found.study.trial_config(record(0).params, 0).model_dump(mode="json")
    assert not found.is_of_winner(earlier)
    assert not material(tmp_path, record(0, "failed")).is_of_winner(config)
