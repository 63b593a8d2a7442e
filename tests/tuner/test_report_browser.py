"""The report as a reader meets it: a real study's page in a real browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.browser import chromium, opened
from tests.tuner.support import run_here, write_study
from tuner.config import StudyConfig
from tuner.report import sections

# The study and a browser on a machine that has much else to do.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Sections that are words or a table alone.
_WITHOUT_CHARTS = {"Overview", "Winner", "Failures", "Trials"}

# Of every chart: the section, its size, how many marks are in it, and what stands for it.
_CHARTS = """
() => [...document.querySelectorAll(".plot")].map((plot) => {
  const box = plot.getBoundingClientRect();
  return {
    section: plot.closest("section").querySelector("h2").textContent,
    width: box.width, height: box.height, right: box.right,
    marks: plot.querySelectorAll(
      ".scatterlayer path, .barlayer path, .heatmaplayer image, .hm image").length,
    role: plot.getAttribute("role"), label: plot.getAttribute("aria-label"),
    ink: getComputedStyle(plot.querySelector(".xtick text, .ytick text")).fill,
  };
})
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a study that ran for real: trials done, stopped and failed."""
    chromium()
    folder = tmp_path_factory.mktemp("study")
    rate = "training.learning_rate"
    config = write_study(
        folder,
        # A norm that is never clipped lets the enqueued rate diverge.
        training={"epochs": 2, "gradient_clip": 1e30, "max_skipped_steps": 1},
        search={
            "trials": 18,
            "sampler": "random",
            "reduction_factor": 2,
            "grace_epochs": 1,
            "enqueue": [{rate: 1e30}],
            "space": {
                rate: {"type": "categorical", "choices": [3e-4, 1e-3, 3e-3, 1e30]},
                "network.heads": {"type": "categorical", "choices": [1, 2, 4]},
                "blend.beta": {"type": "float", "low": 0.0, "high": 0.6},
            },
        },
    )
    assert run_here("--config", config, "--local", "--out", folder / "run") == 0
    text = (folder / "run" / "trials.csv").read_text()
    for state in ("done", "pruned", "failed"):
        assert f",{state}," in text, f"the study has no trial that is {state}"
    return folder / "run" / "report.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_section_is_drawn_without_error_and_without_a_network(
    report: Path, width: int, dark: bool
) -> None:
    with opened(report, width=width, dark=dark) as found:
        charts: list[dict[str, Any]] = found.page.evaluate(_CHARTS)
        page_width = found.page.evaluate("document.documentElement.scrollWidth")
        titles = found.page.evaluate(
            "[...document.querySelectorAll('section > h2')].map((h) => h.textContent)"
        )
        paper = found.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert found.complaints == []
    assert found.requests == [report.as_uri()]
    assert page_width <= width
    assert titles == [title for title, _ in sections(StudyConfig())]
    assert {chart["section"] for chart in charts} == set(titles) - _WITHOUT_CHARTS
    for chart in charts:
        assert chart["marks"] > 0, chart
        assert chart["width"] > (250 if width > 400 else 200), chart
        assert chart["height"] > 80, chart
        assert chart["right"] <= width, chart
        assert chart["role"] == "img"
        assert re.search(r"\d", chart["label"]), chart
    assert (_lightness(paper) < 60) == dark
    for chart in charts:
        assert (_lightness(chart["ink"]) > 128) == dark, "text as dark as what is behind it"


def test_charts_follow_the_reader_from_day_to_night_and_to_paper(report: Path) -> None:
    with opened(report, width=1280, dark=False) as found:
        day = found.page.evaluate(_CHARTS)
        ink = [_lightness(chart["ink"]) for chart in day]
        found.page.emulate_media(color_scheme="dark")
        found.page.wait_for_function(
            "(day) => getComputedStyle(document.querySelector('.xtick text')).fill !== day",
            arg=day[0]["ink"],
        )
        night = [_lightness(chart["ink"]) for chart in found.page.evaluate(_CHARTS)]
        found.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        paper = [_lightness(chart["ink"]) for chart in found.page.evaluate(_CHARTS)]
        found.page.evaluate("dispatchEvent(new Event('afterprint'))")
        after = [_lightness(chart["ink"]) for chart in found.page.evaluate(_CHARTS)]
        assert found.complaints == []
    assert max(ink) < 128 < min(night)
    assert paper == ink
    assert after == night


def test_a_chart_is_as_wide_as_the_window_that_was_turned(report: Path) -> None:
    with opened(report, width=900, dark=False) as found:
        found.page.set_viewport_size({"width": 390, "height": 844})
        found.page.wait_for_function(
            "[...document.querySelectorAll('.plot .main-svg')].every("
            "(svg) => svg.getBoundingClientRect().right <= 390)"
        )
        assert found.page.evaluate("document.documentElement.scrollWidth") <= 390
        turned = found.page.evaluate(
            "[...document.querySelectorAll('section')].find((s) => s.id ==='parallel-coordinates')"
            ".querySelector('.plot').layout.yaxis.ticktext"
        )
    assert turned[0] == "objective"


def test_the_scoreboards_own_page_is_drawn_too(report: Path) -> None:
    page = report.with_name("evaluation.html")
    with opened(page, width=390, dark=True) as found:
        charts = found.page.evaluate(_CHARTS)
        assert found.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert found.complaints == []
    assert found.requests == [page.as_uri()]
    assert len(charts) >= 7
    assert all(chart["marks"] for chart in charts)


def _lightness(colour: str) -> float:
    red, green, blue = (float(part) for part in re.findall(r"[\d.]+", colour)[:3])
    return 0.3 * red + 0.59 * green + 0.11 * blue
