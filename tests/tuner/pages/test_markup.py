from __future__ import annotations

import re

import pytest

from tuner.pages.markup import Markup, Number, escape, listed, pairs, short, table

HOSTILE = "</script><img src=x onerror=alert(1)>'\"&\u2028🛰"


def test_text_is_escaped_and_markup_is_left_alone() -> None:
    assert escape(HOSTILE).count("<") == 0
    assert escape(escape(HOSTILE)) == escape(HOSTILE)
    assert escape(Markup("<b>x</b>")) == "<b>x</b>"


def test_a_table_escapes_heads_and_cells_and_keeps_numbers_to_the_right() -> None:
    text = table(["name", HOSTILE], [(HOSTILE, 1.23456789), ("x", Number("7"))])
    assert "<img" not in text
    assert "<td>1.2346" in text
    assert "<td>7" in text
    assert "<th class='text'>name" in text


def test_a_long_table_and_a_long_cell_are_cut_and_the_cut_is_said() -> None:
    text = table(["n"], [(n,) for n in range(100)], most=10)
    assert text.count("<td>") == 10
    assert "90 more rows are left out" in text
    assert len(table(["n"], [("x" * 5000,)])) < 600


def test_the_marked_row_alone_stands_out() -> None:
    text = table(["n"], [(1,), (2,), (3,)], marked=1)
    assert re.findall(r"<tr class='best'><td>(\d)", text) == ["2"]


def test_pairs_are_escaped() -> None:
    assert "<img" not in pairs([(HOSTILE, HOSTILE)])


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        (0.000123456, "0.0001235"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (True, "True"),
        (3, "3"),
        ([1, 2], "[1, 2]"),
    ],
)
def test_a_value_is_short(value: object, shown: str) -> None:
    assert short(value) == shown


def test_words_for_lists() -> None:
    assert [listed(w) for w in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "",
        "a",
        "a and b",
        "a, b and c",
    ]
