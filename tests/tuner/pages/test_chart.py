from __future__ import annotations

import html
import json
import re
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from tuner.pages.chart import attempted, axis_for, chart, joined, thinned
from tuner.pages.markup import Markup, table

HOSTILE = "</script><script>alert(1)</script><!--"


def content(text: str) -> dict[str, Any]:
    """What the page's script reads of the first chart."""
    found = re.search(r"<script type='application/json'>(.*?)</script>", text)
    assert found is not None
    return json.loads(found.group(1))  # type: ignore[no-any-return]


def test_a_chart_holds_its_figure_its_sentence_and_its_numbers() -> None:
    figure = go.Figure(go.Scatter(x=[1, 2], y=[0.123456789, 4.0]))
    text = chart(figure, "Two points.", title="Points", numbers=table(["y"], [(4.0,)]), height=200)
    assert "role='img' aria-label='Two points.'" in text
    assert "height:200px" in text
    assert "<figcaption>Points</figcaption>" in text
    assert "<summary>Numbers</summary>" in text
    assert content(text)["data"][0]["y"] == [0.123457, 4.0]


def test_nothing_in_a_figure_ends_the_script_that_holds_it() -> None:
    figure = go.Figure(go.Scatter(x=[HOSTILE], y=[1], name=HOSTILE))
    text = chart(figure, HOSTILE, title=HOSTILE)
    assert text.count("</script>") == 1
    assert text.count("<script") == 1
    assert "<!--" not in text
    assert content(text)["data"][0]["name"] == HOSTILE
    label = re.search(r"aria-label='([^']*)'", text)
    assert label is not None
    assert html.unescape(label.group(1)) == HOSTILE


def test_what_json_lacks_becomes_null() -> None:
    figure = go.Figure(
        go.Scatter(y=[1.0, float("nan"), float("-inf"), np.float64(2.0), np.int64(3)])
    )
    assert content(chart(figure, ""))["data"][0]["y"] == [1.0, None, None, 2.0, 3]


def test_colours_are_names_and_no_template_is_carried_along() -> None:
    figure = go.Figure(go.Scatter(y=[1], line={"color": "var(--accent)"}))
    found = content(chart(figure, ""))
    assert found["data"][0]["line"]["color"] == "var(--accent)"
    assert "template" not in found["layout"]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1.0, 2.0], None),
        ([], None),
        ([0.0, 100.0], None),  # zero has no logarithm
        ([-1.0, 1.0, 1000.0], None),
        ([1.0, 40.0], "log"),
        ([1e-6, 1e6], "log"),
    ],
)
def test_an_axis_is_logarithmic_where_values_spread_widely(
    values: list[float], kind: str | None
) -> None:
    assert axis_for(values).get("type") == kind


def test_curves_are_joined_with_gaps() -> None:
    assert joined([([1, 2], [3, 4]), ([1], [5])]) == ([1, 2, None, 1, None], [3, 4, None, 5, None])


@pytest.mark.parametrize("most", [2, 3, 7, 100])
def test_thinning_keeps_the_order_the_first_and_the_last(most: int) -> None:
    kept = thinned(list(range(50)), most)
    assert len(kept) == min(50, most)
    assert (kept[0], kept[-1]) == (0, 49)
    assert kept == sorted(set(kept))


def test_what_cannot_be_drawn_is_said() -> None:
    def fails() -> Markup:
        raise ValueError("<no>")

    assert "Importances: cannot be drawn: ValueError: &lt;no&gt;" in attempted(fails, "Importances")
