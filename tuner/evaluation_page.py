"""The evaluation as one self-contained page."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

_COLOURS = {
    "network": "#d62728",
    "network+refinement": "#e69f00",
    "music": "#1f77b4",
    "mvdr": "#6a51a3",
    "somp": "#8c564b",
    "nomp": "#2ca02c",
    "nomp-blind": "#7fbf3f",
}
_EFFICIENT = 0.6745  # median |x| of a standard normal: an estimator at its bound

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem;
       color: #222; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; } h3 { font-size: 1.05rem; }
table { border-collapse: collapse; font-size: 13px; }
th, td { border: 1px solid #ddd; padding: .25rem .5rem; text-align: right; white-space: nowrap; }
th { background: #f4f4f4; } td.text { text-align: left; }
.scroll { overflow-x: auto; } .quiet { color: #666; }
.pair { display: grid; gap: 1rem;
        grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
.pair > div { min-width: 0; }
"""

_COLUMNS = (
    ("F1", "f1"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("gated recall", "gated_recall"),
    ("GOSPA [m]", "gospa_m"),
    ("K right", "count_accuracy"),
    ("all found", "all_found"),
    ("|err|/CRB", "median_error_over_crb"),
    ("NMSE", "nmse"),
    ("subspace error", "subspace_error"),
)


def page(content: dict[str, Any]) -> str:
    """The page as text; it opens without a network."""
    from plotly.offline import get_plotlyjs

    told = "" if content["snr"] == "known" else " No estimator is told the SNR."
    network = html.escape(content["checkpoint"] or "none")
    introduction = (
        f"Network: {network}.{told} A source counts as found within 5 degrees of azimuth, "
        "5 degrees of elevation and 1 m of range. GOSPA with c = 2 m and p = 2. <em>Gated</em> "
        "sources are those whose Cramer-Rao bound is below 2.5 degrees, 2.5 degrees and 0.5 m. "
        f"|err|/CRB is a median over those found: {_EFFICIENT:.3f} if efficient. Bands "
        "are 95 % bootstrap intervals over scenes."
    )
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>Evaluation</title><style>{_STYLE}</style>",
        f"<script>{get_plotlyjs()}</script></head><body><h1>Estimators on the same scenes</h1>",
        f"<p>{introduction}</p>",
    ]
    for name, suite in content["suites"].items():
        parts += _suite(name, suite)
    # A chart is drawn before its neighbour is there to share the row with.
    parts.append(
        "<script>window.addEventListener('load', () => document.querySelectorAll("
        "'.plotly-graph-div').forEach((chart) => Plotly.Plots.resize(chart)))</script>"
    )
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _suite(name: str, suite: dict[str, Any]) -> list[str]:
    methods = suite["methods"]
    heading = f"{html.escape(name)}: {html.escape(suite['description'])}"
    about = f"{html.escape(suite['scenes'])}; {suite['gated_share']:.0%} of the sources are gated."
    return [
        f"<h2>{heading}</h2>",
        f"<p class='quiet'>Scenes: {about}</p>",
        _overall(suite),
        "<div class='pair'>",
        _drawn("F1 against SNR", _f1_by_snr(methods)),
        _drawn("|error| / CRB against SNR, gated sources", _ratio_by_snr(suite)),
        _drawn("Distance from a source to the nearest detection", _distances(suite)),
        _drawn("Recall against true range", _recall_by_range(methods)),
        "</div><h3>Number of sources: true (rows) and found (columns)</h3><div class='pair'>",
        *(
            _drawn(method, _confusion(report["confusion"]))
            for method, report in methods.items()
            if "K told" not in report["note"]
        ),
        "</div>",
    ]


def _overall(suite: dict[str, Any]) -> str:
    lines = ["<div class='scroll'><table><tr><th>method</th><th>how</th>"]
    lines += [f"<th>{html.escape(head)}</th>" for head, _ in _COLUMNS]
    paired = suite["paired_f1"]
    lines += [f"<th>less {html.escape(name)}'s F1 [95 %]</th>" for name in paired]
    lines.append("<th>scenes/s</th></tr>")
    for name, report in suite["methods"].items():
        numbers = report["overall"]
        told = "K told" in report["note"]
        cells = [
            "told" if key == "count_accuracy" and told else _number(numbers.get(key))
            for _, key in _COLUMNS
        ]
        low, high = numbers["f1_interval"]
        cells[0] += f" [{low:.3f}, {high:.3f}]"
        cells += [_signed(differences.get(name)) for differences in paired.values()]
        cells.append(f"{report['scenes_per_second']:.1f}")
        lines.append(
            f"<tr><td class='text'>{html.escape(name)}</td>"
            f"<td class='text'>{html.escape(report['note'])}</td>"
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    lines.append("</table></div>")
    return "\n".join(lines)


def _signed(difference: dict[str, Any] | None) -> str:
    if difference is None:  # from itself
        return ""
    low, high = difference["interval"]
    return f"{difference['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"


def _drawn(title: str, figure: go.Figure) -> str:
    figure.update_layout(
        template="plotly_white",
        margin={"t": 10, "l": 55, "r": 10, "b": 90},
        height=380,
        legend={"orientation": "h", "y": -0.2, "yanchor": "top"},
    )
    drawn = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        default_width="100%",
        config={"responsive": True, "displayModeBar": False},
    )
    return f"<div><h3>{html.escape(title)}</h3>{drawn}</div>"


def _f1_by_snr(methods: dict[str, Any]) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, report in methods.items():
        rows = [row for row in report["by_snr"] if row.get("f1_interval")]
        _band(
            figure,
            name,
            [_middle(row) for row in rows],
            [row["f1"] for row in rows],
            [row["f1_interval"] for row in rows],
        )
    return figure.update_layout(xaxis_title="SNR [dB]", yaxis_title="F1", yaxis_range=[0, 1])


def _ratio_by_snr(suite: dict[str, Any]) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, curves in suite["curves"].items():
        rows = [row for row in curves["ratio_by_snr"] if row["median"] is not None]
        _band(
            figure,
            name,
            [_middle(row) for row in rows],
            [row["median"] for row in rows],
            [row["interval"] for row in rows],
        )
    figure.add_hline(y=_EFFICIENT, line_dash="dot", line_color="#888")
    # On a logarithmic axis a note's height is a logarithm.
    figure.add_annotation(
        x=1, xref="paper", xanchor="right", y=math.log10(_EFFICIENT), yanchor="top",
        text="efficient", showarrow=False,
    )  # fmt: skip
    return figure.update_layout(
        xaxis_title="SNR [dB]", yaxis_title="median |error| / CRB", yaxis_type="log"
    )


def _band(
    figure: go.Figure,
    name: str,
    x: list[float],
    y: list[float],
    intervals: list[list[float]],
) -> None:
    colour = _COLOURS.get(name, "#444")
    if not x:
        return
    around = [low for low, _ in intervals] + [high for _, high in reversed(intervals)]
    figure.add_scatter(
        x=x + x[::-1],
        y=around,
        fill="toself",
        fillcolor=colour,
        opacity=0.15,
        mode="none",
        hoverinfo="skip",
        showlegend=False,
        legendgroup=name,
    )
    figure.add_scatter(
        x=x, y=y, name=name, legendgroup=name, mode="lines+markers", line={"color": colour}
    )


def _distances(suite: dict[str, Any]) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, curves in suite["curves"].items():
        points = curves["error_quantiles"]
        pairs = [
            (max(d, 1e-3), s)
            for d, s in zip(points["distance_m"], points["share"], strict=True)
            if d is not None
        ]
        figure.add_scatter(
            x=[d for d, _ in pairs],
            y=[s for _, s in pairs],
            name=name,
            mode="lines",
            line={"color": _COLOURS.get(name, "#444")},
        )
    return figure.update_layout(
        xaxis_title="distance [m]",
        yaxis_title="share of sources",
        xaxis_type="log",
        yaxis_range=[0, 1],
    )


def _recall_by_range(methods: dict[str, Any]) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, report in methods.items():
        rows = [row for row in report["by_range"] if row["recall"] is not None]
        figure.add_scatter(
            x=[_range(row) for row in rows],
            y=[row["recall"] for row in rows],
            name=name,
            mode="lines+markers",
            line={"color": _COLOURS.get(name, "#444")},
        )
    return figure.update_layout(
        xaxis_title="true range [m]", yaxis_title="recall", yaxis_range=[0, 1]
    )


def _confusion(counts: list[list[int]]) -> go.Figure:
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
            colorscale="Blues",
            text=[[str(c) for c in counts[k]] for k in rows],
            texttemplate="%{text}",
            showscale=False,
        )
    )
    return figure.update_layout(
        xaxis={"title": "found", "type": "category"},
        yaxis={"title": "true", "type": "category", "autorange": "reversed"},
    )


def _middle(row: dict[str, Any]) -> float:
    return 0.5 * (float(row["low_db"]) + float(row["high_db"]))


def _range(row: dict[str, Any]) -> str:
    return f"{row['low_m']:g}.." + ("" if row["high_m"] is None else f"{row['high_m']:g}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
