"""The section on accuracy and cost: the Pareto front."""

from __future__ import annotations

from typing import TYPE_CHECKING

from model.wording import counted
from tuner.pages.chart import chart
from tuner.pages.markup import Markup, note, short, table
from tuner.pareto import front_of

if TYPE_CHECKING:
    from tuner.pages.material import Material


def pareto(material: Material) -> Markup:
    """Draw the front among all finished trials."""
    import plotly.graph_objects as go

    cost = material.study.search.cost
    if cost is None or not material.ranking:
        return note("No trial has finished yet.")
    front = front_of(material.ranking, cost)
    numbers = {trial.number for trial in front}
    rest = [trial for trial in material.ranking if trial.number not in numbers]
    figure = go.Figure()
    for name, trials, colour in (("dominated", rest, "pruned"), ("front", front, "done")):
        figure.add_scatter(
            x=[t.metrics[cost] for t in trials],
            y=[t.objective for t in trials],
            customdata=[t.number for t in trials],
            mode="markers" if name == "dominated" else "lines+markers",
            name=name,
            marker={"color": f"var(--{colour})", "size": 8},
            line={"color": f"var(--{colour})", "shape": "hv"},
            hovertemplate="trial %{customdata}: %{y:.5g} at %{x:.4g}<extra></extra>",
        )
    figure.update_layout(
        xaxis={"title": {"text": f"{cost} a scene"}, "type": "log"}, yaxis_title=material.measure
    )
    cheapest, best = front[0], front[-1]
    return chart(
        figure,
        f"{counted(len(front), 'trial')} of {len(material.ranking)} on the front, from "
        f"{short(cheapest.objective)} at {short(cheapest.metrics[cost])} {cost} to "
        f"{short(best.objective)} at {short(best.metrics[cost])}.",
        title=f"Objective and {cost}",
        numbers=table(
            ["trial", "objective", cost], [(t.number, t.objective, t.metrics[cost]) for t in front]
        ),
    )
