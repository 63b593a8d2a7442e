"""The sections on failures and their reasons, and on numerical problems."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from model.wording import counted
from tuner.pages.chart import (
    STATE_COLOURS,
    axis_for,
    chart,
    grid,
    joined,
    opacity_of,
    thinned,
)
from tuner.pages.markup import Markup, details, escape, note, short, table
from tuner.records import STATE_WORDS

if TYPE_CHECKING:
    from tuner.pages.material import Material
    from tuner.records import TrialRecord

_MOST_REASONS = 40
_LONGEST_TRACE = 3000  # characters; error.txt in the trial's folder has all of it
_MOST_NAMED = 12  # trials listed for a reason
_MOST_CURVES = 300
_MOST_POINTS = 8000


def failures(material: Material) -> Markup:
    """List failed trials by reason, the latest first, each with a traceback if there is one."""
    failed = [t for t in material.trials if t.state == "failed"]
    if not failed:
        return note(f"None of {counted(len(material.trials), 'trial')} failed.")
    groups: dict[str, list[TrialRecord]] = {}
    for trial in failed:
        groups.setdefault(trial.reason or "no reason was kept", []).append(trial)
    ordered = sorted(groups.items(), key=lambda group: -group[1][-1].number)
    told = (
        f"{counted(len(failed), 'trial')} failed, for {counted(len(groups), 'reason')}. "
        "A failed trial never ranks."
    )
    parts = [
        f"<p>{escape(told)}</p>",
        "<div class='scroll'><table><thead>",
        "<tr><th class='text'>reason<th class='text'>trials<th>after epoch<tbody>",
    ]
    for reason, trials in ordered[:_MOST_REASONS]:
        named = ", ".join(f"{t.number:04d}" for t in trials[:_MOST_NAMED])
        named += f" and {len(trials) - _MOST_NAMED} more" if len(trials) > _MOST_NAMED else ""
        traces = [t.traceback for t in trials if t.traceback]
        tail = traces[-1][-_LONGEST_TRACE:] if traces else ""
        trace = details("Traceback", f"<pre>{escape(tail)}</pre>") if tail else ""
        first, last = min(t.epoch for t in trials), max(t.epoch for t in trials)
        epochs = f"{first}" if first == last else f"{first} to {last}"
        parts.append(
            f"<tr><td class='text wide'>{escape(reason[:_LONGEST_TRACE])}{trace}"
            f"<td class='text wide'>{escape(named)}<td>{escape(epochs)}"
        )
    parts.append("</table></div>")
    if len(groups) > _MOST_REASONS:
        parts.append(note(f"{len(groups) - _MOST_REASONS} more reasons are in trials.csv."))
    return Markup("".join(parts))


def numerics(material: Material) -> Markup:
    """Show skipped steps, scenes solved by the SVD fallback, and gradient norms."""
    trials = [t for t in material.trials if t.epochs]
    if not trials:
        return note("No trial has reported an epoch yet.")
    skipped = {t.number: int(t.metrics.get("skipped_steps", 0)) for t in trials}
    fallbacks = {t.number: fallbacks_of(t) for t in trials}
    epochs = sum(len(t.epochs) for t in trials)
    told = (
        f"In {counted(epochs, 'epoch')} of {counted(len(trials), 'trial')}: "
        f"{counted(sum(skipped.values()), 'optimiser step')} skipped for a gradient that was not "
        f"finite, {counted(sum(fallbacks.values()), 'scene')} served by the SVD after a Cholesky "
        "factorisation had failed."
    )
    parts = [f"<p>{escape(told)}</p>"]
    parts.append(
        grid(
            [
                _norms(material, trials, "grad_norm", "Mean gradient norm of an epoch"),
                _norms(material, trials, "grad_norm_max", "Largest gradient norm of an epoch"),
            ]
        )
    )
    if any(skipped.values()) or any(fallbacks.values()):
        parts.append(_bars(trials, skipped, fallbacks))
    return Markup("".join(parts))


def fallbacks_of(trial: TrialRecord) -> int:
    """Return the number of scenes solved by the SVD fallback over all epochs of a trial."""
    return sum(int(metrics.get("solver_fallbacks", 0)) for metrics in trial.epochs.values())


def _norms(material: Material, trials: list[TrialRecord], name: str, title: str) -> Markup:
    import plotly.graph_objects as go

    shown = thinned(trials, _MOST_CURVES)
    most = max(2, _MOST_POINTS // len(shown))
    figure = go.Figure()
    values: list[float] = []
    for state, colour in STATE_COLOURS.items():
        curves = []
        for trial in (t for t in shown if t.state == state):
            pairs = [(e, m.get(name)) for e, m in sorted(trial.epochs.items())]
            sound = [(e, v) for e, v in pairs if _is_positive(v)]
            kept = thinned(sound, most)
            curves.append(([e for e, _ in kept], [v for _, v in kept]))
            values += [v for _, v in sound]
        if any(x for x, _ in curves):
            x, y = joined(curves)
            figure.add_scatter(
                x=x,
                y=y,
                mode="lines+markers" if len(x) < _MOST_POINTS // 8 else "lines",
                name=STATE_WORDS[state],
                opacity=opacity_of(len(curves)),
                line={"color": colour, "width": 1.2},
                marker={"size": 4},
            )
    if not values:
        return note(f"{title}: not reported.")
    figure.update_layout(xaxis_title="epoch", yaxis=axis_for(values, "norm", log=True))
    middle = sorted(values)[len(values) // 2]
    clip = material.study.training.gradient_clip
    figure.add_hline(y=clip, line={"dash": "dot", "color": "var(--muted)", "width": 1})
    ratio = f"between {short(min(values))} and {short(max(values))}, median {short(middle)}"
    return chart(
        figure,
        f"{title} in {counted(len(shown), 'trial')}: {ratio}; clipped at {short(clip)}.",
        title=title,
        numbers=table(["", "norm"], [("least", min(values)), ("median", middle),
                                     ("largest", max(values)), ("clipped at", clip)]),
        height=320,
        remark=f"Dotted: the norm to which gradients are clipped, {short(clip)}.",
    )  # fmt: skip


def _bars(trials: list[TrialRecord], skipped: dict[int, int], fallbacks: dict[int, int]) -> Markup:
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, counts, colour in (
        ("steps skipped", skipped, "var(--failed)"),
        ("scenes served by the SVD", fallbacks, "var(--pruned)"),
    ):
        chosen = {number: count for number, count in counts.items() if count}
        figure.add_bar(x=list(chosen), y=list(chosen.values()), name=name, marker={"color": colour})
    figure.update_layout(xaxis_title="trial", yaxis_title="count", barmode="group")
    rows = [
        (t.number, skipped[t.number], fallbacks[t.number])
        for t in trials
        if skipped[t.number] or fallbacks[t.number]
    ]
    return chart(
        figure,
        f"Skipped steps and fallbacks of {counted(len(rows), 'trial')}.",
        title="Skipped steps and fallbacks by trial",
        numbers=table(["trial", "steps skipped", "fallbacks"], rows),
        height=300,
    )


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0
