"""Hooks of the documentation site, named in mkdocs.yml.

Pages outside docs/ (README, CONTRIBUTING, CHANGELOG) and the files that pages link to become
pages of the site, and links to them are rewritten, so that the same link works in the repository
and on the site. Formulas become MathML while the site is built, so that a reader's browser fetches
nothing.
"""

from __future__ import annotations

import html
import posixpath
import re
import textwrap
import unicodedata
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

NAMED = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json"}

_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_FOREIGN = re.compile(
    r'<(?:script|img|iframe|link rel="stylesheet")[^>]*? (?:src|href)="(https?:[^"]+)'
)
_VARIANT = re.compile(r'<m[io] mathvariant="(bold|bold-italic|script)">(&#x\w+;|.)</m[io]>')
_DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def site_path(path: str) -> str:
    """Path of a file or folder of the repository among the site's sources."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    suffix = "" if path.endswith(".md") else ".md"
    return NAMED.get(path) or f"repository/{path}{suffix}"


def linked(markdown: str, source: str) -> set[str]:
    """Files and folders of the repository that one of its files links to."""
    folder = posixpath.dirname(source)
    return {posixpath.normpath(posixpath.join(folder, m[1])) for m in _LINK.finditer(markdown)}


def put_right(markdown: str, source: str, known: dict[str, str]) -> str:
    """Markdown of a repository file with its links rewritten for the site.

    Args:
        source: path of the file in the repository.
        known: site path of every file and folder that has one.
    """
    folder, here = posixpath.dirname(source), posixpath.dirname(site_path(source))

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[1]))
        place = known.get(target)
        return f"]({posixpath.relpath(place, here or '.')}" if place else found[0]

    return _LINK.sub(link, markdown)


def as_page(root: Path, path: str) -> str:
    """Markdown of a file or folder outside docs/."""
    file = root / path
    if file.is_dir():
        shown = (p for p in file.iterdir() if p.suffix in (*LANGUAGES, ".ipynb"))
        names = sorted(p.name for p in shown if p.name != "__init__.py")
        return f"# {path}/\n\n" + "".join(
            f"- [{n}]({posixpath.basename(path)}/{n})\n" for n in names
        )
    if file.suffix == ".ipynb":
        return _from_notebook(file)[0]
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md":
        return text
    fence = "````"
    return f"# {path}\n\n{fence}{LANGUAGES.get(file.suffix, 'text')}\n{text}{fence}\n"


def _from_notebook(file: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook with its outputs as Markdown, and the images that it shows, by name."""
    body, resources = MarkdownExporter().from_filename(str(file))
    parts = re.split(r"(?ms)(^```.*?^```$)", body)  # every second one is code
    # The output of a cell is indented.
    parts[::2] = [re.sub(r"(?m)(?:^    .*\n)+", _as_text, part) for part in parts[::2]]
    return "".join(parts), resources["outputs"]


def _as_text(printed: re.Match[str]) -> str:
    return f"```text\n{textwrap.dedent(printed[0])}```\n"


def _letter(found: re.Match[str]) -> str:
    """A bold or script Unicode letter, instead of an attribute that browsers ignore."""
    kind, letter = found[1], html.unescape(found[2])
    if not letter.isalpha():
        return found[0]
    name = (
        unicodedata.name(letter).replace("LATIN ", "").replace("GREEK ", "").replace(" LETTER", "")
    )
    style = "SCRIPT" if kind == "script" else "BOLD"
    for full in (f"MATHEMATICAL {style} {name}", f"{style} {name}"):
        try:
            return f"<mi>{unicodedata.lookup(full)}</mi>"
        except KeyError:  # a few letters are outside the block
            continue
    return found[0]


def with_mathml(page: str) -> str:
    """Convert every formula of an HTML page to MathML."""

    def formula(found: re.Match[str], display: bool) -> str:
        latex = html.unescape(found[1]).strip()
        mathml = convert(latex, display="block" if display else "inline")
        if "\\" in mathml:
            raise PluginError(f"the formula {latex!r} holds a command that latex2mathml lacks")
        mathml = _VARIANT.sub(_letter, mathml)
        return f'<div class="formula">{mathml}</div>' if display else mathml

    page = _DISPLAY.sub(lambda found: formula(found, True), page)
    return _INLINE.sub(lambda found: formula(found, False), page)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README and similar pages, and the link targets of all pages, to the site's sources."""
    root = Path(config.config_file_path).parent
    sources = {f"docs/{f.src_uri}": f.src_uri for f in files}
    waiting = list(NAMED)
    for path, uri in sources.items():
        if uri.endswith(".md"):
            waiting += linked((root / path).read_text(encoding="utf-8"), path)
    while waiting:
        path = waiting.pop()
        if path in sources or not (root / path).exists() or path.startswith(".."):
            continue  # broken links are left for mkdocs to report
        sources[path] = site_path(path)
        content = as_page(root, path)
        files.append(File.generated(config, site_path(path), content=content))
        if path.endswith((".ipynb", ".md")) or (root / path).is_dir():
            waiting += linked(content, path)
        if path.endswith(".ipynb"):
            folder = posixpath.dirname(site_path(path))
            for name, image in _from_notebook(root / path)[1].items():
                files.append(File.generated(config, f"{folder}/{name}", content=image))
    config.extra["repository"] = sources
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite a page's links."""
    known: dict[str, str] = config.extra["repository"]
    source = next(path for path, uri in known.items() if uri == page.file.src_uri)
    return put_right(markdown, source, known)


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Convert a page's formulas to MathML."""
    return with_mathml(html)


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    """Refuse pages with resources that a browser would fetch from elsewhere."""
    foreign = _FOREIGN.search(output)
    if foreign:
        raise PluginError(f"{page.file.src_uri} fetches {foreign[1]}; the site serves all it needs")
    return output
