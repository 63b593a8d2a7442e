"""The figures of the concepts are those that tools/figures.py draws, and stand in the pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.pages import PAGES, ROOT
from tools.figures import CURVES, FIGURES, curves_of, draw

IMAGES = ROOT / "docs" / "images"
OTHERS = {"live.svg", "report.png", "report-dark.png"}  # of runs: docs/tools.md, README


def test_the_figures_that_are_kept_are_those_that_are_drawn() -> None:
    assert {path.name for path in IMAGES.iterdir()} - OTHERS == set(FIGURES)


def test_every_figure_stands_in_a_page_with_words_for_who_does_not_see_it() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    for name in FIGURES:
        told = re.findall(rf"!\[([^\]]*)\]\([^)]*images/{re.escape(name)}\)", text)
        assert told, name
        assert all(len(words.split()) > 5 for words in told), name


@pytest.mark.slow
def test_figures_are_drawn_small_too(tmp_path: Path) -> None:
    written = draw(tmp_path, n_scenes=2, n_points=11)
    assert [path.name for path in written] == list(FIGURES)
    for path in written:
        head = path.read_bytes()[:400]
        assert head.startswith(b"\x89PNG") or b"<svg" in head or b"<!DOCTYPE svg" in head
    before = (tmp_path / "rungs.svg").read_bytes()
    assert draw(tmp_path, 2, 11, "rungs.svg")[0].read_bytes() == before


def test_the_recorded_curves_are_whole() -> None:
    import gzip
    import json

    recorded = json.loads(gzip.decompress(CURVES.read_bytes()))
    assert {len(curve) for curve in curves_of(recorded)} == {recorded["study"]["epochs"]}
