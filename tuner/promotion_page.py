"""The report's section of promoted configurations."""

from __future__ import annotations

import html

from tuner.promotion import Promoted, Promotion


def promoted_section(promotion: Promotion | None) -> str:
    """Mean and spread of each configuration beside what the search saw; nothing without any."""
    found = promotion.configurations() if promotion is not None else []
    if promotion is None or not found:
        return ""
    study = promotion.config
    text = (
        f"The search's best, trained again over {study.training.epochs} epochs with "
        f"{found[0].seeds} seeds each that the search never used; mean and standard deviation of "
        "the objective on the validation scenes. A configuration with a seed that failed ranks "
        "below all without. The search's own objective is of one seed and of the best of many "
        "trials, and so too good."
    )
    if promotion.has_work:
        text += " Not all runs have ended yet: the order may change."
    heads = ["", "trial", "mean", "std", "seeds", "failed", "best seed", "in the search"]
    lines = ["<h2>Promoted configurations</h2>", f"<p>{text}</p>", "<div class='scroll'><table>"]
    lines.append("<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "<th>reason</th></tr>")
    winner = promotion.winner()
    for rank, promoted in enumerate(found, start=1):
        first = winner is not None and promoted.trial.number == winner.trial.number
        lines.append(_row(rank, promoted, " class='best'" if first else ""))
    return "\n".join([*lines, "</table></div>"])


def _row(rank: int, promoted: Promoted, mark: str) -> str:
    best = promoted.best
    cells = [
        str(rank),
        f"{promoted.trial.number:04d}",
        _number(promoted.mean),
        _number(promoted.std),
        f"{len(promoted.finished)} of {promoted.seeds}",
        str(len(promoted.failed)),
        _number(best.objective if best else None),
        _number(promoted.trial.objective),
    ]
    reasons = "; ".join(sorted({run.reason or "" for run in promoted.failed}))
    row = "".join(f"<td>{cell}</td>" for cell in cells)
    return f"<tr{mark}>{row}<td class='text'>{html.escape(reasons)}</td></tr>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"
