"""`python -m tuner.report RUN_DIR`: one self-contained page that shows a study."""

from __future__ import annotations

import html
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.command import execute
from tuner.duration import format_duration

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tuner.folder import RunFolder
    from tuner.promotion import Promotion
    from tuner.study import Ledger, TrialRecord

logger = logging.getLogger(__name__)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

_COLOURS = {"running": "#1f77b4", "done": "#2ca02c", "pruned": "#e69f00", "failed": "#d62728"}
_FEWEST = 3  # finished trials below which importances and slices say nothing
_HEIGHT = 420

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem;
       color: #222; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: 13px; }
th, td { border: 1px solid #ddd; padding: .25rem .5rem; text-align: right; white-space: nowrap; }
th { background: #f4f4f4; } td.text { text-align: left; white-space: normal; }
tr.best { font-weight: 600; background: #eefaee; }
.scroll { overflow-x: auto; } .quiet { color: #666; }
"""


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Run folder of a study.")],
) -> int:
    """Write report.html: history, learning curves, importances and every trial of a study."""
    from tuner.config import load_study
    from tuner.errors import StudyError
    from tuner.folder import RunFolder
    from tuner.ledger import read_ledger

    folder = RunFolder.existing(run_dir, lock=False)
    ledger = read_ledger(folder, load_study(folder.config))
    try:
        write_report(folder, ledger)
    except OSError as error:
        raise StudyError(f"{folder.report}: cannot be written: {error.strerror}") from error
    finally:
        ledger.close()
    typer.echo(folder.report)
    return 0


def write_report(folder: RunFolder, ledger: Ledger) -> None:
    """Write the page; it holds all that it needs and opens without a network."""
    from model.files import write_text
    from tuner.promotion import open_promotion

    write_text(folder.report, page(ledger, open_promotion(ledger)))


def page(ledger: Ledger, promotion: Promotion | None = None) -> str:
    """The page as text."""
    from plotly.offline import get_plotlyjs

    from tuner.promotion_page import promoted_section

    study = ledger.config
    trials = ledger.trials()
    best = ledger.best()
    title = html.escape(f"{study.name}: {len(trials)} trials")
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>{title}</title><style>{_STYLE}</style>",
        f"<script>{get_plotlyjs()}</script></head><body><h1>{title}</h1>",
        _facts(ledger, trials),
        _best_section(best),
        promoted_section(promotion),
    ]
    parts += _figure_sections(ledger, trials)
    parts += ["<h2>All trials</h2>", _trial_table(ledger, trials, best), "</body></html>\n"]
    return "\n".join(parts)


def _facts(ledger: Ledger, trials: list[TrialRecord]) -> str:
    from model.config import OBJECTIVES

    study = ledger.config
    counts = {state: sum(t.state == state for t in trials) for state in _COLOURS}
    data = study.data.shards or f"simulated, {study.data.train_scenes} scenes an epoch"
    rows = [
        ("trials", ", ".join(f"{count} {state}" for state, count in counts.items() if count)),
        ("objective", f"{OBJECTIVES[study.objective]}, best epoch so far; lower is better"),
        ("budget", f"{study.training.epochs} epochs a trial"),
        ("search", f"{study.search.sampler}, {study.search.scheduler}, seed {study.seed}"),
        ("data", str(data)),
        ("time of trials", _time(ledger)),
    ]
    begun = [t.started for t in trials if t.started]
    ended = [t.finished for t in trials if t.finished]
    if begun and ended:
        rows.append(("time", f"{begun[0]:%Y-%m-%d %H:%M} to {max(ended):%Y-%m-%d %H:%M}"))
    return _pairs(rows)


def _time(ledger: Ledger) -> str:
    budget = ledger.config.search.time_budget
    limit = f" of {format_duration(budget)}" if budget is not None else ""
    return f"{format_duration(ledger.seconds)}{limit}, over all sessions"


def _best_section(best: TrialRecord | None) -> str:
    if best is None:
        return "<h2>Best trial</h2><p class='quiet'>No trial has finished.</p>"
    rows = [("trial", f"{best.number:04d}"), ("objective", f"{best.objective:.6f}")]
    untrained = best.metrics.get("untrained_objective")
    if untrained is not None:
        rows.append(("untrained network", f"{untrained:.6f}"))
    rows += [(path, _short(value)) for path, value in best.params.items()]
    return "<h2>Best trial</h2>" + _pairs(rows)


def _figure_sections(ledger: Ledger, trials: list[TrialRecord]) -> Iterable[str]:
    from optuna import visualization

    from tuner.pareto import pareto_plot

    sections: list[tuple[str, Callable[[], Any]]] = [
        ("Objective by trial", lambda: _history(trials)),
        ("Learning curves", lambda: _curves(trials)),
    ]
    n_done = sum(t.state == "done" for t in trials)
    names = _varied(trials)
    if study_cost := ledger.config.search.cost:
        sections.append((f"Pareto front: objective and {study_cost}", lambda: pareto_plot(ledger)))
    if n_done >= _FEWEST and names:
        study = ledger.finished_study()
        sections += [
            (
                "Importance of the parameters",
                lambda: visualization.plot_param_importances(study, params=names),
            ),
            (
                "Parallel coordinates",
                lambda: visualization.plot_parallel_coordinate(study, params=names),
            ),
            ("Slices", lambda: visualization.plot_slice(study, params=names)),
        ]
    for title, draw in sections:
        yield f"<h2>{title}</h2>"
        yield _drawn(title, draw)
    if n_done < _FEWEST:
        yield (
            f"<p class='quiet'>Importances and slices are drawn from {_FEWEST} finished trials "
            f"on; there are {n_done}.</p>"
        )


def _drawn(title: str, draw: Callable[[], Any]) -> str:
    # A plot that its library cannot draw from these trials is said, not fatal.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            figure = draw()
    except (ValueError, RuntimeError, ImportError, ArithmeticError) as error:
        logger.warning("%s: cannot be drawn: %s", title, error)
        return f"<p class='quiet'>Cannot be drawn: {html.escape(str(error))}</p>"
    if figure is None:
        return "<p class='quiet'>Nothing to show yet.</p>"
    figure.update_layout(title=None, template="plotly_white", margin={"t": 30})
    if figure.layout.height is None:
        figure.update_layout(height=_HEIGHT)
    return str(figure.to_html(full_html=False, include_plotlyjs=False))


def _history(trials: list[TrialRecord]) -> go.Figure | None:
    import plotly.graph_objects as go

    scored = [t for t in trials if t.objective is not None]
    if not scored:
        return None
    figure = go.Figure()
    for state, colour in _COLOURS.items():
        chosen = [t for t in scored if t.state == state]
        if chosen:
            figure.add_scatter(
                x=[t.number for t in chosen],
                y=[t.objective for t in chosen],
                mode="markers",
                name=state,
                marker={"color": colour, "size": 9},
            )
    lowest, xs, ys = float("inf"), [], []
    for trial in scored:
        if trial.state == "done" and trial.objective is not None:
            lowest = min(lowest, trial.objective)
            xs.append(trial.number)
            ys.append(lowest)
    if xs:
        line = {"color": "#444", "shape": "hv"}
        figure.add_scatter(x=xs, y=ys, mode="lines", name="best so far", line=line)
    return figure.update_layout(xaxis_title="trial", yaxis_title="objective")


def _curves(trials: list[TrialRecord]) -> go.Figure | None:
    import plotly.graph_objects as go

    figure = go.Figure()
    named: set[str] = set()
    for trial in trials:
        if not trial.curve:
            continue
        epochs, values = zip(*trial.curve, strict=True)
        figure.add_scatter(
            x=epochs,
            y=values,
            mode="lines+markers",
            name=trial.state,
            legendgroup=trial.state,
            showlegend=trial.state not in named,
            line={"color": _COLOURS[trial.state], "width": 1.5},
            marker={"size": 4},
            hovertemplate=f"trial {trial.number:04d}<br>epoch %{{x}}: %{{y:.5f}}<extra></extra>",
        )
        named.add(trial.state)
    if not named:
        return None
    return figure.update_layout(xaxis_title="epoch", yaxis_title="objective")


def _trial_table(ledger: Ledger, trials: list[TrialRecord], best: TrialRecord | None) -> str:
    paths = list(ledger.config.search.space)
    heads = ["trial", "state", "objective", "F1", "GOSPA [m]", "epochs", "seconds"]
    heads += ["skipped", "fallbacks"]
    lines = ["<div class='scroll'><table><tr>"]
    lines += [f"<th>{html.escape(name)}</th>" for name in [*heads, *paths, "reason"]]
    lines.append("</tr>")
    for trial in trials:
        marked = " class='best'" if best is not None and trial.number == best.number else ""
        metrics = trial.metrics
        cells = [
            f"{trial.number:04d}",
            f"<span style='color:{_COLOURS[trial.state]}'>{trial.state}</span>",
            "" if trial.objective is None else f"{trial.objective:.5f}",
            _metric(metrics.get("f1")),
            _metric(metrics.get("gospa")),
            str(trial.epoch),
            "" if trial.seconds is None else f"{trial.seconds:.0f}",
            str(metrics.get("skipped_steps", "")),
            "" if trial.fallbacks is None else f"{trial.fallbacks:.0f}",
            *(html.escape(_short(trial.params.get(path, ""))) for path in paths),
        ]
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        said = "; ".join(text for text in (trial.reason, trial.note) if text)
        reason = f"<td class='text'>{html.escape(said)}</td>"
        lines.append(f"<tr{marked}>{row}{reason}</tr>")
    lines.append("</table></div>")
    return "\n".join(lines)


def _metric(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) and math.isfinite(value) else ""


def _varied(trials: list[TrialRecord]) -> list[str]:
    """Parameters that took more than one value in the finished trials."""
    done = [t.params for t in trials if t.state == "done"]
    paths = list(done[0]) if done else []
    return [p for p in paths if len({repr(params.get(p)) for params in done}) > 1]


def _pairs(rows: Iterable[tuple[str, str]]) -> str:
    cells = (
        f"<tr><th>{html.escape(name)}</th><td class='text'>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table>{''.join(cells)}</table>"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(execute(app))
