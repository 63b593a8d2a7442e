"""The effect of parameters: importances, slices and parallel coordinates of finished trials."""

from __future__ import annotations

from typing import TYPE_CHECKING

from model.wording import counted
from tuner.pages.chart import axis_for, chart, grid
from tuner.pages.markup import Markup, note, short, table

if TYPE_CHECKING:
    import optuna
    import plotly.graph_objects as go

    from tuner.pages.material import Material
    from tuner.records import TrialRecord

_FEWEST = 3  # minimum of finished trials for meaningful importances and slices
_MOST_TRIALS = 200  # in parallel coordinates
_MOST_AXES = 8
_MOST_SLICES = 6
_ROW = 26  # pixels of a bar
_RANKS = ("best fifth", "second fifth", "third fifth", "fourth fifth", "last fifth")


def importances(material: Material) -> Markup:
    """Draw the importance of each parameter, and the objective along the most important ones."""
    missing = _too_few(material)
    if missing:
        return note(missing)
    from optuna import visualization

    study, names = material.finished(), _varied(material)
    weights = _weights(study, names)
    figure = visualization.plot_param_importances(study, params=names)
    figure.update_traces(marker_color="var(--accent)", textfont_size=11)
    figure.update_layout(xaxis_title="importance", yaxis_title=None, showlegend=False)
    figure.update_xaxes(range=[0, 1.15 * max(weights.values())])
    first = ", ".join(f"{name} {weight:.0%}" for name, weight in list(weights.items())[:3])
    n_done = len(study.get_trials(deepcopy=False))
    bars = chart(
        figure,
        f"Importance of {counted(len(weights), 'parameter')}, the largest: {first}.",
        numbers=table(["parameter", "importance"], list(weights.items())),
        height=90 + _ROW * len(weights),
        remark=(
            f"PED-ANOVA over {counted(n_done, 'finished trial')}: how much being good depends on "
            "the parameter. Few trials make it a guess."
        ),
    )
    slices = [_slice(study, name, material.measure) for name in list(weights)[:_MOST_SLICES]]
    return Markup(bars + "<h3>Objective along the most important</h3>" + grid(slices, 300))


def _slice(study: optuna.Study, name: str, measure: str) -> Markup:
    from optuna import visualization

    figure = visualization.plot_slice(study, params=[name])
    figure.update_traces(
        marker={"color": "var(--accent)", "size": 7, "showscale": False, "line_width": 0},
        showlegend=False,
    )
    figure.update_layout(width=None, yaxis_title=measure, xaxis_title=None, showlegend=False)
    trials = study.get_trials(deepcopy=False)
    if figure.layout.xaxis.type == "log":
        figure.update_xaxes(axis_for([float(t.params[name]) for t in trials], log=True))
    n_trials = len(trials)
    return chart(
        figure,
        f"Objective of {counted(n_trials, 'finished trial')} against {name}.",
        title=name,
        height=240,
    )


def parallel(material: Material) -> Markup:
    """Draw finished trials as lines over the axes of the most important parameters."""
    missing = _too_few(material)
    if missing:
        return note(missing)
    import optuna
    from optuna import visualization

    study, names = material.finished(), _varied(material)
    axes = list(_weights(study, names))[:_MOST_AXES]
    every = study.get_trials(deepcopy=False)
    kept = sorted(every, key=lambda t: t.value if t.value is not None else 0.0)[:_MOST_TRIALS]
    some = optuna.create_study(direction="minimize")
    some.add_trials(kept)
    figure = visualization.plot_parallel_coordinate(some, params=axes, target_name="objective")
    _recolour(figure)
    _relabel(figure, sorted(axes), [t.value for t in kept if t.value is not None])
    remark = ""
    if len(axes) < len(names):
        remark = f"The {len(axes)} most important of {counted(len(names), 'parameter')}. "
    if len(kept) < len(every):
        remark += f"The best {len(kept)} of {len(every):,} finished trials."
    best = kept[0]
    named = ", ".join(f"{name} {short(best.params.get(name))}" for name in axes)
    return chart(
        figure,
        f"{counted(len(kept), 'finished trial')} as lines over the objective and "
        f"{counted(len(axes), 'parameter')}; the best, {short(best.value)}, has {named}.",
        numbers=table(
            ["objective", *axes],
            [(t.value, *(t.params.get(axis) for axis in axes)) for t in kept],
        ),
        height=460,
        remark=remark,
    )


def _recolour(figure: go.Figure) -> None:
    """Colour lines by fifths of the rank in the page's colours, with the best on top.

    Optuna draws the best in the darkest blue, which is invisible on a dark page.
    """
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    objective = [float(trace.y[0]) for trace in lines]  # the first axis, low is good
    order = sorted(range(len(lines)), key=lambda index: objective[index])
    named: set[int] = set()
    drawn = []
    for rank, index in enumerate(order):
        fifth = min(len(_RANKS) - 1, rank * len(_RANKS) // max(1, len(order)))
        trace = lines[index]
        trace.update(
            line={"color": f"var(--rank-{fifth})", "width": 2.4 if rank == 0 else 1.3},
            opacity=1 if fifth == 0 else 0.8,
            name=_RANKS[fifth],
            legendgroup=str(fifth),
            showlegend=fifth not in named,
            legendrank=fifth,
        )
        named.add(fifth)
        drawn.append(trace)
    figure.data = []
    figure.add_traces(drawn[::-1])
    figure.update_layout(
        plot_bgcolor=None,
        legend={"x": 0, "xanchor": "left", "y": 1.04, "yanchor": "bottom", "orientation": "h"},
    )
    figure.update_annotations(
        font={"size": 10, "color": "var(--muted)"}, bgcolor="var(--paper)", borderpad=1
    )
    figure.update_shapes(line={"color": "var(--faint)", "width": 1})


def _relabel(figure: go.Figure, axes: list[str], values: list[float]) -> None:
    """Show enough digits to distinguish objectives, and full names that fit side by side."""
    low, high = min(values), max(values)
    for annotation in figure.layout.annotations:
        if annotation.x == 0:
            annotation.text = f"{low + annotation.y * (high - low):.5g}"
    names = ["objective", *axes]
    figure.update_layout(
        # On a narrow screen the page's script rotates the chart: axes run from top to bottom.
        meta={"turns": True},
        xaxis={
            "ticktext": [name.replace(".", ".<br>", 1) for name in names],
            "tickangle": 0,
            "range": [-0.45, len(names) - 0.6],
        },
    )


def _weights(study: optuna.Study, names: list[str]) -> dict[str, float]:
    from optuna.importance import get_param_importances

    return dict(get_param_importances(study, params=names))


def _too_few(material: Material) -> str:
    n_drawn, n_done = len(_drawn(material)), material.counts["done"]
    if n_drawn < _FEWEST:
        there = f"there are {n_drawn}"
        if n_drawn < n_done:
            there += f", beside {n_done - n_drawn} that began with another trial's weights"
        return f"Drawn from {_FEWEST} finished trials on; {there}."
    if not _varied(material):
        return "No parameter took more than one value in the finished trials."
    return ""


def _drawn(material: Material) -> list[TrialRecord]:
    """Return finished trials without inherited weights, as `finished()` does."""
    return [t for t in material.trials if t.state == "done" and t.heir is None]


def _varied(material: Material) -> list[str]:
    """Return the parameters that took more than one value in the finished trials."""
    done = _drawn(material)
    paths = list(done[0].params) if done else []
    return [p for p in paths if len({repr(t.params.get(p)) for t in done}) > 1]
