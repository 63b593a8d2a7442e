"""Draws the live table of a run folder as it stands, in the middle of a run or after it.

python -m tools.live_picture RUN_DIR docs/images/live.svg
"""

from __future__ import annotations

import argparse
import io
import re
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI

from tuner.liveview import StudyView
from tuner.rows import TrialRow
from tuner.standing import standing


def picture(run_dir: Path, width: int, height: int) -> str:
    """The table as SVG, on a terminal of ``width`` columns and ``height`` lines."""
    look = standing(run_dir)
    console = Console(record=True, width=width, height=height, file=io.StringIO())
    rows = [TrialRow.of(trial) for trial in look.trials]
    console.print(StudyView(look.study, rows, look.seconds))
    # A picture in the documentation must not fetch fonts.
    form = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return console.export_svg(title="python -m tuner.run", theme=MONOKAI, code_format=form)


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=112)
    parser.add_argument("--height", type=int, default=24)
    arguments = parser.parse_args()
    drawn = picture(arguments.run_dir, arguments.width, arguments.height)
    arguments.out.write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
