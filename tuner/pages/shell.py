"""The common frame of all pages, which work offline: style, script and table of contents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files

from tuner.pages.markup import Markup, escape


@dataclass(frozen=True)
class Section:
    """A titled part of a page."""

    title: str
    body: Markup

    @property
    def anchor(self) -> str:
        """The fragment of a link to it."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


def document(title: str, lead: Markup, sections: Iterable[Section], footer: str = "") -> str:
    """Return a complete page as text.

    Args:
        title: title of the page.
        lead: content below the title.
        sections: the sections in order.
        footer: the last line.
    """
    from plotly.offline import get_plotlyjs

    here = files("tuner.pages")
    style, script = (
        here.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    chosen = list(sections)
    links = "".join(f"<li><a href='#{s.anchor}'>{escape(s.title)}</a>" for s in chosen)
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        "<link rel='icon' href='data:,'>",  # otherwise browsers request one
        f"<title>{escape(title)}</title><style>{style}</style></head>",
        f"<body><header><h1>{escape(title)}</h1>{lead}</header>",
        f"<nav aria-label='Sections'><ul>{links}</ul></nav><main>",
        "<noscript><p>Charts need JavaScript; their numbers are in the tables.</p></noscript>",
        *(f"<section id='{s.anchor}'><h2>{escape(s.title)}</h2>{s.body}</section>" for s in chosen),
        f"</main><footer>{escape(footer)}</footer>",
        f"<script>{get_plotlyjs()}</script>",
        f"<script>{script}</script></body></html>\n",
    ]
    return "\n".join(parts)
