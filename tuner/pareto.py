"""Two objectives: the finished trials that no other beats in accuracy and in cost at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner.study import Ledger, TrialRecord

if TYPE_CHECKING:
    import plotly.graph_objects as go


def pareto_front(ledger: Ledger) -> list[TrialRecord]:
    """Trials that rank and that none dominates, the cheapest first.

    One trial dominates another that is at most as good in both objectives and worse in one; of
    equal ones all are on the front.

    Raises:
        ValueError: the study has one objective.
    """
    cost = ledger.config.search.cost
    if cost is None:
        raise ValueError("search.cost: the study has one objective, and so no front")
    front = {trial.number for trial in ledger.optuna_study.best_trials}
    trials = [trial for trial in ledger.ranking() if trial.number in front]
    return sorted(trials, key=lambda trial: (trial.metrics[cost], trial.objective, trial.number))


def pareto_plot(ledger: Ledger) -> go.Figure | None:
    """The front among all finished trials; None before the first has finished."""
    from optuna import visualization

    if not ledger.ranking():
        return None
    return visualization.plot_pareto_front(
        ledger.optuna_study,
        target_names=["objective", f"{ledger.config.search.cost} a scene"],
    )
