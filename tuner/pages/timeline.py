"""The timeline: where and when each trial trained, and how busy the slots were."""

from __future__ import annotations

from datetime import datetime
from html import escape
from typing import TYPE_CHECKING

from model.wording import counted
from tuner.duration import format_duration
from tuner.pages.chart import STATE_COLOURS, chart
from tuner.pages.markup import Markup, note, table
from tuner.pages.timing import Segment, slots_of
from tuner.records import STATE_WORDS

if TYPE_CHECKING:
    from tuner.pages.material import Material

_MOST_BARS = 3000
_LANE = 22  # pixels
_TALLEST = 900


def timeline(material: Material) -> Markup:
    """Draw periods of training as bars by slot, and a table of the places."""
    segments = slots_of(material.segments)
    if not segments:
        return note("No epoch has been timed yet.")
    return Markup(_bars(material, segments) + _places(material, segments))


def _bars(material: Material, segments: list[Segment]) -> Markup:
    import plotly.graph_objects as go

    lanes = sorted({(s.place, s.slot) for s in segments})
    several = {place for place, slot in lanes if slot}
    names = {
        (place, slot): escape(f"{place} · {slot + 1}" if place in several else place)
        for place, slot in lanes
    }
    # If there are too many, draw the longest: the others would not be visible.
    drawn = sorted(segments, key=lambda s: s.begin - s.end)[:_MOST_BARS]
    figure = go.Figure()
    for state, colour in STATE_COLOURS.items():
        chosen = [s for s in drawn if s.state == state]
        if chosen:
            figure.add_bar(
                orientation="h",
                y=[names[s.place, s.slot] for s in chosen],
                base=[_local(s.begin) for s in chosen],
                x=[round(1000 * (s.end - s.begin)) for s in chosen],  # [ms] on an axis of dates
                customdata=[[s.number, *s.epochs, format_duration(s.busy)] for s in chosen],
                name=STATE_WORDS[state],
                marker={"color": colour, "line": {"color": "var(--paper)", "width": 1}},
                hovertemplate="trial %{customdata[0]}, epochs %{customdata[1]} to %{customdata[2]}"
                "<br>%{customdata[3]} of training<extra></extra>",
            )
    figure.update_layout(
        barmode="overlay",
        bargap=0.25,
        xaxis={"type": "date"},
        yaxis={"categoryorder": "array", "categoryarray": [names[lane] for lane in lanes][::-1]},
    )
    busy = f", training {material.busy:.0%} of the time" if material.busy is not None else ""
    places = len({place for place, _ in lanes})
    remark = (
        "A bar is a stretch of epochs of one trial; a gap is waiting, loading or an interruption. "
        "Times are local to where this page was written."
    )
    if len(drawn) < len(segments):
        remark += f" The longest {len(drawn):,} of {len(segments):,} stretches."
    return chart(
        figure,
        f"Timeline of {counted(len({s.number for s in segments}), 'trial')} in "
        f"{counted(len(lanes), 'slot')} at {counted(places, 'place')}{busy}.",
        height=min(_TALLEST, 110 + _LANE * len(lanes)),
        remark=remark,
    )


def _places(material: Material, segments: list[Segment]) -> Markup:
    rows = []
    for place in sorted({s.place for s in segments}):
        here = [s for s in segments if s.place == place]
        slots = 1 + max(s.slot for s in here)
        busy = sum(s.busy for s in here)
        span = max(s.end for s in here) - min(s.begin for s in here)
        whole = slots * material.seconds
        rows.append(
            (
                place,
                slots,
                len({s.number for s in here}),
                format_duration(busy),
                format_duration(span),
                f"{min(1.0, busy / whole):.0%}" if whole else "",
            )
        )
    heads = ["place", "slots", "trials", "training", "from first to last", "busy"]
    remark = (
        f"Busy: training, of the time in which the study's trials ran "
        f"({format_duration(material.seconds)}), in every slot that was ever used at once."
    )
    return Markup(table(heads, rows) + note(remark))


def _local(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
