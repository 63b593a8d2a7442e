"""Warm start: reads the finished trials of an earlier study that apply to a new one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tuner.config import StudyConfig, held_value, load_study
from tuner.errors import StudyError
from tuner.folder import RunFolder
from tuner.ledger import older_scores, read_ledger
from tuner.records import PriorTrial, TrialRecord
from tuner.space import Value


@dataclass(frozen=True)
class Prior:
    """Finished trials of an earlier study, and one line on which were used and which were not."""

    trials: tuple[PriorTrial, ...]
    note: str


def read_prior(path: Path, study: StudyConfig) -> Prior:
    """Read the finished trials of the run folder `path` that lie in the study's search space.

    A parameter that the earlier study did not search takes the value of its configuration.

    Raises:
        StudyError: no run folder, a different objective, or no usable trial.
    """
    earlier, trials = _read(path)
    if earlier.objective != study.objective:
        raise StudyError(
            f"search.warm_start: {path} minimised {earlier.objective!r} and this study minimises "
            f"{study.objective!r}; only a study of the same objective can be learnt from"
        )
    taken: list[PriorTrial] = []
    left: Counter[str] = Counter()
    for trial in trials:
        if trial.state != "done" or trial.budget != earlier.training.epochs:
            left[trial.state if trial.state != "done" else "of another budget"] += 1
            continue
        if trial.heir is not None:  # its objective is not that of its parameters alone
            left["with another's weights"] += 1
            continue
        params, outside = _translated(trial, earlier, study)
        if outside is not None:
            left[outside] += 1
        elif trial.objective is not None:
            taken.append(PriorTrial(f"{path}#{trial.number}", params, trial.objective))
    left_out = ", ".join(f"{count} {why}" for why, count in left.items()) or "nothing"
    if not taken:
        raise StudyError(
            f"search.warm_start: {path} has no finished trial in this study's search space; "
            f"left out: {left_out}"
        )
    note = f"warm start: finished trials told to the sampler: {len(taken)} of {path}"
    note += f"; left out: {left_out}"
    differing = _differences(earlier, study)
    if differing:
        note += f"; that study differs in: {', '.join(differing)}"
    return Prior(tuple(taken), note)


def _read(path: Path) -> tuple[StudyConfig, list[TrialRecord]]:
    try:
        folder = RunFolder.existing(path, lock=False)
        earlier = load_study(folder.config)
        ledger = read_ledger(folder, earlier)
    except StudyError as error:
        raise StudyError(f"search.warm_start: {error}") from error
    if older_scores(earlier, ledger.optuna_study.user_attrs):
        ledger.close()
        raise StudyError(
            f"search.warm_start: {path} was scored by an earlier version, in which "
            f"{earlier.objective} was another measure"
        )
    try:
        return earlier, ledger.trials()
    finally:
        ledger.close()


def _translated(
    trial: TrialRecord, earlier: StudyConfig, study: StudyConfig
) -> tuple[dict[str, Value], str | None]:
    """Return the trial's point in the study's space, and the reason if there is none."""
    config = earlier.trial_config(trial.params, trial.seed)
    params: dict[str, Value] = {}
    for path, parameter in study.search.space.items():
        try:
            value = held_value(config, path)
        except AttributeError:
            return {}, f"without {path}"
        if not parameter.contains(value):
            return {}, f"whose {path} lies outside"
        params[path] = value
    return params, None


def _differences(earlier: StudyConfig, study: StudyConfig) -> list[str]:
    """Return other differences that affect the earlier study's objectives."""
    found = [name for name in ("array", "scene") if getattr(earlier, name) != getattr(study, name)]
    without_cache = {"cache": None, "keep_images": True}
    if earlier.data.model_copy(update=without_cache) != study.data.model_copy(update=without_cache):
        found.append("data")
    if earlier.training.epochs != study.training.epochs:
        found.append(f"{earlier.training.epochs} epochs (here {study.training.epochs})")
    gone = [path for path in earlier.search.space if path not in study.search.space]
    return found + [f"{path} (searched there alone)" for path in gone]
