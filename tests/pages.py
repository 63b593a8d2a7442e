"""The pages of the documentation, and the blocks of commands, Python and YAML that stand in them.

A block without a language, or with `bash`, is commands; `text` is what a command prints; `console`
is a session at a prompt, `$` before a command and `(Pdb)` before what is typed into it.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"", "bash", "console", "python", "text", "yaml"}

_BLOCK = re.compile(r"(?ms)^( *)```([^\n]*)\n(.*?)^\1```$")  # indented in a list
_PROMPT = re.compile(r"(?m)^\(Pdb\) ?(.*)$")


def name_of(page: Path) -> str:
    """A page as it is called in tests: its path in the repository."""
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[str]:
        """Its commands, one a line, without comments and prompts."""
        if self.language == "console":
            lines = re.findall(r"(?m)^\$ (.*)$", self.text)
        elif self.language in ("", "bash"):
            lines = self.text.replace("\\\n", " ").splitlines()
        else:
            return []
        return [bare for line in lines if (bare := without_comment(line))]

    def typed(self) -> list[str]:
        """What is typed at the prompts of a session."""
        return _PROMPT.findall(self.text) if self.language == "console" else []

    def says(self) -> list[str]:
        """What a session at a debugger says for certain: the lines of code that it stands at."""
        return re.findall(r"(?m)^>? ?((?:->|\S+\(\d+\)) ?.*)$", self.text) if self.typed() else []


def without_comment(command: str) -> str:
    """A command of the shell, without the comment behind it."""
    shlex.split(command, comments=True)  # an open quote raises
    lexer = shlex.shlex(command, posix=False, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, "#"
    return " ".join(lexer)


def blocks(*pages: Path) -> Iterator[Block]:
    """Blocks of some pages, or of all, in the order in which they stand."""
    for page in pages or PAGES:
        text = page.read_text(encoding="utf-8")
        for found in _BLOCK.finditer(text):
            line = text.count("\n", 0, found.start()) + 1
            yield Block(name_of(page), line, found[2], textwrap.dedent(found[3]))
