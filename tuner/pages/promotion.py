"""The section on the best configurations, trained again with several seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from model.wording import counted
from tuner.pages.markup import Markup, note, short, table

if TYPE_CHECKING:
    from tuner.pages.material import Material


def promoted(material: Material) -> Markup:
    """Return mean and spread of each configuration, and its objective in the search."""
    promotion = material.promotion
    found = promotion.configurations() if promotion is not None else []
    if promotion is None or not found:
        return note("Nothing has been promoted yet: the search goes on, or no trial has finished.")
    seeds = sorted({one.seeds for one in found})
    some = f"{seeds[0]} to " if len(seeds) > 1 else ""
    text = (
        "The search's best, trained again over "
        f"{counted(promotion.config.training.epochs, 'epoch')} with "
        f"{some}{counted(seeds[-1], 'seed')} each that the search never used; mean and standard "
        "deviation of the objective on the validation scenes. A configuration with a seed that "
        "failed ranks below all without. The search's own objective is of one seed and of the best "
        "of many trials, and so too good."
    )
    if promotion.has_work:
        text += " Not all runs have ended yet: the order may change."
    winner = material.promoted
    numbers = [one.trial.number for one in found]
    heads = ["trial", "mean", "std", "seeds", "failed", "best seed", "in the search", "reason"]
    rows = [
        (
            one.trial.number,
            short(one.mean, 5),
            short(one.std, 3),
            f"{len(one.finished)} of {one.seeds}",
            len(one.failed),
            short(one.best.objective if one.best else None, 5),
            short(one.trial.objective, 5),
            "; ".join(sorted({run.reason or "" for run in one.failed})),
        )
        for one in found
    ]
    marked = None if winner is None else numbers.index(winner.trial.number)
    return Markup(note(text) + table(heads, rows, marked=marked))
