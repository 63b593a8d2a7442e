"""Charts that compare estimators on the same scenes, for the evaluation page and the report."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tuner.pages.chart import chart, grid
from tuner.pages.markup import Markup, Number, listed, note, short, table
from tuner.scoretable import signed

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tuner.pages.material import Material

_COLOURS = {
    "network": "var(--network)",
    "network+refinement": "var(--refined)",
    "music": "var(--music)",
    "mvdr": "var(--mvdr)",
    "somp": "var(--somp)",
    "nomp": "var(--nomp)",
    "nomp-dense": "var(--nomp)",
    "nomp-blind": "var(--blind)",
}
_DASHES = {
    "network+refinement": "dash",
    "nomp-dense": "dot",
    "nomp-blind": "dash",
    "mvdr": "dot",
    "somp": "dashdot",
}
EFFICIENT = 0.6745  # median |x| of a standard normal, reached by an efficient estimator

_COLUMNS = (
    ("precision", "precision"),
    ("recall", "recall"),
    ("gated recall", "gated_recall"),
    ("all found", "all_found"),
    ("|err|/CRB", "median_error_over_crb"),
    ("NMSE", "nmse"),
    ("subspace error", "subspace_error"),
)
HOW = (
    "A source counts as found within 5 degrees of azimuth, 5 degrees of elevation and 1 m of "
    "range. GOSPA with c = 2 m and p = 2. Gated sources are those whose Cramer-Rao bound is below "
    "2.5 degrees, 2.5 degrees and 0.5 m. |err|/CRB is a median over those found: "
    f"{EFFICIENT:.3f} if efficient. Bands are 95 % bootstrap intervals over scenes."
)


def scoreboard(material: Material) -> Markup:
    """Compare the winner with the classical methods, from evaluation.json."""
    content, best = material.evaluation, material.best
    if content is None:
        if best is None:
            return note("No trial has finished: there is nothing to score.")
        return note("No evaluation.json: a search scores its winner at its end.")
    if not usable(content):
        return note("evaluation.json is of another form; tuner.evaluate writes it anew.")
    parts: list[str] = []
    if not material.is_of_winner(content["config"]):
        parts.append(
            note("evaluation.json is of another network than the winner: an earlier one, or one "
                 "that was trained differently.")
        )  # fmt: skip
    name, suite = next(iter(content["suites"].items()))
    others = [other for other in content["suites"] if other != name]
    if others:
        parts.append(note(f"{name}: {suite['description']}. In evaluation.html: {listed(others)}."))
    return Markup("".join(parts) + suite_charts(suite) + note(HOW))


def usable(content: dict[str, Any]) -> bool:
    """Return whether the content is an evaluation with the fields that the page needs."""
    suites = content.get("suites")
    return isinstance(suites, dict) and bool(suites) and isinstance(content.get("config"), dict)


def suite_charts(suite: dict[str, Any]) -> Markup:
    """Return the tables and charts of one suite of scenes."""
    methods = suite["methods"]
    about = f"Scenes: {suite['scenes']}; {suite['gated_share']:.0%} of the sources are gated."
    counted = [
        _confusion(name, report["confusion"])
        for name, report in methods.items()
        if "K told" not in report["note"]
    ]
    charts = [
        _f1_by_snr(methods),
        _ratio_by_snr(suite),
        _f1_by_count(methods),
        _gospa_by_snr(methods),
        _recall_by_range(methods),
        _distances(suite),
    ]
    return Markup(
        note(about)
        + _overall(suite)
        + grid(charts)
        + "<h3>Number of sources: true (rows) and found (columns), in scenes</h3>"
        + grid(counted, 300)
    )


def _overall(suite: dict[str, Any]) -> Markup:
    """Return the compared measures with intervals, and below a table of all other scalars."""
    f1, gospa = suite["paired_f1"], suite.get("paired_gospa_m", {})
    heads = ["method", "how", "F1 [95 %]", *(f"F1 less {name}'s [95 %]" for name in f1)]
    heads += ["GOSPA [m]", *(f"GOSPA less {name}'s [95 %]" for name in gospa), "K right"]
    rows: list[list[object]] = []
    others: list[list[object]] = []
    for name, report in suite["methods"].items():
        numbers = report["overall"]
        low, high = numbers["f1_interval"]
        told = "K told" in report["note"]
        rows.append([
            name,
            report["note"],
            Number(f"{numbers['f1']:.3f} [{low:.3f}, {high:.3f}]"),
            *(Number(signed(differences.get(name))) for differences in f1.values()),
            _number(numbers.get("gospa_m")),
            *(Number(signed(differences.get(name))) for differences in gospa.values()),
            Number("told") if told else _number(numbers.get("count_accuracy")),
        ])  # fmt: skip
        others.append([name, *(_number(numbers.get(key)) for _, key in _COLUMNS),
                       Number(f"{report['scenes_per_second']:.1f}")])  # fmt: skip
    more = table(["method", *(head for head, _ in _COLUMNS), "scenes/s"], others)
    return Markup(table(heads, rows) + more)


def _number(value: float | None) -> Number:
    return Number("" if value is None else f"{value:.3f}")


def _f1_by_snr(methods: dict[str, Any]) -> Markup:
    import plotly.graph_objects as go

    figure = go.Figure()
    told, lines = [], []
    for name, report in methods.items():
        rows = [row for row in report["by_snr"] if row.get("f1_interval")]
        if not rows:
            continue
        values = [row["f1"] for row in rows]
        _band(
            figure, name, [_middle(row) for row in rows], values, [r["f1_interval"] for r in rows]
        )
        told.append(f"{name} from {values[0]:.2f} to {values[-1]:.2f}")
        lines += [(name, _decibels(r), r["scenes"], r["f1"], *r["f1_interval"]) for r in rows]
    figure.update_layout(xaxis_title="SNR [dB]", yaxis_title="F1", yaxis_range=[0, 1])
    return chart(
        figure,
        f"F1 against SNR, from the lowest band to the highest: {listed(told) or 'nothing'}.",
        title="F1 against SNR",
        numbers=table(["method", "SNR [dB]", "scenes", "F1", "low", "high"], lines),
    )


def _ratio_by_snr(suite: dict[str, Any]) -> Markup:
    import plotly.graph_objects as go

    figure = go.Figure()
    told, lines = [], []
    for name, curves in suite["curves"].items():
        rows = [row for row in curves["ratio_by_snr"] if row["median"] is not None]
        if not rows:
            continue
        values = [row["median"] for row in rows]
        _band(
            figure, name, [_middle(row) for row in rows], values, [row["interval"] for row in rows]
        )
        told.append(f"{name} from {values[0]:.2g} to {values[-1]:.2g}")
        lines += [(name, _decibels(row), row["median"], *row["interval"]) for row in rows]
    figure.add_hline(y=EFFICIENT, line={"dash": "dot", "color": "var(--muted)", "width": 1})
    # On a logarithmic axis the position of an annotation is a logarithm.
    figure.add_annotation(
        x=1, xref="paper", xanchor="right", y=math.log10(EFFICIENT), yanchor="top",
        text="efficient", showarrow=False,
    )  # fmt: skip
    figure.update_layout(
        xaxis_title="SNR [dB]", yaxis_title="median |error| / CRB", yaxis_type="log"
    )
    return chart(
        figure,
        "Median error over the Cramer-Rao bound of the gated sources against SNR, from the "
        f"lowest band to the highest: {listed(told) or 'none'}; {EFFICIENT:.2f} is efficient.",
        title="|error| / CRB against SNR, gated sources",
        numbers=table(["method", "SNR [dB]", "median", "low", "high"], lines),
    )


def _gospa_by_snr(methods: dict[str, Any]) -> Markup:
    import plotly.graph_objects as go

    figure = go.Figure()
    told, lines = [], []
    for name, report in methods.items():
        rows = [row for row in report["by_snr"] if row.get("gospa_m") is not None]
        if not rows:
            continue
        figure.add_scatter(
            x=[_middle(row) for row in rows],
            y=[row["gospa_m"] for row in rows],
            name=name,
            mode="lines+markers",
            line=_line(name),
            hovertemplate="%{x:g} dB: %{y:.3f} m<extra>" + name + "</extra>",
        )
        told.append(f"{name} from {rows[0]['gospa_m']:.2f} to {rows[-1]['gospa_m']:.2f} m")
        lines += [(name, _decibels(row), row["scenes"], row["gospa_m"]) for row in rows]
    figure.update_layout(
        xaxis_title="SNR [dB]", yaxis={"title": "mean GOSPA [m]", "rangemode": "tozero"}
    )
    return chart(
        figure,
        f"GOSPA against SNR, from the lowest band to the highest: {listed(told) or 'nothing'}.",
        title="GOSPA against SNR",
        numbers=table(["method", "SNR [dB]", "scenes", "GOSPA [m]"], lines),
    )


def _line(name: str) -> dict[str, str]:
    return {"color": _COLOURS.get(name, "var(--muted)"), "dash": _DASHES.get(name, "solid")}


def _f1_by_count(methods: dict[str, Any]) -> Markup:
    import plotly.graph_objects as go

    figure = go.Figure()
    told, lines = [], []
    for name, report in methods.items():
        rows = [row for row in report["by_k"] if row.get("f1_interval")]
        if not rows:
            continue
        figure.add_bar(
            x=[str(row["n_sources"]) for row in rows],
            y=[row["f1"] for row in rows],
            name=name,
            marker={"color": _COLOURS.get(name, "var(--muted)")},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [row["f1_interval"][1] - row["f1"] for row in rows],
                "arrayminus": [row["f1"] - row["f1_interval"][0] for row in rows],
                "color": "var(--muted)",
                "thickness": 1,
                "width": 3,
            },
            hovertemplate="%{x} sources: %{y:.3f}<extra>" + name + "</extra>",
        )
        told.append(f"{name} from {rows[0]['f1']:.2f} to {rows[-1]['f1']:.2f}")
        lines += [(name, r["n_sources"], r["scenes"], r["f1"], *r["f1_interval"]) for r in rows]
    figure.update_layout(
        barmode="group",
        xaxis={"title": "sources in the scene, K", "type": "category"},
        yaxis={"title": "F1", "range": [0, 1]},
    )
    return chart(
        figure,
        f"F1 by the number of sources, from the least to the most: {listed(told) or 'nothing'}.",
        title="F1 by number of sources",
        numbers=table(["method", "K", "scenes", "F1", "low", "high"], lines),
    )


def _band(
    figure: go.Figure,
    name: str,
    x: list[float],
    y: list[float],
    intervals: list[list[float]],
) -> None:
    colour = _COLOURS.get(name, "var(--muted)")
    figure.add_scatter(
        x=x + x[::-1],
        y=[low for low, _ in intervals] + [high for _, high in reversed(intervals)],
        fill="toself",
        fillcolor=colour,
        opacity=0.15,
        mode="none",
        hoverinfo="skip",
        showlegend=False,
        legendgroup=name,
    )
    figure.add_scatter(
        x=x,
        y=y,
        name=name,
        legendgroup=name,
        mode="lines+markers",
        line=_line(name),
        hovertemplate="%{x:g} dB: %{y:.3f}<extra>" + name + "</extra>",
    )


def _distances(suite: dict[str, Any]) -> Markup:
    import plotly.graph_objects as go

    figure = go.Figure()
    told, lines = [], []
    for name, curves in suite["curves"].items():
        points = curves["error_quantiles"]
        found = [
            (max(d, 1e-3), s)
            for d, s in zip(points["distance_m"], points["share"], strict=True)
            if d is not None
        ]
        figure.add_scatter(
            x=[d for d, _ in found],
            y=[s for _, s in found],
            name=name,
            mode="lines",
            line=_line(name),
            hovertemplate="%{y:.0%} within %{x:.3g} m<extra>" + name + "</extra>",
        )
        middle = next((d for d, s in found if s >= 0.5), None)
        told.append(f"{name} {short(middle)} m" if middle is not None else f"{name} none")
        lines += [(name, f"{s:.0%}", d) for d, s in found[::10]]
    figure.update_layout(
        xaxis={"title": "distance [m]", "type": "log"},
        yaxis={"title": "share of sources", "range": [0, 1]},
    )
    return chart(
        figure,
        f"Share of sources with a detection within a distance; half within: {listed(told)}.",
        title="Distance from a source to the nearest detection",
        numbers=table(["method", "share", "distance [m]"], lines),
    )


def _recall_by_range(methods: dict[str, Any]) -> Markup:
    import plotly.graph_objects as go

    figure = go.Figure()
    told, lines = [], []
    for name, report in methods.items():
        rows = [row for row in report["by_range"] if row["recall"] is not None]
        figure.add_scatter(
            x=[_range(row) for row in rows],
            y=[row["recall"] for row in rows],
            name=name,
            mode="lines+markers",
            line=_line(name),
            hovertemplate="%{x} m: %{y:.3f}<extra>" + name + "</extra>",
        )
        if rows:
            told.append(f"{name} from {rows[0]['recall']:.2f} to {rows[-1]['recall']:.2f}")
        lines += [(name, _range(row), row["sources"], row["recall"]) for row in rows]
    figure.update_layout(
        xaxis={"title": "true range [m]", "type": "category"},
        yaxis={"title": "recall", "range": [0, 1]},
    )
    return chart(
        figure,
        f"Recall against true range, from the nearest to the farthest: {listed(told)}.",
        title="Recall against true range",
        numbers=table(["method", "range [m]", "sources", "recall"], lines),
    )


def _confusion(name: str, counts: list[list[int]]) -> Markup:
    import plotly.graph_objects as go

    rows = [k for k, row in enumerate(counts) if sum(row)]
    share = [[c / sum(counts[k]) for c in counts[k]] for k in rows]
    figure = go.Figure(
        go.Heatmap(
            z=share,
            x=[str(k) for k in range(len(counts))],
            y=[str(k) for k in rows],
            zmin=0,
            zmax=1,
            colorscale=[[0, "var(--cell)"], [1, _COLOURS.get(name, "var(--accent)")]],
            text=[[str(c) for c in counts[k]] for k in rows],
            texttemplate="%{text}",
            showscale=False,
            hovertemplate="%{y} true, %{x} found: %{text} scenes, %{z:.0%}<extra></extra>",
        )
    )
    figure.update_layout(
        xaxis={"title": "found", "type": "category", "showgrid": False},
        yaxis={"title": "true", "type": "category", "autorange": "reversed", "showgrid": False},
    )
    every = sum(map(sum, counts))
    right = sum(counts[k][k] for k in rows)
    return chart(
        figure,
        f"Confusion of the number of sources by {name}: right in {right} of {every} scenes.",
        title=name,
        height=300,
    )


def _middle(row: dict[str, Any]) -> float:
    return 0.5 * (float(row["low_db"]) + float(row["high_db"]))


def _decibels(row: dict[str, Any]) -> str:
    return f"{row['low_db']:g}..{row['high_db']:g}"


def _range(row: dict[str, Any]) -> str:
    return f"{row['low_m']:g}.." + ("" if row["high_m"] is None else f"{row['high_m']:g}")
