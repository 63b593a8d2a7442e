"""What each section says of studies of every kind."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.tuner.pages.support import material, record
from tests.tuner.pages.test_chart import content
from tuner.limits import Ended
from tuner.pages.failures import failures, numerics
from tuner.pages.history import history, learning_curves
from tuner.pages.overview import overview, tiles, winner
from tuner.pages.parameters import importances, parallel
from tuner.pages.scenes import scenes
from tuner.pages.scoreboard import scoreboard
from tuner.pages.timeline import timeline
from tuner.pages.trials import trials
from tuner.records import Heir
from tuner.suites import CHOOSERS


def charts(text: str) -> list[dict[str, Any]]:
    found = re.findall(r"<script type='application/json'>(.*?)</script>", text)
    return [json.loads(part) for part in found]


def test_the_overview_says_what_was_asked_and_found(tmp_path: Path) -> None:
    text = overview(
        material(tmp_path, record(0), record(1, "pruned"), record(2, "failed"), record(3))
    )
    assert "the snapshot network with the lowest validation NMSE of R_pred" in text
    assert "over 3 parameters; 3 trials of at most 2 epochs, proposed by TPE" in text
    assert "of 4 trials, 2 done, 1 stopped early and 1 failed" in text
    best = record(3).objective
    assert best is not None
    assert (
        f"The best is trial 0003 with {best:.5g}, {1 - best / 9:.0%} below untrained networks"
        in text
    )


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("gospa", "validation GOSPA [m] 2.55, F1 0.500, NMSE of R_pred 2.550"),
        ("nmse", "validation NMSE of R_pred 2.55, F1 0.500, GOSPA [m] 1.500"),
        (
            "f1",
            "1 - F1 on the validation scenes 2.55, F1 0.500, GOSPA [m] 1.500, NMSE of R_pred 2.550",
        ),
    ],
)
def test_what_the_winner_scores_is_said_once(tmp_path: Path, objective: str, said: str) -> None:
    text = overview(material(tmp_path, record(3), objective=objective))
    assert f"{said}<" in html.unescape(text)


def test_untrained_networks_are_those_of_all_trials(tmp_path: Path) -> None:
    """The winner's own weights may have been lucky to begin with."""
    trials = [record(i, metrics={"untrained_objective": v}) for i, v in enumerate((9.0, 8.0, 2.6))]
    text = overview(material(tmp_path, *trials))
    winner = min(t.objective for t in trials if t.objective is not None)
    assert f"{1 - winner / 8:.0%} below untrained networks" in text


def test_a_sampler_that_proposed_nothing_is_not_said_to(tmp_path: Path) -> None:
    search = {"sampler": "gp", "trials": 6, "startup_trials": 6}
    assert "proposed by chance" in overview(material(tmp_path, record(0), search=search))
    search["trials"] = 7
    assert "proposed by a Gaussian process" in overview(
        material(tmp_path, record(0), search=search)
    )


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ({}, "stopped early by ASHA, trained"),
        ({"least_chance": 0.05}, "stopped early by ASHA and by a chance to win below 5 %, trained"),
        (
            {"least_chance": 0.1, "scheduler": "none"},
            "stopped early by a chance to win below 10 %, trained",
        ),
    ],
)
def test_the_overview_says_who_stops_trials(
    tmp_path: Path, search: dict[str, Any], words: str
) -> None:
    assert words in overview(material(tmp_path, record(0), search=search))


def test_the_overview_says_what_the_search_gained_over_the_studys_own_values(
    tmp_path: Path,
) -> None:
    own = material(tmp_path).study.base_point()
    assert len(own) == 3
    for state, level, said in (
        ("done", 4.0, "That is 57.5% below the study's own values (trial 0000), 6."),
        ("done", 0.1, "It ran the study's own values: none that the search proposed did better."),
        ("pruned", 4.0, "Trial 0000 ran the study's own values: stopped early."),
    ):
        start = record(0, state, params=own, level=level)  # type: ignore[arg-type]
        assert said in html.unescape(overview(material(tmp_path, start, record(3))))
    assert "own values" not in overview(material(tmp_path, record(0), record(3)))
    start = record(0, params=own, level=4.0)
    likely = overview(material(tmp_path, start, record(3), objective="nll"))
    assert " nat below untrained networks" in likely
    assert "That is 3.45 nat below the study's own values" in html.unescape(likely)


def test_the_overview_puts_the_winner_beside_nomp_with_intervals(tmp_path: Path) -> None:
    config = material(tmp_path).study.trial_config(record(0).params, record(0).seed)
    numbers = {"f1": 0.7, "gospa_m": 1.4}
    suite: dict[str, Any] = {
        "scenes": "256 simulated",
        "methods": {name: {"overall": numbers} for name in ("network", "nomp")},
        "paired_f1": {"nomp": {"network": {"difference": 0.05, "interval": [0.01, 0.09]}}},
        "paired_gospa_m": {"nomp": {"network": {"difference": -0.2, "interval": [-0.3, -0.1]}}},
    }
    evaluation = {"config": config.model_dump(mode="json"), "suites": {"nominal": suite}}
    text = overview(material(tmp_path, record(0), evaluation=evaluation))
    difference = "the difference with its 95 % interval: F1 +0.050 [+0.010, +0.090]"
    assert f"{difference}, GOSPA -0.200 [-0.300, -0.100] m." in text
    del suite["paired_gospa_m"]  # as an earlier version wrote it
    assert f"{difference}." in overview(material(tmp_path, record(0), evaluation=evaluation))
    assert "On other scenes" in text
    assert "best of many" not in text, "of one trial it is not"
    assert "best of many" in overview(material(tmp_path, record(0), record(1)))
    suite["scenes"] = f"8 of data/val ({CHOOSERS})"
    assert "On the validation scenes (8 of data/val" in overview(
        material(tmp_path, record(0), evaluation=evaluation)
    )


def test_scores_of_a_winner_that_ran_out_of_memory_once_are_its_own(tmp_path: Path) -> None:
    best = record(0, level=0.1, accumulation=2)
    found = material(tmp_path, best)
    halved = found.study.trial_config(best.params | {"training.accumulation": 2}, best.seed)
    assert found.is_of_winner(halved.model_dump(mode="json"))
    text = winner(found)
    assert "they are in 2 parts" in text
    assert (
        "training.accumulation<td class='text'><del>1</del> → <ins>2</ins><td class='text'>memory"
        in text
    )


def test_the_overview_says_how_one_goes_on(tmp_path: Path) -> None:
    place = "'my runs'/x"
    resume = f"python -m tuner.run --resume {place}"
    search = material(tmp_path).study.search
    more = f"{resume} --trials 9"
    locate, train = f"--checkpoint {place}/best", f"tuner.train --from {place}"
    for best, ended, full_epochs, said, unsaid in (
        (True, Ended("all trials have run", "--trials 9"), 9, [more, train, locate], "cut"),
        (True, Ended("the time is up", "--time-budget none"), None,
         [f"{resume} --time-budget none", locate], "tuner.train"),
        (True, Ended("every point has run"), 9, [train, locate], "--resume"),
        (True, None, 9, [resume, "if it was cut", train], "--trials"),
        (False, None, 9, [resume, "if it was cut"], "--checkpoint"),
    ):  # fmt: skip
        found = material(tmp_path, record(0, "done" if best else "failed"))
        changed = search.model_copy(update={"full_epochs": full_epochs})
        study = found.study.model_copy(update={"search": changed})
        text = overview(dataclasses.replace(found, study=study, place=place, ended=ended))
        text = html.unescape(text)
        assert all(words in text for words in said), (said, text)
        assert unsaid not in text


def test_an_overview_without_a_winner_says_so(tmp_path: Path) -> None:
    assert "no trial has started" in overview(material(tmp_path))
    assert "there is no winner" in overview(material(tmp_path, record(0, "failed")))
    assert "there is no winner" in winner(material(tmp_path, record(0, "running")))
    assert "best objective" in tiles(material(tmp_path))


def test_the_winners_configuration_is_a_difference_from_the_defaults(tmp_path: Path) -> None:
    # The study has 2 heads itself; beta is 0.3 by default.
    params = {"network.heads": 2, "training.learning_rate": 0.005, "blend.beta": 0.3}
    text = winner(material(tmp_path, record(0, level=0.1, params=params), record(1)))
    rows = re.findall(
        r"<tr><td class='text'>([\w.]+)<td class='text'>(.*?)<td class='text'>([\w, ]+)", text
    )
    assert [name for name, _, who in rows if who == "study, searched"] == ["network.heads"]
    assert [name for name, _, who in rows if who == "search"] == ["training.learning_rate"]
    assert "Searched, and at their defaults: blend.beta" in text
    study = {name: change for name, change, who in rows if who == "study"}
    assert study["network.width"] == "<del>64</del> → <ins>8</ins>"
    assert "training.gradient_clip" not in text, "it is the default"
    assert "seed" not in study
    assert "class='scroll whole'" in text, "a box that shows a part looks like the whole"


def test_another_family_is_compared_with_its_own_sizes(tmp_path: Path) -> None:
    study = material(tmp_path, record(0)).study
    data = study.model_dump() | {"network": {"family": "image", "azimuth_cells": 4}}
    changed = type(study).model_validate(data)
    trial = record(0, params={"blend.beta": 0.2})
    text = winner(dataclasses.replace(material(tmp_path, trial), study=changed))
    assert "<del>snapshot</del> → <ins>image</ins>" in text
    network = re.findall(r"<td class='text'>(network\.\w+)", text)
    assert sorted(network) == ["network.azimuth_cells", "network.family"]


def test_the_history_marks_states_and_follows_the_best(tmp_path: Path) -> None:
    found = material(
        tmp_path, record(0, level=2.0), record(1, "pruned", level=0.1, n_epochs=1),
        record(2, level=1.0), record(3, level=1.5), record(4, "failed", level=0.1),
    )  # fmt: skip
    figure = charts(history(found))[0]
    traces = {trace["name"]: trace for trace in figure["data"]}
    assert traces["stopped early"]["x"] == [1]
    assert traces["failed"]["x"] == [4]
    assert traces["best so far"]["x"] == [0, 2, 4]
    assert figure["layout"]["yaxis"]["title"]["text"] == "validation NMSE of R_pred"
    values = [record(0, level=2.0).objective, record(2, level=1.0).objective]
    assert traces["best so far"]["y"] == pytest.approx([*values, values[-1]])


def test_rungs_show_who_was_stopped_and_where_the_cut_is(tmp_path: Path) -> None:
    levels = [1.0, 2.0, 3.0, 4.0]
    found = material(
        tmp_path,
        *(record(n, "done" if n < 2 else "pruned", level=level, n_epochs=4 if n < 2 else 1,
                 budget=4) for n, level in enumerate(levels)),
        training={"epochs": 4}, search={"reduction_factor": 2, "grace_epochs": 1},
    )  # fmt: skip
    text = history(found)
    figure = charts(text)[1]
    traces = {trace["name"]: trace for trace in figure["data"]}
    assert sorted(traces["stopped here"]["customdata"]) == [2, 3]
    assert sorted(traces["went on"]["customdata"]) == [0, 0, 1, 1]  # at rungs 1 and 2
    assert figure["layout"]["xaxis"]["ticktext"] == ["1", "2"]
    # Objective after an epoch is level * (1 + 1 / epoch); the cut-off of halving is the median.
    assert traces["cut-off"]["y"] == pytest.approx([5.0, 5.0, None, 2.25, 2.25, None])
    assert "after epoch 1 2 of 4 stopped; after epoch 2 0 of 2 stopped" in text


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ({"scheduler": "none"}, "No scheduler stops trials"),
        ({"scheduler": "none", "least_chance": 0.05}, "end better than the best is below 5 %"),
        ({"scheduler": "median", "grace_epochs": 2}, "after any epoch from 2 on"),
        ({"grace_epochs": 9}, "leaves no room for rungs"),
    ],
)
def test_a_study_without_rungs_says_why(tmp_path: Path, search: dict[str, Any], words: str) -> None:
    text = history(material(tmp_path, record(0), search=search))
    assert words in text
    assert len(charts(text)) == 1


def test_learning_curves_end_with_the_mark_of_their_state(tmp_path: Path) -> None:
    figure = content(
        learning_curves(
            material(tmp_path, record(0, level=0.5), record(1), record(2, "pruned", n_epochs=1))
        )
    )
    ends = {t["name"]: t for t in figure["data"] if t["mode"] == "markers"}
    assert ends["stopped early"]["marker"]["symbol"] == "x"
    assert ends["stopped early"]["x"] == [1]
    assert ends["done"]["customdata"] == [1]
    assert figure["data"][-1]["name"] == "winner, trial 0000"


def test_importances_need_three_finished_trials_that_differ(tmp_path: Path) -> None:
    few = material(tmp_path, record(0), record(1), record(2, "pruned"))
    assert "from 3 finished trials on; there are 2" in importances(few)
    assert "from 3 finished trials on; there are 2" in parallel(few)
    heir = Heir(donor=0, epoch=1, location="there", replaces=1, changed={})
    heirs = material(tmp_path, record(0), *(record(n, heir=heir) for n in range(2, 6)))
    told = "there are 1, beside 4 that began with another trial's weights"
    assert told in importances(heirs).replace("&#x27;", "'")
    assert told in parallel(heirs).replace("&#x27;", "'")
    same = [record(n, params=record(0).params) for n in range(4)]
    assert "No parameter took more than one value" in parallel(material(tmp_path, *same))
    text = importances(material(tmp_path, *(record(n) for n in range(12))))
    assert "cannot be drawn" not in text
    weights = charts(text)[0]["data"][0]
    assert sum(weights["x"]) == pytest.approx(1.0, abs=1e-4)
    assert len(charts(text)) == 1 + 3


def test_parallel_coordinates_put_the_best_on_top_and_name_whole_parameters(
    tmp_path: Path,
) -> None:
    found = material(tmp_path, *(record(n, level=1.0 + n) for n in range(10)))
    figure = content(parallel(found))
    assert figure["layout"]["xaxis"]["ticktext"] == [
        "objective", "blend.<br>beta", "network.<br>heads", "training.<br>learning_rate",
    ]  # fmt: skip
    last = figure["data"][-1]
    assert last["line"]["color"] == "var(--rank-0)"
    assert last["y"][0] == 0.0, "the best objective is lowest"
    assert {t["line"]["color"] for t in figure["data"]} == {f"var(--rank-{n})" for n in range(5)}


def test_the_timeline_has_a_lane_for_every_gpu_of_every_node(tmp_path: Path) -> None:
    running = [
        record(2 * n + g, node=f"node-{n}", gpu=str(g), begin=0.0, state="running" if g else "done")
        for n in range(2)
        for g in range(2)
    ]
    text = timeline(material(tmp_path, *running, seconds=40.0))
    figure = content(text)
    lanes = figure["layout"]["yaxis"]["categoryarray"]
    assert lanes == ["node-1 GPU 1", "node-1 GPU 0", "node-0 GPU 1", "node-0 GPU 0"]
    assert sorted(bar["name"] for bar in figure["data"]) == ["done", "unfinished"]
    assert {x for bar in figure["data"] for x in bar["x"]} == {20_000}  # [ms]
    assert text.count("<td class='text'>50%") == 4
    assert "in 4 slots at 4 places, training 50% of the time" in text


def test_failures_are_grouped_by_reason_with_the_traceback(tmp_path: Path) -> None:
    trials = [record(n, "failed", reason="diverged: <b>NaN</b>", traceback="Trace <x>", n_epochs=n)
              for n in range(3)]  # fmt: skip
    text = failures(material(tmp_path, *trials, record(3, "failed", reason="data: gone")))
    assert "4 trials failed, for 2 reasons" in text
    assert text.count("<tr><td") == 2
    assert "diverged: &lt;b&gt;NaN&lt;/b&gt;" in text
    assert "<pre>Trace &lt;x&gt;</pre>" in text
    assert "0000, 0001, 0002" in text
    assert "0 to 2" in text
    assert "None of 1 trial failed" in failures(material(tmp_path, record(0)))


def test_numerics_count_skipped_steps_once_and_fallbacks_of_every_epoch(tmp_path: Path) -> None:
    trial = record(0, metrics={"skipped_steps": 3, "solver_fallbacks": 5})
    text = numerics(material(tmp_path, trial, record(1)))
    assert "3 optimiser steps skipped" in text, "they are counted over epochs already"
    assert "10 scenes served by the SVD" in text, "they are those of an epoch"
    figures = charts(text)
    assert len(figures) == 3
    assert figures[2]["data"][0]["y"] == [3]
    assert figures[2]["data"][1]["y"] == [10]
    assert len(charts(numerics(material(tmp_path, record(1))))) == 2


def test_a_gradient_norm_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    broken = record(0, metrics={"grad_norm": float("inf"), "grad_norm_max": float("nan")})
    text = numerics(material(tmp_path, broken))
    assert "Mean gradient norm of an epoch: not reported" in text
    assert charts(text) == []


def test_the_table_keeps_the_best_and_the_latest_of_many(tmp_path: Path) -> None:
    every = [record(n, level=1.0 + n) for n in range(200)] + [
        record(n, "pruned") for n in range(200, 900)
    ]
    text = trials(material(tmp_path, *every))
    numbers = [int(n) for n in re.findall(r"<tr(?: class='best')?><td>(\d{4})", text)]
    assert numbers == [*range(150), *range(750, 900)]
    assert "The best 150 and the latest of 900 trials" in text
    assert re.search(r"<tr class='best'><td>0000", text)


@pytest.mark.parametrize(
    "draw",
    [overview, winner, scoreboard, scenes, history, learning_curves, importances, parallel,
     timeline, failures, numerics, trials, tiles],
)  # fmt: skip
@pytest.mark.parametrize(
    "ends", [(), ("running",), ("failed",), ("done",)], ids=lambda ends: "-".join(ends) or "none"
)
def test_every_section_says_something_of_every_study(
    tmp_path: Path, draw: Any, ends: tuple[Any, ...]
) -> None:
    early = [record(n, end, n_epochs=0 if end in ("running", "failed") else 2)
             for n, end in enumerate(ends)]  # fmt: skip
    text = draw(material(tmp_path, *early))
    assert re.sub(r"<[^>]*>", "", text).strip()
    assert "cannot be drawn" not in text
