"""One session of a study, from the request to the results, with Ray or in this process."""

from __future__ import annotations

import logging
import os
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch

from model.datacheck import check_data
from model.files import write_text
from model.network import check_plugins
from model.plausible import array_notes
from model.plugin import plugins_of
from model.wording import counted
from tuner.command import DONE, INTERRUPTED, Interruption
from tuner.conclusion import conclude
from tuner.config import StudyConfig, flag_of, load_study
from tuner.device import check_precision
from tuner.disk import full_disk_said
from tuner.errors import ConfigError, StudyError
from tuner.folder import RunFolder
from tuner.ledger import (
    keep_mode,
    ledger_note,
    mode_of,
    open_ledger,
    read_ledger,
    refuse_older,
    refuse_other_data,
)
from tuner.limits import Limits, why_ended
from tuner.local import run_local
from tuner.place import Place, check_place, choose_place
from tuner.plan import show_plan
from tuner.population import population_note
from tuner.promotion import Promotion, open_promotion
from tuner.records import PriorTrial
from tuner.results import drop_losers, winners, write_best, write_promoted, write_trials
from tuner.samplers import sampler_note
from tuner.study import Ledger
from tuner.telemetry import Progress, Verbosity, logging_to
from tuner.tensorboard import TensorBoardLog
from tuner.waiting import waiting
from tuner.warmstart import read_prior
from tuner.watchers import Watcher, Watchers

if TYPE_CHECKING:
    from tuner.cluster import Cluster

logger = logging.getLogger(__name__)

_LAST_WORDS = 5.0  # seconds for a last message before the process exits
_BETWEEN_WRITES = 9  # pause in units of a write's duration: the driver has other work

_CONFIGS = Path(__file__).resolve().parent / "studies"  # of an installed package
if not _CONFIGS.is_dir():  # a clone
    _CONFIGS = _CONFIGS.parent.parent / "configs"
_WITHOUT_GPU, _WITH_GPU = _CONFIGS / "quickstart.yaml", _CONFIGS / "full.yaml"
# Options that may change on resume; all others affect the trials' results.
_RESUMABLE = {
    "search__trials",
    "search__time_budget",
    "search__target",
    "search__storage",
    "search__promote",
    "resources__concurrent",
    "resources__gpus_per_trial",
    "data__shards",  # they may have been moved
}


@dataclass(frozen=True)
class Request:
    """The user's request."""

    config: Path | None = None
    overrides: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    out: Path | None = None
    local: bool = False
    resume: Path | None = None
    address: str | None = None
    verbosity: Verbosity = "normal"
    dry_run: bool = False


def run_session(request: Request) -> int:
    """Run a study to its end, or until a limit or an interruption ends the session.

    Returns:
        The exit code: 0 done, 1 no trial finished, 130 interrupted.

    Raises:
        StudyError, DataError: invalid request or data, with a one-line message; nothing was
            started.
    """
    if request.local and request.address:
        raise StudyError("--local: uses no Ray, so that --address has no meaning beside it")
    if request.resume is None:
        _refuse_early(request)
    with ExitStack() as stack:
        interruption = stack.enter_context(Interruption().watched())
        connection = stack.enter_context(ExitStack())  # to Ray, which the results do not need
        cluster: Cluster | None = None
        folder: RunFolder | None = None
        ledger: Ledger | None = None
        notes: list[str] = []
        if request.resume is not None:
            folder, study = _reopen(stack, request, request.resume, notes)
        else:
            if request.config is None and not request.local:
                cluster = _connect(connection, request)
            study = _load(request, cluster, notes)
        told = sampler_note(study.search), population_note(study)
        notes += [note for note in told if note]
        prior = _prior(study, notes, fresh=folder is None)
        _check_precision(study, request.local)
        check_plugins(study)
        notes += array_notes(study.array.build(), study.scene)
        with waiting("checking the data", quiet=request.verbosity == "quiet"):
            data = check_data(study)
        notes += [f"data: {said}" for said in (data.said, *data.notes)]
        begun = folder is not None and folder.has_ledger
        notes += ledger_note(study, reading=request.dry_run or begun)
        promotion: Promotion | None = None
        if folder is not None and (begun or not request.dry_run):
            ledger, promotion = _ledgers(
                stack, folder, study, prior, data.digests, reading=request.dry_run
            )
        place: Place | None = None
        ended = why_ended(ledger, Limits(ledger)) if ledger is not None else None
        if ended is None or (promotion is not None and promotion.has_work):
            if study.network.front_end is not None:
                notes.append("the candidates of all scenes are found first, once for all trials")
            if cluster is None and not request.local:
                cluster = _connect(connection, request, plugins_of(study))
            interruption.take()
            place = choose_place(study, cluster, notes)
        else:
            remedy = f" ({ended.remedy} goes on)" if ended.remedy else ""
            notes.append(f"nothing is left to run: {ended.reason}{remedy}")
        if request.dry_run:
            left = promotion if ended is not None and promotion is not None else ledger
            out = request.out if folder is None else folder.path
            show_plan(study, notes, out, place, left)
            return DONE
        if folder is None:
            folder = RunFolder.fresh(request.out or RunFolder.default_path(study.name))
            stack.callback(folder.release)
        stack.enter_context(full_disk_said(folder.path, " --local" if request.local else ""))
        if place is not None:
            check_place(study, folder, place)
        stack.enter_context(logging_to(folder.log))
        if cluster is not None:
            from tuner.cluster import quiet_ray

            quiet_ray()
        write_text(folder.config, study.to_yaml())
        if ledger is None:
            ledger, promotion = _ledgers(stack, folder, study, prior, data.digests)
        limits = Limits(ledger)
        progress = Progress(
            study, ledger.trials(), clock=lambda: limits.seconds, verbosity=request.verbosity
        )
        ledger.announce(progress.say)
        watchers = Watchers(progress, TensorBoardLog(ledger, folder.tensorboard))
        for note in [f"run folder: {folder.path}", *notes]:
            progress.note(note)
        if place is not None:
            keep_mode(ledger, local=request.local)
        resume = f"python -m tuner.run --resume {shlex.quote(str(folder.path))}{mode_of(ledger)}"
        on = f"go on with: {resume}"

        def leave(why: str) -> None:
            """Exit immediately: calls to Ray would not return, and the ledger is consistent."""
            ending = threading.Timer(_LAST_WORDS, os._exit, [INTERRUPTED])
            ending.daemon = True
            ending.start()  # the reader of a pipe may be gone or stopped
            try:
                progress.last_words(f"{why}; {on}")
            finally:
                os._exit(INTERRUPTED)

        try:
            with ExitStack() as asking:
                if place is not None and cluster is not None:
                    from tuner.head import Head, watched_head

                    watch = watched_head(Head().answers, lambda: interruption.wished, leave)
                    asking.enter_context(watch)
                if ended is None and place is not None:
                    with progress.shown():
                        _run_trials(place, ledger, folder, watchers, limits, interruption)
                if promotion is not None and place is not None and not interruption.wished:
                    _promote(place.cluster, promotion, folder, progress, interruption)
        except KeyboardInterrupt:
            interruption.wished = True
        except Exception:
            logger.exception("the run was cut short")
            progress.say(f"cut short by an error; {on}")
            raise
        interruption.settle()
        early = limits.reached() if place is not None and ledger.has_work else None
        wished = interruption.wished
        try:
            connection.close()
            return conclude(folder, ledger, promotion, progress, early, resume, interrupted=wished)
        except KeyboardInterrupt:
            progress.say(f"interrupted while the results were written; {on}")
            return INTERRUPTED


def _refuse_early(request: Request) -> None:
    """Reject invalid requests that do not depend on the cluster before connecting to one."""
    if request.out is not None:
        RunFolder(request.out).refuse_study()
    if request.config is None:  # the cluster determines which of them is used
        refusals: list[ConfigError] = []
        for path in (_WITHOUT_GPU, _WITH_GPU):
            try:
                load_study(path, request.overrides, **request.options)
            except ConfigError as error:
                refusals.append(error)
        if len(refusals) == 2:
            raise refusals[0]


def _connect(stack: ExitStack, request: Request, plugins: Sequence[str] = ()) -> Cluster:
    return stack.enter_context(_connected(request, plugins))


@contextmanager
def _connected(request: Request, plugins: Sequence[str]) -> Iterator[Cluster]:
    """Connect to the cluster and disconnect from it, with a message during each wait."""
    quiet = request.verbosity == "quiet"
    with ExitStack() as inner:
        with waiting("connecting to Ray", quiet=quiet):
            from tuner.cluster import connected

            cluster = inner.enter_context(
                connected(request.address, start=not request.dry_run, plugins=plugins)
            )
        yield cluster
        with waiting("leaving Ray", quiet=quiet):
            inner.close()


def _prior(
    study: StudyConfig, notes: list[str], *, fresh: bool
) -> Callable[[], Sequence[PriorTrial]]:
    """Return a function that yields the warm-start trials; for a new study they are read now."""
    path = study.search.warm_start
    if path is None:
        return tuple
    if not fresh:
        return lambda: read_prior(path, study).trials
    found = read_prior(path, study)
    notes.append(found.note)
    return lambda: found.trials


def _ledgers(
    stack: ExitStack,
    folder: RunFolder,
    study: StudyConfig,
    prior: Callable[[], Sequence[PriorTrial]],
    digests: Mapping[str, str],
    *,
    reading: bool = False,
) -> tuple[Ledger, Promotion | None]:
    ledger = read_ledger(folder, study) if reading else open_ledger(folder, study, prior)
    stack.callback(ledger.close)
    if reading:
        refuse_older(folder, study, ledger)
    refuse_other_data(folder, ledger, digests, reading=reading)
    return ledger, open_promotion(ledger)


def _load(request: Request, cluster: Cluster | None, notes: list[str]) -> StudyConfig:
    path = request.config
    if path is None:
        gpus = cluster.n_gpus_possible if cluster else float(torch.cuda.is_available())
        where = cluster.description if cluster else "this machine"
        path = _WITH_GPU if gpus else _WITHOUT_GPU
        has = "has" if cluster is None or cluster.n_gpus == gpus else "may grow to"
        why = f"{where} {has} {counted(gpus, 'GPU')}" if gpus else f"{where} has no GPU"
        notes.append(f"study: {path.name}, as {why} (choose another with --config)")
    else:
        notes.append(f"study: {path}")
    return load_study(path, request.overrides, **request.options)


def _reopen(
    stack: ExitStack, request: Request, path: Path, notes: list[str]
) -> tuple[RunFolder, StudyConfig]:
    """Open the folder of an earlier session and load its study with the permitted changes."""
    changed = [key for key, value in request.options.items() if value is not None]
    refused = [flag_of(key) for key in changed if key not in _RESUMABLE]
    refused += ["--config"] if request.config else []
    refused += ["--out"] if request.out else []
    refused += ["--set"] if request.overrides else []
    if refused:
        raise StudyError(
            f"{refused[0]}: cannot change with --resume; a study goes on as it was begun "
            "(--trials, --time-budget, --target, --promote, --storage, --concurrent, "
            "--gpus-per-trial, --data, --address and --local may change)"
        )
    folder = RunFolder.existing(path, lock=not request.dry_run)
    stack.callback(folder.release)
    options: dict[str, Any] = {key: request.options.get(key) for key in _RESUMABLE}
    folder.refuse_lost_ledger()
    notes.append(f"study: {folder.config}, going on")
    return folder, load_study(folder.config, **options)


def _run_trials(
    place: Place,
    ledger: Ledger,
    folder: RunFolder,
    watcher: Watcher,
    limits: Limits,
    interruption: Interruption,
) -> None:
    """Run the rest of the search with Ray or in this process."""

    due = 0.0

    def after() -> None:
        nonlocal due
        limits.look()
        begun = monotonic()
        if begun >= due:
            write_trials(folder, ledger)
            write_best(folder, ledger, patience=0.0)  # trials wait for the driver
            drop_losers(folder, ledger, *winners(ledger))
            due = monotonic() + _BETWEEN_WRITES * (monotonic() - begun)

    _run(place, ledger, folder, watcher, limits, interruption, after)


def _promote(
    cluster: Cluster | None,
    promotion: Promotion,
    folder: RunFolder,
    progress: Progress,
    interruption: Interruption,
) -> None:
    """Run the rest of the promotion with Ray or in this process, without the search's limits."""
    if not promotion.has_work:
        return
    search, study = promotion.search.config.search, promotion.config
    count = min(search.promote, len(promotion.search.ranking()))
    progress.say(
        f"promotion: the search's best {count}, with {counted(search.promote_seeds, 'seed')} each "
        f"and {counted(study.training.epochs, 'epoch')}"
        + (f" (--promote {search.promote}: no more have finished)" * (count < search.promote))
    )
    runs = folder.promotion()
    limits = Limits(promotion)
    begun = promotion.trials()
    # Runs of other seeds, or of trials that were among the best before, may have started too.
    planned = study.replaced({"search.trials": len(begun) + promotion.n_new})
    shown = progress.beside(planned, begun, lambda: limits.seconds)
    watchers = Watchers(shown, TensorBoardLog(promotion, runs.tensorboard))

    def after() -> None:
        write_promoted(folder, promotion)
        drop_losers(runs, promotion, *(found.best for found in promotion.configurations()))

    with shown.shown():
        place = choose_place(study, cluster, [])
        _run(place, promotion, runs, watchers, limits, interruption, after)


def _run(
    place: Place,
    ledger: Ledger,
    folder: RunFolder,
    watcher: Watcher,
    limits: Limits,
    interruption: Interruption,
    after: Callable[[], None],
) -> None:
    def stop() -> bool:
        return interruption.wished or limits.reached() is not None

    if place.cluster is None:
        with limits.counted():
            run_local(ledger, folder, watcher, device=place.device, stop=stop, after=after)
        return
    from tuner.distributed import run_distributed

    with interruption.gracefully(), limits.counted():
        run_distributed(
            ledger,
            folder,
            watcher,
            gpus=place.gpus,
            device=place.device,
            concurrent=place.concurrent,
            stop=stop,
            after=after,
        )


def _check_precision(study: StudyConfig, local: bool) -> None:
    resources = study.resources
    asked = resources.gpus_per_trial == 0 or resources.device == "cpu"
    if asked or (local and not torch.cuda.is_available()):
        check_precision(study.precision, "cpu")
