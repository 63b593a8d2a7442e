"""The course of a search: objective by trial, cut-offs at the rungs, and learning curves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from model.wording import counted
from tuner.pages.chart import (
    STATE_COLOURS,
    STATE_SYMBOLS,
    axis_for,
    chart,
    joined,
    opacity_of,
    thinned,
)
from tuner.pages.markup import Markup, note, short, table
from tuner.records import STATE_WORDS
from tuner.rungs import cut_off, rungs_of

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tuner.pages.material import Material
    from tuner.records import TrialRecord

_MOST_MARKS = 3000
_MOST_CURVES = 300
_MOST_POINTS = 15_000  # of all curves together: about 150 kB


def history(material: Material) -> Markup:
    """Draw the objective by trial with the best so far, and the rungs."""
    scored = [t for t in material.trials if t.objective is not None]
    if not scored:
        return note("No trial has reported an epoch yet.")
    return Markup(_by_trial(material, scored) + _rungs(material))


def _by_trial(material: Material, scored: list[TrialRecord]) -> Markup:
    import plotly.graph_objects as go

    figure = go.Figure()
    shown = _chosen(material, scored, _MOST_MARKS)
    for state, colour in STATE_COLOURS.items():
        chosen = [t for t in shown if t.state == state]
        if chosen:
            figure.add_scatter(
                x=[t.number for t in chosen],
                y=[t.objective for t in chosen],
                customdata=[t.epoch for t in chosen],
                mode="markers",
                name=STATE_WORDS[state],
                marker={"color": colour, "symbol": STATE_SYMBOLS[state], "size": 8},
                hovertemplate="trial %{x}: %{y:.5g} after epoch %{customdata}<extra></extra>",
            )
    lowest, xs, ys = float("inf"), [], []
    ranked = {trial.number for trial in material.ranking}
    for trial in scored:
        if trial.number in ranked and trial.objective is not None and trial.objective < lowest:
            lowest = trial.objective
            xs.append(trial.number)
            ys.append(lowest)
    if xs:
        xs.append(max(t.number for t in scored))
        ys.append(lowest)
        line = {"color": "var(--ink)", "shape": "hv", "width": 1.5}
        figure.add_scatter(x=xs, y=ys, mode="lines", name="best so far", line=line)
    reached = [t.objective for t in scored if t.objective is not None]
    figure.update_layout(xaxis_title="trial", yaxis=axis_for(reached, material.measure))
    found = (
        f"the best, {short(lowest)}, came with trial {xs[-2]}" if xs else "none has finished yet"
    )
    return chart(
        figure,
        f"Objective of {counted(len(scored), 'trial')} in the order of their proposal; {found}.",
        title="Objective by trial",
        numbers=table(
            ["trial", "state", "objective", "epochs"],
            [(t.number, STATE_WORDS[t.state], t.objective, t.epoch) for t in scored],
        ),
        remark="Only finished trials count for the best so far; others show what they last had."
        + _left_out(scored, shown),
    )


def _rungs(material: Material) -> Markup:
    study = material.study
    search, epochs = study.search, study.training.epochs
    rungs = rungs_of(search, epochs)
    if not rungs:
        who = {"none": "No scheduler stops trials in this study", "median": "The median rule has"}
        text = who.get(search.scheduler, "This budget leaves no room")
        if search.scheduler == "none" and search.least_chance:
            return note(
                "Trials are stopped whose chance to end better than the best is below "
                f"{100 * search.least_chance:g} %: there are no rungs to show."
            )
        return note(
            f"{text}: there are no rungs to show."
            if search.scheduler == "none"
            else f"{text} no rungs: it may stop a trial after any epoch from "
            f"{search.grace_epochs} on."
            if search.scheduler == "median"
            else f"{text} for rungs: trials end before the first."
        )
    fates: dict[str, list[tuple[str, float, int]]] = {
        "went on": [],
        "stopped here": [],
        "waits here": [],
        "failed": [],
    }
    rows = []
    lines: list[tuple[list[object], list[object]]] = []
    kept = {t.number for t in _chosen(material, material.trials, _MOST_MARKS // 2)}
    curves = [(t, dict(t.curve)) for t in material.trials]
    for index, rung in enumerate(rungs):
        reached = [(t, curve[rung]) for t, curve in curves if rung in curve]
        for trial, value in reached:
            if trial.number not in kept:
                continue
            ended = trial.epoch == rung
            waits = search.scheduler == "asha-pausing" and trial.state == "running"
            fate = (
                "stopped here" if ended and trial.state == "pruned"
                else "waits here" if ended and waits
                else "failed" if ended and trial.state == "failed"
                else "went on"
            )  # fmt: skip
            fates[fate].append((str(rung), value, trial.number))
        values = [value for _, value in reached]
        cut = cut_off(values, search.reduction_factor) if search.scheduler == "asha" else None
        if cut is not None:
            lines.append(([index - 0.4, index + 0.4], [cut, cut]))
        stopped = sum(t.epoch == rung and t.state == "pruned" for t, _ in reached)
        rows.append((rung, len(reached), min(values, default=None), cut, stopped))
    return _drawn_rungs(material, fates, lines, rows)


def _drawn_rungs(
    material: Material,
    fates: dict[str, list[tuple[str, float, int]]],
    lines: list[tuple[list[object], list[object]]],
    rows: list[tuple[int, int, float | None, float | None, int]],
) -> Markup:
    import plotly.graph_objects as go

    looks = {
        "went on": "done", "stopped here": "pruned", "waits here": "running", "failed": "failed",
    }  # fmt: skip
    names = [str(row[0]) for row in rows]
    figure = go.Figure()
    for fate, points in fates.items():
        if points:
            figure.add_scatter(
                # Jitter within the rung by the trial's number, so that equal values do not overlap.
                x=[names.index(p[0]) + 0.3 * ((p[2] * 0.618034) % 1 * 2 - 1) for p in points],
                y=[p[1] for p in points],
                customdata=[p[2] for p in points],
                mode="markers",
                name=fate,
                marker={
                    "color": STATE_COLOURS[looks[fate]],
                    "symbol": STATE_SYMBOLS[looks[fate]],
                    "size": 7,
                },
                hovertemplate="trial %{customdata}: %{y:.5g}<extra></extra>",
            )
    if lines:
        x, y = joined(lines)
        line = {"color": "var(--ink)", "width": 2, "dash": "dot"}
        figure.add_scatter(x=x, y=y, mode="lines", name="cut-off", line=line)
    figure.update_layout(
        xaxis={
            "title": "rung: after epoch",
            "tickvals": list(range(len(names))),
            "ticktext": names,
            "range": [-0.5, len(names) - 0.5],
            "showgrid": False,
            "zeroline": False,
        },
        yaxis=axis_for([p[1] for points in fates.values() for p in points], material.measure),
    )
    factor = material.study.search.reduction_factor
    if material.study.search.scheduler == "asha":
        remark = (
            f"One in {factor} goes on. The dotted line is the cut-off by all that is known now; a "
            "trial was judged by those that were at the rung before it, so that early ones may "
            "have gone on from above the line."
        )
        if material.study.search.least_chance:
            remark += " Others stopped below it because their chance to win was too small."
    elif material.study.search.scheduler == "asha-pausing":
        remark = (
            f"A trial goes on from its rung as soon as it is among the best there, one in {factor}."
        )
    elif material.study.search.scheduler == "pbt":
        remark = (
            "Each trial that stopped here was replaced by a successor of one of the best of its "
            "population, which is first compared at the next rung."
        )
    else:
        remark = "Hyperband's brackets begin to stop at different rungs: there is no one cut-off."
    told = "; ".join(
        f"after epoch {rung} {stopped} of {reached} stopped"
        for rung, reached, _, _, stopped in rows
    )
    return chart(
        figure,
        f"Objective of the trials at {counted(len(rows), 'rung')}: {told}.",
        title="Rungs",
        numbers=table(["rung", "trials there", "best", "cut-off", "stopped here"], rows),
        remark=remark,
    )


def learning_curves(material: Material) -> Markup:
    """Draw the objective of every trial over its epochs; stopped and failed trials are marked."""
    import plotly.graph_objects as go

    trials = [t for t in material.trials if t.curve]
    if not trials:
        return note("No trial has reported an epoch yet.")
    best = material.best
    shown = _chosen(material, trials, _MOST_CURVES)
    most = max(2, _MOST_POINTS // len(shown))
    figure = go.Figure()
    for state, colour in STATE_COLOURS.items():
        chosen = [t for t in shown if t.state == state and t is not best]
        if chosen:
            _add_curves(figure, chosen, state, colour, most)
    if best is not None:
        role = "winner" if material.promoted is None else "best of the search"
        epochs, values = zip(*thinned(best.curve, most), strict=True)
        figure.add_scatter(
            x=epochs,
            y=values,
            mode="lines+markers",
            name=f"{role}, trial {best.number:04d}",
            line={"color": "var(--ink)", "width": 2.5},
            marker={"size": 5},
            hovertemplate=f"{role}, epoch %{{x}}: %{{y:.5g}}<extra></extra>",
        )
    reached = [value for t in shown for _, value in t.curve]
    figure.update_layout(xaxis_title="epoch", yaxis=axis_for(reached, material.measure))
    remark = "A curve ends with × where its trial was stopped, with + where it failed."
    remark += _left_out(trials, shown)
    counts = {state: sum(t.state == state for t in trials) for state in STATE_WORDS}
    ends = ", ".join(f"{n} {STATE_WORDS[state]}" for state, n in counts.items() if n)
    return chart(
        figure,
        f"Objective by epoch of {counted(len(shown), 'trial')} ({ends} of those that reported).",
        numbers=table(
            ["trial", "state", "first", "last", "epochs"],
            [
                (t.number, STATE_WORDS[t.state], t.curve[0][1], t.curve[-1][1], t.epoch)
                for t in shown
            ],
        ),
        height=440,
        remark=remark,
    )


def _chosen(material: Material, trials: list[TrialRecord], most: int) -> list[TrialRecord]:
    """Return at most so many trials: half of them the best, the others evenly chosen."""
    if len(trials) <= most:
        return trials
    first = {t.number for t in material.ranking[: most // 2]}
    rest = [t for t in trials if t.number not in first]
    kept = first | {t.number for t in thinned(rest, most - len(first))}
    return [t for t in trials if t.number in kept]


def _left_out(trials: list[TrialRecord], shown: list[TrialRecord]) -> str:
    if len(shown) == len(trials):
        return ""
    return f" Of {len(trials):,} trials {len(shown):,} are drawn: the best, and others evenly."


def _add_curves(
    figure: go.Figure, trials: list[TrialRecord], state: str, colour: str, most: int
) -> None:
    curves = [thinned(t.curve, most) for t in trials]
    x, y = joined([([e for e, _ in curve], [v for _, v in curve]) for curve in curves])
    figure.add_scatter(
        x=x,
        y=y,
        mode="lines",
        name=STATE_WORDS[state],
        legendgroup=state,
        opacity=opacity_of(len(trials)),
        line={"color": colour, "width": 1.3},
        hoverinfo="skip",
        showlegend=False,
    )
    figure.add_scatter(
        x=[curve[-1][0] for curve in curves],
        y=[curve[-1][1] for curve in curves],
        customdata=[t.number for t in trials],
        mode="markers",
        name=STATE_WORDS[state],
        legendgroup=state,
        marker={"color": colour, "symbol": STATE_SYMBOLS[state], "size": 7},
        hovertemplate="trial %{customdata}: %{y:.5g} after epoch %{x}<extra></extra>",
    )
