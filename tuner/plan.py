"""The dry run: shows what a study would do without starting it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from model.data import images_bytes
from model.wording import counted
from tuner.appraisal import Appraisal, appraise, checkpoint_bytes, epochs_expected
from tuner.config import StudyConfig, held_value, plain_of
from tuner.duration import format_duration
from tuner.folder import RunFolder
from tuner.forecast import about, seconds_left
from tuner.place import Place
from tuner.rungs import most_waiting
from tuner.space import n_points
from tuner.study import Ledger

_WIDTH = 200  # table width for a file or pipe


def show_plan(
    study: StudyConfig,
    notes: list[str],
    out: Path | None,
    place: Place | None,
    ledger: Ledger | None,
) -> None:
    """Print configuration, space, resources, and estimates of time and disk use.

    Args:
        study: the resolved study.
        notes: notes on its origin, its data and its resources.
        out: the run folder, or the requested one.
        place: where trials would run; None if no trial is left to run.
        ledger: ledger of a study that would be resumed, or of its promotion if the search has
            ended.
    """
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _WIDTH

    def say(*lines: str) -> None:
        for line in lines:
            console.print(line, markup=False)

    say(*notes)
    say("", "changed from the defaults:")
    say(*(f"  {line}" for line in differences(study)))
    say("", "configuration, resolved:")
    say(*(f"  {line}" for line in study.to_yaml().splitlines()))
    say("")
    console.print(_space_table(study))
    folder = (out or RunFolder.default_path(study.name)).expanduser().resolve()
    if place is not None:
        found = appraise(study, place.device) if place.is_here else "trials run on other machines"
        say(f"time: {_time(ledger.config if ledger else study, place, ledger, found)}")
        for line in _disk(study, place, found, folder):
            say(f"disk: {line}")
    say(
        "nothing was started, and nothing written (--dry-run)"
        + ("" if ledger else f"; the run folder would be {folder}")
    )


def differences(study: StudyConfig) -> Iterator[str]:
    """Yield fields that differ from their defaults as `section.field: value (default)`."""
    yield from _differing("", study, type(study)())


def _differing(prefix: str, held: BaseModel, usual: BaseModel) -> Iterator[str]:
    if type(held) is not type(usual):  # a different network family
        usual = plain_of(held)
        yield f"{prefix}family: {getattr(held, 'family', type(held).__name__)}"
    for name in type(held).model_fields:
        path, value, default = prefix + name, getattr(held, name), getattr(usual, name)
        if path in ("search.space", "network.family"):
            continue
        if isinstance(value, BaseModel) and isinstance(default, BaseModel):
            yield from _differing(f"{path}.", value, default)
        elif value != default:
            yield f"{path}: {_plain(value)} (default {_plain(default)})"


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return f"[{', '.join(_plain(one) for one in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{k}: {_plain(v)}' for k, v in value.items())}}}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _space_table(study: StudyConfig) -> Table:
    space = study.search.space
    points = n_points(space)
    many = "endlessly many points" if math.isinf(points) else counted(int(points), "point")
    table = Table(
        title=f"search space: {counted(len(space), 'parameter')}, {many}",
        title_justify="left",
        box=None,
    )
    for head in ("parameter", "type", "values", "configured"):
        table.add_column(head, no_wrap=True)
    for path, parameter in space.items():
        if parameter.type == "categorical":
            values = ", ".join(_plain(choice) for choice in parameter.choices)
        else:
            values = f"{parameter.low:g} to {parameter.high:g}"
            values += ", logarithmic" if parameter.log else ""
            values += f", steps of {parameter.step:g}" if parameter.step is not None else ""
        table.add_row(path, parameter.type, values, _plain(held_value(study, path)))
    return table


def _time(study: StudyConfig, place: Place, ledger: Ledger | None, found: Appraisal | str) -> str:
    if ledger is not None:
        left = seconds_left(ledger)
        if left is not None:
            return f"{about(left)} left, as the trials so far took"
    if isinstance(found, str):
        return f"not known: {found}"
    search, budget = study.search, study.search.time_budget
    planned = search.planned_trials(study.training.epochs)
    trials = planned if ledger is None else ledger.n_new
    side_by_side = search.population if search.scheduler == "pbt" else trials
    lanes = max(1, min(place.concurrent, side_by_side))
    bounds = epochs_expected(search, study.training.epochs)
    waited = found.search_seconds / lanes
    least, most = (waited + trials * n * found.epoch_seconds / lanes for n in bounds)
    span = about(most)
    if bounds[0] < bounds[1]:
        span = (
            f"{about(least)} if all are stopped that {search.who_stops} may stop, {span} if none is"
        )
    if budget is not None and budget < most:
        span += f"; ended by the time budget after {format_duration(budget)}"
    parts = f"an epoch {about(found.epoch_seconds).removeprefix('about ')}"
    if waited:
        parts += f", finding all candidates {format_duration(max(1.0, round(waited)))}"
        parts += " unless they are kept from an earlier study"
    return f"{span} ({parts}; timed on two short epochs of the configured values on {place.device})"


def _disk(study: StudyConfig, place: Place, found: Appraisal | str, folder: Path) -> Iterator[str]:
    base, largest = checkpoint_bytes(study)
    # Two checkpoints per running trial, as the new one is written before the old one is deleted,
    # and that of the winner. At rungs those trials wait that may still be among the best of the
    # first rung, and in an unfavourable order a few more. In a population all members keep
    # checkpoints: that of the last milestone may be needed by a successor, and the one before a
    # milestone stays until a member is replaced.
    population = study.search.population if study.search.scheduler == "pbt" else 0
    pausing = study.search.scheduler == "asha-pausing"
    waiting = most_waiting(study.search) if pausing else 0
    kept = max(2 * place.concurrent, 4 * population, waiting + place.concurrent) + 1
    size = f"{_bytes(base)} each, {_bytes(largest)} of the largest network"
    bound = "about" if pausing else "at most"
    yield f"{bound} {_bytes(kept * largest)} of checkpoints at a time ({size})"
    if not isinstance(found, str) and found.cache_bytes:
        yield f"{_bytes(found.cache_bytes)} of candidates, kept for all studies of these scenes"
    if place.device == "cpu" and (images := images_bytes(study.trial_config({}, study.seed))):
        yield f"{_bytes(images)} of images, kept for all studies of these scenes"
    storage = study.resources.storage
    if storage is not None and "://" in storage:
        return  # free space is unknown there
    checkpoints = Path(storage) if storage is not None else folder
    above = next(path for path in (checkpoints, *checkpoints.parents) if path.exists())
    yield f"{_bytes(shutil.disk_usage(above).free)} free at {above}"


def _bytes(count: float) -> str:
    """Format a size in the largest unit that gives a number above one."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"
