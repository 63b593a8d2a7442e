"""Opens the ledger of a run folder, wherever it is stored, for the driver or for reading."""

from __future__ import annotations

import json
import platform
import re
import shlex
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from model.files import write_text
from model.wording import counted
from tuner.claim import claim_of
from tuner.config import StudyConfig
from tuner.errors import StudyError
from tuner.folder import RunFolder
from tuner.members import PopulationLedger
from tuner.pausing import PausingLedger
from tuner.records import PriorTrial
from tuner.storage import PatientStorage, has_tables, open_storage, parse_url, shown, sqlite_url
from tuner.study import Ledger

# Fields that may change between sessions: the extent of a study, and where trials run and files are
# stored. All other fields affect the trials' scores.
_FREE = (
    "data.cache",
    "data.keep_images",
    "resources.",
    "search.full_epochs",  # of a promotion, which checks it itself
    "search.promote",  # and promote_seeds
    "search.storage",
    "search.target",
    "search.time_budget",
    "search.trials",
    "search.warm_start",  # read before the first trial
    "training.threads",
)
_SHOWN = 3  # differences named in a message
# Incremented when the definition of an objective changes; 2: nll of positions, NMSE of occupied
# scenes; 3: nll of a density.
_SCORES, _SCORES_VERSION = "scores", 3
_DATA = "data"  # digests of recorded scenes, by split


def ledger_note(study: StudyConfig, *, reading: bool = False) -> list[str]:
    """Return one line on the database that a study names, after opening it; empty if it names none.

    Args:
        study: the configuration.
        reading: whether the database must not be changed.

    Raises:
        StudyError: the database cannot be opened.
    """
    if study.search.storage is None:
        return []
    url = parse_url(study.search.storage)
    if not reading:
        open_storage(url).remove_session()
    elif not has_tables(url):
        return [f"ledger: {shown(url)}, where its tables would be made"]
    return [f"ledger: {shown(url)}"]


def open_ledger(
    folder: RunFolder, study: StudyConfig, prior: Callable[[], Sequence[PriorTrial]] = tuple
) -> Ledger:
    """Open the driver's ledger, created if missing, and lock out other drivers.

    Args:
        folder: the run folder, locked.
        study: its configuration.
        prior: returns the trials that the sampler knows in advance; called until the first trial
            has started.

    Raises:
        StudyError: it cannot be opened, is not where it was, or another driver uses it.
    """
    ledger = _shared(folder, study, prior) or _own(folder, study, prior)
    try:
        refuse_older(folder, study, _begun(folder, study, ledger))
    except StudyError:
        ledger.close()
        raise
    held = ledger.optuna_study.user_attrs
    attrs = {
        "config": study.model_dump(mode="json"),
        "folder": f"{platform.node()}:{folder.path}",
        _SCORES: _SCORES_VERSION,
    }
    for key, value in attrs.items():
        if held.get(key) != value:
            ledger.optuna_study.set_user_attr(key, value)
    return ledger


def keep_mode(ledger: Ledger, *, local: bool) -> None:
    """Record in the ledger how its study is run, for messages on how to resume it."""
    ledger.optuna_study.set_user_attr("local", local)


def mode_of(ledger: Ledger) -> str:
    """Return the option with which a resume runs the study in the same mode: " --local" or ""."""
    return " --local" if ledger.optuna_study.user_attrs.get("local") else ""


def read_ledger(folder: RunFolder, study: StudyConfig) -> Ledger:
    """Open the ledger of a started study for reading; another process may write it meanwhile.

    Raises:
        StudyError: the study has not started, or its ledger cannot be opened.
    """
    if study.search.storage is None:
        _refuse_elsewhere(folder)
        if not folder.database.exists():
            raise StudyError(f"{folder.path}: no study.db there; the study has not begun")
        with suppress(KeyError):
            if has_tables(sqlite_url(folder.database)):
                return _begun(folder, study, _kind(study)(folder.database, study, reading=True))
        raise StudyError(
            f"{folder.database}: the ledger holds no study {study.name}; it has not begun"
        )
    name = _kept_name(folder)
    if name is None:
        raise StudyError(f"{folder.path}: no study.name there; the study has not begun")
    storage = _holding(study.search.storage, name)
    ledger = _kind(study)(storage, study, name=name, home=folder.path, reading=True)
    return _begun(folder, study, ledger)


def _begun(folder: RunFolder, study: StudyConfig, ledger: Ledger) -> Ledger:
    """Return the ledger if its trials started with this configuration; else close it and raise."""
    try:
        _refuse_other(folder, study, ledger)
    except StudyError:
        ledger.close()
        raise
    return ledger


def _kind(study: StudyConfig) -> type[Ledger]:
    """Return the ledger class of a study's scheduler."""
    kinds: dict[str, type[Ledger]] = {"asha-pausing": PausingLedger, "pbt": PopulationLedger}
    return kinds.get(study.search.scheduler, Ledger)


def _refuse_other(folder: RunFolder, study: StudyConfig, ledger: Ledger) -> None:
    """Refuse to continue a study whose configuration differs from that of its started trials.

    Args:
        folder: the run folder, for messages.
        study: its configuration now, from ``config.yaml`` and the command line.
        ledger: the ledger, which stores the configuration that its trials started with.

    Raises:
        StudyError: a field that affects scores differs, or ``search.trials`` is below the number of
            started trials.
    """
    n_begun = len(ledger.trials())
    if not n_begun:
        return
    if n_begun > study.search.trials:
        raise StudyError(
            f"search.trials (--trials): got {study.search.trials}, and {n_begun} trials of "
            f"{folder.path} have begun; a study can be extended, not cut: leave --trials out, or "
            f"name {n_begun} or more"
        )
    try:
        was = StudyConfig.model_validate(ledger.optuna_study.user_attrs.get("config"))
    except ValidationError:  # written by another version, whose fields are not comparable
        return
    before, now = (_flat(config.model_dump(mode="json")) for config in (was, study))
    differing = [
        f"{path} was {json.dumps(before.get(path))} and is {json.dumps(now.get(path))}"
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path)
        and not (path.startswith(_FREE) or (path == "data.shards" and before[path] and now[path]))
    ]
    if not differing:
        return
    more = f"; {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    raise StudyError(
        f"{folder.config} is not what {counted(n_begun, 'trial')} of this study began with: "
        f"{'; '.join(differing[:_SHOWN])}{more}. Results of two settings cannot be ranked with "
        "each other. Put it back; a study with the other setting can then learn from this one "
        f"(--warm-start {shlex.quote(str(folder.path))})"
    )


def refuse_older(folder: RunFolder, study: StudyConfig, ledger: Ledger) -> None:
    """Refuse to continue a study whose trials were scored by a different measure.

    Raises:
        StudyError: an earlier version, with another definition of the objective, scored them.
    """
    n_begun = len(ledger.trials())
    if n_begun and older_scores(study, ledger.optuna_study.user_attrs):
        raise StudyError(
            f"{folder.path}: an earlier version has scored {counted(n_begun, 'trial')} of this "
            f"study, in which {study.objective} was another measure; they cannot be ranked with "
            "new ones: begin another study"
        )


def refuse_other_data(
    folder: RunFolder, ledger: Ledger, digests: Mapping[str, str], *, reading: bool
) -> None:
    """Refuse to continue with recorded scenes other than those of the started trials.

    Args:
        folder: the run folder, for messages.
        ledger: the ledger, which stores the digests of those scenes; written if missing.
        digests: digests of the current scenes, by split.
        reading: whether the ledger must not be changed.

    Raises:
        StudyError: training or validation scenes differ, regardless of their path.
    """
    decisive = {name: digest for name, digest in digests.items() if name != "test"}
    held = ledger.optuna_study.user_attrs.get(_DATA)
    n_begun = len(ledger.trials())
    if held and n_begun and held != decisive:
        other = " and ".join(name for name in decisive if held.get(name) != decisive[name])
        raise StudyError(
            f"{folder.path}: {counted(n_begun, 'trial')} of this study began with other scenes "
            f"in {other}; what two sets of scenes score cannot be ranked with each other: name the "
            "folder that holds the first ones (--data), or begin another study that learns from "
            f"this one (--warm-start {shlex.quote(str(folder.path))})"
        )
    if not reading and held != decisive:
        ledger.optuna_study.set_user_attr(_DATA, decisive)


def older_scores(study: StudyConfig, held: Mapping[str, Any]) -> bool:
    """Return whether a study's trials were scored by an outdated definition of its objective.

    Args:
        study: its configuration.
        held: the user attributes of its ledger.
    """
    changed = 1  # the version that last changed the objective
    if study.objective == "nll":
        changed = 3
    elif study.objective == "nmse" and study.scene.min_sources == 0:
        changed = 2
    return bool(held.get(_SCORES, 1) < changed)


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return values by dotted path."""
    found: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _own(
    folder: RunFolder, study: StudyConfig, prior: Callable[[], Sequence[PriorTrial]]
) -> Ledger:
    """Open the ledger in the run folder, which holds one study and its promotion."""
    storage = open_storage(sqlite_url(folder.database))
    names = [held.study_name for held in storage.get_all_studies()]
    if names and study.name not in names:
        storage.remove_session()
        raise StudyError(
            f"{folder.config}: name is {study.name!r}, and the study in {folder.database} is "
            f"{min(names, key=len)!r}; put that name back"
        )
    return _kind(study)(storage, study, prior, home=folder.path)


def _shared(
    folder: RunFolder, study: StudyConfig, prior: Callable[[], Sequence[PriorTrial]]
) -> Ledger | None:
    """Open the ledger in the database that the study names; None if it names none."""
    if study.search.storage is None:
        _refuse_elsewhere(folder)
        return None
    if folder.database.exists():
        raise StudyError(
            f"search.storage: {folder.path} has its ledger in study.db, which stays there; "
            "leave --storage out"
        )
    kept = _kept_name(folder)
    name = kept or f"{re.sub(r'[^A-Za-z0-9._-]+', '-', folder.path.name)}-{uuid.uuid4().hex[:12]}"
    url = parse_url(study.search.storage)
    storage = _holding(study.search.storage, kept) if kept else open_storage(url)
    try:
        way_on = f"go on with: python -m tuner.run --resume {shlex.quote(str(folder.path))}"
        storage.hold(claim_of(url, name), way_on)
        ledger = _kind(study)(storage, study, prior, name, home=folder.path)
        _refuse_copy(folder, name, ledger)
        storage.sign(ledger.optuna_study._study_id)
        if kept is None:  # last: a name in the folder implies a study in the database
            write_text(folder.study_name, name + "\n")
    except BaseException:
        storage.remove_session()
        raise
    return ledger


def _refuse_copy(folder: RunFolder, name: str, ledger: Ledger) -> None:
    """Refuse to run a study in a database from a copy of its run folder: both share it."""
    host, _, place = str(ledger.optuna_study.user_attrs.get("folder", "")).partition(":")
    other = RunFolder(Path(place)) if place and host == platform.node() else folder
    if other.path != folder.path and other.study_name.exists() and _kept_name(other) == name:
        raise StudyError(
            f"search.storage: {folder.path} is a copy of {other.path}, and both would drive the "
            f"one study {name} in the database; go on in {other.path}, or begin another study "
            f"that learns from it (--warm-start {shlex.quote(str(other.path))})"
        )


def _holding(url: str, name: str) -> PatientStorage:
    """Open the database, which must hold a study of that name."""
    where = parse_url(url)
    if has_tables(where):
        storage = open_storage(where)
        try:
            storage.get_study_id_from_name(name)
            return storage
        except KeyError:
            storage.remove_session()
    raise StudyError(
        f"search.storage: the database at {shown(where)} holds no study {name}; name the one in "
        "which the study was begun"
    )


def _kept_name(folder: RunFolder) -> str | None:
    try:
        name = folder.study_name.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{folder.study_name}: cannot be read: {error}") from error
    if not name:
        raise StudyError(f"{folder.study_name}: is empty; the study's name is expected there")
    return name


def _refuse_elsewhere(folder: RunFolder) -> None:
    if folder.study_name.exists():
        raise StudyError(
            f"search.storage: the ledger of {folder.path} lies in a database, which must be named "
            "(--storage)"
        )
