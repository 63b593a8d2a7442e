"""The documentation site's own code: links of the repository that work on the site, formulas."""

from __future__ import annotations

import pytest
from mkdocs.exceptions import PluginError

from tests.tuner.support import ROOT
from tools.site_pages import as_page, linked, on_post_page, put_right, with_mathml

KNOWN = {
    "README.md": "index.md",
    "docs/search.md": "search.md",
    "docs/images/live.svg": "images/live.svg",
    "docs/how-to/debug.md": "how-to/debug.md",
    "examples": "repository/examples.md",
    "examples/tune_here.py": "repository/examples/tune_here.py.md",
}


@pytest.mark.parametrize(
    ("source", "link", "expected"),
    [
        ("README.md", "docs/search.md#resuming", "search.md#resuming"),
        ("README.md", "docs/images/live.svg", "images/live.svg"),
        ("docs/search.md", "../README.md", "index.md"),
        ("docs/search.md", "how-to/debug.md", "how-to/debug.md"),
        ("docs/how-to/debug.md", "../search.md", "../search.md"),
        ("docs/how-to/debug.md", "../../examples", "../repository/examples.md"),
        ("docs/how-to/debug.md", "../images/live.svg", "../images/live.svg"),
        ("examples", "examples/tune_here.py", "examples/tune_here.py.md"),
        ("README.md", "https://example.com/docs/search.md", "https://example.com/docs/search.md"),
        ("README.md", "#more", "#more"),
        ("README.md", "docs/nowhere.md", "docs/nowhere.md"),  # mkdocs reports it
    ],
)
def test_a_link_of_the_repository_leads_to_the_same_on_the_site(
    source: str, link: str, expected: str
) -> None:
    assert put_right(f"see [x]({link})", source, KNOWN) == f"see [x]({expected})"


def test_links_are_found_relative_to_the_file_that_has_them() -> None:
    text = "[a](../search.md#x) ![b](../../examples/a.py) [c](#here) [d](http://x.org/y)"
    assert linked(text, "docs/how-to/debug.md") == {"docs/search.md", "examples/a.py"}


def test_a_folder_becomes_a_list_of_its_files_and_a_file_a_block_of_code() -> None:
    folder = as_page(ROOT, "examples")
    assert "](examples/tune_here.py)" in folder
    assert "__init__" not in folder
    script = as_page(ROOT, "examples/tune_here.py")
    assert script.startswith("# examples/tune_here.py\n\n````python\n")
    assert (ROOT / "examples/tune_here.py").read_text() in script


def test_formulas_become_mathml_and_text_stays() -> None:
    page = with_mathml(
        r'<p>a <span class="arithmatex">\(\lVert x \rVert &lt; 1\)</span></p>'
        r'<div class="arithmatex">\[\mathbf y = \mathbf H \mathbf x\]</div>'
    )
    assert page.count("<math") == 2
    assert 'display="block"' in page
    assert "arithmatex" not in page
    assert page.startswith("<p>a <math")


def test_bold_and_script_letters_are_letters_of_their_own() -> None:
    page = with_mathml(r'<span class="arithmatex">\(\mathbf H \boldsymbol\Phi \mathcal L\)</span>')
    assert all(letter in page for letter in "𝐇𝚽ℒ")


def test_a_formula_that_cannot_be_drawn_ends_the_build() -> None:
    with pytest.raises(PluginError, match="nosuchcommand"):
        with_mathml(r'<span class="arithmatex">\(\nosuchcommand x\)</span>')


@pytest.mark.parametrize(
    ("tag", "refused"),
    [
        ('<script src="https://example.com/a.js"></script>', True),
        ('<img alt="x" src="https://example.com/a.png">', True),
        ('<link rel="stylesheet" href="http://example.com/a.css">', True),
        ('<script src="assets/a.js"></script><a href="https://example.com">x</a>', False),
    ],
)
def test_a_page_that_fetches_from_elsewhere_ends_the_build(tag: str, refused: bool) -> None:
    from types import SimpleNamespace
    from typing import Any

    page: Any = SimpleNamespace(file=SimpleNamespace(src_uri="x.md"))
    config: Any = None
    if refused:
        with pytest.raises(PluginError, match=r"example\.com"):
            on_post_page(tag, page=page, config=config)
    else:
        assert on_post_page(tag, page=page, config=config) == tag
