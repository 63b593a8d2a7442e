"""All speed benchmarks, one after the other, into one JSON and a table.

    python -m benchmarks.suite [--json FILE] [--write] [--only NAME] [--threads 2]

Each benchmark runs in its own process. The JSON is written to benchmarks/results/ under the
machine's name, for `python -m benchmarks.compare`; `--write` puts the table into
docs/performance.md. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
# Benchmarks of speed; accuracy is measured by benchmarks.quality and others.
SUITE = ("hot", "sample_covariance", "simulate", "spectra", "train_step", "epoch", "nomp")
BEGIN, END = "<!-- suite: begin -->", "<!-- suite: end -->"
_PACKAGES = ("torch", "numpy", "scipy")


def run(name: str, threads: int) -> dict[str, Any]:
    """Run one benchmark and return its figures; its output goes to the terminal."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(path)]
        subprocess.run([*command, "--threads", str(threads)], cwd=ROOT, check=True)
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found


def beside(machine: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Figures without their machine, unless it differs from the suite's (a CPU next to a GPU)."""
    return {k: v for k, v in found.items() if k != "machine" or v != machine}


def slug(text: str) -> str:
    """A machine's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def commit() -> str:
    """The measured commit, with a mark if the tree has changes."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return described.stdout.strip() or "unknown"


def table(result: dict[str, Any]) -> str:
    """Markdown table of the machine, its limits, and every hot function."""
    machine, hot = result["machine"], result.get("hot")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    measured = f"Measured {result['date']} by `{result['command']}` at {result['commit']}"
    lines = [f"{measured}: {machine['name']}, {machine['threads']} threads; {versions}."]
    if hot:
        limits = hot["limits"]
        rates = limits["gb_per_second_by_bytes"].values()
        limit = (
            f"The machine's limits in the same run: {limits['launch_us']:.1f} µs to launch the "
            f"smallest operation, {limits['gflop_per_second']:.0f} Gflop/s in products of "
            f"matrices and {limits['gflop_per_second_of_convolutions']:.0f} in convolutions, "
            f"{min(rates):.0f} to {max(rates):.0f} GB/s by size. Batch: "
            f"{hot['batch']} scenes."
        )
        lines += [
            "",
            limit,
            "",
            "| function | time | operations | bound | of the bound reached |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {digits(row['median_ms'])} ms | {row['n_operations']:,} | "
            f"{row['bound']} | {row['reached']:.0%} |"
            for name, row in hot["functions"].items()
        ]
    epoch = result.get("epoch")
    if epoch:
        shares = sorted(epoch["share"].items(), key=lambda item: -item[1])
        lines += [
            "",
            f"A whole epoch of `{epoch['config']}`: {epoch['epoch_seconds']:.2f} s, "
            f"{epoch['scenes_per_second']:.0f} scenes/s; the first one "
            f"{epoch['first_epoch_seconds']:.1f} s. Shares: "
            + ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.005)
            + ".",
        ]
    return "\n".join(lines)


def digits(value: float) -> str:
    """Format with three digits, or all before the decimal point: 0.0519, 84.1, 1,052."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def written_into(page: str, text: str) -> str:
    """Return the page with the text inserted between its marks.

    Raises:
        ValueError: a page without the marks.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"expected {BEGIN} and {END} in the page")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> int:
    """Run the requested benchmarks and save the results."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--json", type=Path, metavar="FILE", help="in place of results/")
    arguments.add_argument("--write", action="store_true", help=f"renew {PAGE.name}")
    arguments.add_argument("--only", choices=SUITE, action="append", help="may be repeated")
    arguments.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    args = arguments.parse_args()
    names = args.only or SUITE
    result: dict[str, Any] = {}
    for name in names:
        print(f"== benchmarks.{name}", flush=True)
        found = run(name, args.threads)
        result.setdefault("machine", found["machine"])
        result[name] = beside(result["machine"], found)
    result["versions"] = {"Python": result["machine"]["python"]} | {
        name: importlib.metadata.version(name) for name in _PACKAGES
    }
    result["date"] = datetime.now(UTC).date().isoformat()
    result["commit"] = commit()
    only = "".join(f" --only {name}" for name in args.only or ())
    result["command"] = f"python -m benchmarks.suite --threads {args.threads}{only}"
    path = args.json or RESULTS / f"{slug(result['machine']['name'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\n{table(result)}\n\nwritten: {path}")
    if args.write:
        page = written_into(PAGE.read_text(encoding="utf-8"), table(result))
        PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
