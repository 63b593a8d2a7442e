"""Prints an evaluation's tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH = 240


def print_tables(content: dict[str, Any], console: Console | None = None) -> None:
    """Print the tables: overall, by SNR, by number of sources, and by range."""
    if console is None:
        console = Console()
        if not console.is_terminal:  # a file has no width
            console = Console(width=_WIDTH)
    methods = content["methods"]
    console.print(_found(content))
    console.print(_measures(content))
    for title, key, label, value in (
        ("F1 by SNR [dB]", "by_snr", _snr_label, "f1"),
        ("all sources found, by their number", "by_k", _k_label, "all_found"),
        ("recall by true range [m]", "by_range", _range_label, "recall"),
    ):
        table = _table(title, [label(row) for row in next(iter(methods.values()))[key]])
        for name, report in methods.items():
            table.add_row(name, *(_number(row.get(value)) for row in report[key]))
        console.print(table)
    snr = content["snr_estimate"]
    if snr.get("scenes"):
        console.print(
            f"SNR from the measurement alone: off by {snr['median_absolute_error_db']:.2f} dB "
            f"(median), {snr['mean_error_db']:+.2f} dB on average, "
            f"over {snr['scenes']} scenes; none found in {snr['without_estimate']}"
        )


def _found(content: dict[str, Any]) -> Table:
    """Return a table of F1 with its interval and paired differences."""
    paired = content["paired_f1"]
    less = [f"less {reference}'s [95 %]" for reference in paired]
    table = _table(content["description"], ["F1 [95 %]", *less])
    for name, report in content["methods"].items():
        numbers = report["overall"]
        low, high = numbers["f1_interval"]
        table.add_row(
            name,
            f"{numbers['f1']:.3f} [{low:.3f}, {high:.3f}]",
            *(signed(differences.get(name)) for differences in paired.values()),
        )
    return table


def _measures(content: dict[str, Any]) -> Table:
    """Return a table of all other scalar measures."""
    heads = ["gated recall", "GOSPA [m]", "K right", "all found", "|err| /CRB", "NMSE", "scenes /s"]
    table = _table("", heads)
    for name, report in content["methods"].items():
        numbers = report["overall"]
        table.add_row(
            name,
            _number(numbers["gated_recall"]),
            _number(numbers["gospa_m"]),
            # Count accuracy is meaningless for a method that is given K.
            "told" if "K told" in report["note"] else _number(numbers["count_accuracy"]),
            _number(numbers["all_found"]),
            _number(numbers["median_error_over_crb"]),
            _number(numbers.get("nmse")),
            f"{report['scenes_per_second']:.1f}",
        )
    return table


def _table(title: str, heads: list[str]) -> Table:
    """Create a table of methods that fits 80 columns; headers may wrap at words."""
    table = Table(
        title=Text(title) if title else None,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("method", no_wrap=True)
    for head in heads:
        longest = max(map(len, head.split()))
        table.add_column(Text(head), justify="right", overflow="fold", min_width=min(longest, 6))
    return table


def signed(difference: dict[str, Any] | None) -> str:
    if difference is None:  # the reference itself
        return ""
    low, high = difference["interval"]
    return f"{difference['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _snr_label(row: dict[str, Any]) -> str:
    return f"{row['low_db']:g}..{row['high_db']:g}"


def _k_label(row: dict[str, Any]) -> str:
    return f"K={row['n_sources']}"


def _range_label(row: dict[str, Any]) -> str:
    return f"{row['low_m']:g}.." + ("" if row["high_m"] is None else f"{row['high_m']:g}")
