"""Drawn scenes: true and detected sources over the winner's spectrum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from model.wording import counted
from tuner.pages.chart import chart, grid
from tuner.pages.markup import Markup, note, short, table
from tuner.suites import CHOOSERS

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tuner.pages.material import Material

_KEYS = {"origin", "db_per_step", "azimuth_deg", "elevation_deg", "range_m", "views"}
_ROW = 34  # pixels of a source in range
_BARE = {"showgrid": False, "zeroline": False}
_NINETY = 1.645  # standard deviations of a normal's middle nine tenths
_TRUE = {"symbol": "circle-open", "size": 15, "color": "#ffffff", "line": {"width": 2.5}}
_FOUND = {
    "symbol": "x", "size": 9, "color": "#ff3b47", "line": {"color": "#ffffff", "width": 1}
}  # fmt: skip


def scenes(material: Material) -> Markup:
    """Draw azimuth and elevation, and range, of a few held-out scenes."""
    content = material.scenes
    if content is None:
        why = (
            "no trial has finished"
            if material.best is None
            else "a search draws them at its end, and tuner.report where best/ is there"
        )
        return note(f"No scenes.json: {why}.")
    if not content.keys() >= _KEYS or not content["views"]:
        return note("scenes.json is of another form; without it tuner.report writes it anew.")
    kind = "Validation" if CHOOSERS in content["origin"] else "Held-out"
    how = (
        f"{kind} scenes ({content['origin']}): the first of each number of sources, not chosen "
        "by what was found. Background: MVDR of the blended covariance below its peak, over "
        "directions in the planes of the ranges that were found, and along the range in each "
        "source's direction. A ring is a source, a cross what the winner found; a cross in a ring "
        "agrees in direction, and is a hit where its range agrees too."
    )
    views = [_view(content, view) for view in content["views"]]
    return Markup(note(how) + grid(views, 420))


def _view(content: dict[str, Any], view: dict[str, Any]) -> Markup:
    sources = view["sources"]
    n_true = sum(s["true"] is not None for s in sources)
    n_found = sum(s["found"] is not None for s in sources)
    n_hits = sum(s["true"] is not None and s["found"] is not None for s in sources)
    level = "" if view["snr_db"] is None else f", SNR {view['snr_db']:g} dB"
    told = (
        f"Scene {view['scene']}{level}: {counted(n_true, 'source')}, {n_found} found, "
        f"{counted(n_hits, 'hit')}"
    )
    directions = chart(
        _directions(content, view),
        f"{told}. {_places(sources)}",
        title=told,
        numbers=table(
            ["true az [°]", "el [°]", "r [m]", "found az [°]", "el [°]", "r [m]"],
            [(*(s["true"] or ("", "", "")), *(s["found"] or ("", "", ""))) for s in sources],
        ),
        height=330,
    )
    if not sources:
        return Markup(f"<div>{directions}</div>")
    along = chart(
        _ranges(content, view),
        f"Range of the sources of scene {view['scene']}: {_distances(sources)}.",
        height=80 + _ROW * len(sources),
    )
    return Markup(f"<div>{directions}{along}</div>")


def _directions(content: dict[str, Any], view: dict[str, Any]) -> go.Figure:
    import plotly.graph_objects as go

    step = content["db_per_step"]
    figure = go.Figure(
        go.Heatmap(
            z=[[-step * value for value in row] for row in view["spectrum"]],
            x=content["azimuth_deg"],
            y=content["elevation_deg"],
            colorscale="Viridis",
            colorbar={"title": {"text": "dB"}, "thickness": 10, "outlinewidth": 0},
            zsmooth="best",
            zmin=-step * max(map(max, view["spectrum"])),
            zmax=0,
            hovertemplate="%{x:.1f}°, %{y:.1f}°: %{z:.1f} dB<extra></extra>",
        )
    )
    for name, key, marker in (("source", "true", _TRUE), ("found", "found", _FOUND)):
        points = [s[key] for s in view["sources"] if s[key] is not None]
        if points:
            figure.add_scatter(
                x=[p[0] for p in points],
                y=[p[1] for p in points],
                customdata=[p[2] for p in points],
                mode="markers",
                name=name,
                marker=marker,
                showlegend=False,
                hovertemplate=f"{name}: %{{x:.2f}}°, %{{y:.2f}}°, %{{customdata:.2f}} m"
                "<extra></extra>",
            )
    return figure.update_layout(
        xaxis={"title": "azimuth [°]", "range": _around(content["azimuth_deg"]), **_BARE},
        yaxis={"title": "elevation [°]", "range": _around(content["elevation_deg"]), **_BARE},
        margin={"t": 10},
    )


def _ranges(content: dict[str, Any], view: dict[str, Any]) -> go.Figure:
    import plotly.graph_objects as go

    sources, step = view["sources"], content["db_per_step"]
    names = [_name(index, source) for index, source in enumerate(sources)]
    figure = go.Figure(
        go.Heatmap(
            z=[[-step * value for value in row] for row in view["along_range"]],
            x=content["range_m"],
            zmin=-step * max(map(max, view["spectrum"])),
            zmax=0,
            y=names,
            colorscale="Viridis",
            showscale=False,
            ygap=6,
            hovertemplate="%{x:.2f} m: %{z:.1f} dB<extra></extra>",
        )
    )
    for name, key, marker in (("source", "true", _TRUE), ("found", "found", _FOUND)):
        points = [(s[key][2], n, s) for s, n in zip(sources, names, strict=True) if s[key]]
        if not points:
            continue
        spread: dict[str, Any] = {}
        if key == "found":
            widths = [_NINETY * (s["range_std_m"] or 0.0) for _, _, s in points]
            spread = {"error_x": {"array": widths, "color": "#ffffff", "thickness": 1.5}}
        figure.add_scatter(
            x=[p[0] for p in points],
            y=[p[1] for p in points],
            mode="markers",
            marker=marker,
            showlegend=False,
            hovertemplate=f"{name}: %{{x:.2f}} m<extra></extra>",
            **spread,
        )
    return figure.update_layout(
        xaxis={"title": "range [m]", "showgrid": False, "range": _around(content["range_m"])},
        yaxis={"categoryorder": "array", "categoryarray": names[::-1], "showgrid": False},
        margin={"t": 6},
    )


def _around(values: list[float]) -> list[float]:
    """Return an axis range from the first to the last value, with room for markers at the edges."""
    room = 0.03 * (values[-1] - values[0]) or 1.0
    return [values[0] - room, values[-1] + room]


def _name(index: int, source: dict[str, Any]) -> str:
    if source["true"] is None:
        return f"{index + 1} false"
    return f"{index + 1} hit" if source["found"] is not None else f"{index + 1} missed"


def _places(sources: list[dict[str, Any]]) -> str:
    true = [s["true"] for s in sources if s["true"] is not None]
    found = [s["found"] for s in sources if s["found"] is not None]
    parts = [
        f"{word} at " + ", ".join(f"({p[0]:.0f}°, {p[1]:.0f}°, {p[2]:.1f} m)" for p in points)
        for word, points in (("Sources", true), ("found", found))
        if points
    ]
    return "; ".join(parts) + "." if parts else "There is none."


def _distances(sources: list[dict[str, Any]]) -> str:
    return "; ".join(
        f"true {short(s['true'][2], 3) if s['true'] else 'none'}, "
        f"found {short(s['found'][2], 3) if s['found'] else 'none'}"
        for s in sources
    )
