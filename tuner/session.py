"""One session of a study: from a request to results, whoever runs the trials."""

from __future__ import annotations

import logging
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from model.data import check_data
from model.files import write_text
from model.network import check_plugins
from model.precision import AmpPolicy
from tuner.command import DONE, INTERRUPTED, NOTHING_FINISHED, Interruption
from tuner.config import StudyConfig, load_study
from tuner.errors import ConfigError, StudyError
from tuner.folder import RunFolder
from tuner.limits import Ended, Limits
from tuner.local import local_device, run_local
from tuner.report import write_report
from tuner.results import drop_losers, export_winner, write_best, write_trials
from tuner.samplers import sampler_note
from tuner.space import n_points
from tuner.study import Ledger, PriorTrial, State
from tuner.telemetry import Progress, logging_to
from tuner.tensorboard import TensorBoardLog
from tuner.warmstart import read_prior
from tuner.watchers import Watcher, Watchers

if TYPE_CHECKING:
    from tuner.cluster import Cluster

logger = logging.getLogger(__name__)

_SCORED_SCENES = 256  # that the winner is compared with NOMP on

_CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# What a study may still change when it goes on; the rest decides its trials' results.
_RESUMABLE = {
    "search__trials",
    "search__time_budget",
    "search__target",
    "resources__concurrent",
    "resources__gpus_per_trial",
}
_FLAGS = {
    "training__epochs": "--epochs",
    "data__shards": "--data",
    "resources__cpus_per_trial": "--cpus-per-trial",
    "search__warm_start": "--warm-start",
    "seed": "--seed",
}


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    config: Path | None = None
    overrides: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    out: Path | None = None
    local: bool = False
    resume: Path | None = None
    address: str | None = None


@dataclass(frozen=True)
class _Place:
    """Where trials run, and what each is given there."""

    cluster: Cluster | None
    gpus: float
    concurrent: int
    device: str


def run_session(request: Request) -> int:
    """Run a study to its end, or as far as it is let.

    Returns:
        The exit code: 0 done, 1 no trial finished, 130 interrupted.

    Raises:
        StudyError, DataError: nothing was started; the message is one line.
    """
    if request.local and request.address:
        raise StudyError("--local: uses no Ray, so that --address has no meaning beside it")
    with ExitStack() as stack:
        interruption = stack.enter_context(Interruption().watched())
        cluster: Cluster | None = None
        folder: RunFolder | None = None
        ledger: Ledger | None = None
        notes: list[str] = []
        if request.resume is not None:
            folder, study = _reopen(stack, request, request.resume, notes)
        else:
            if request.config is None and not request.local:
                cluster = _connect(stack, request.address)
            study = _load(request, cluster, notes)
        notes += [note for note in [sampler_note(study.search)] if note]
        prior = _prior(study, notes, fresh=folder is None)
        _check_precision(study, request.local)
        check_plugins(study)
        notes.append("data: " + check_data(study))
        if folder is not None:
            ledger = _ledger(stack, folder, study, prior)
        place: _Place | None = None
        ended = _ended(ledger, Limits(ledger)) if ledger is not None else None
        if ended is None:
            if cluster is None and not request.local:
                cluster = _connect(stack, request.address)
            interruption.take()
            place = _place(study, cluster, notes)
        else:
            remedy = f" ({ended.remedy} goes on)" if ended.remedy else ""
            notes.append(f"nothing is left to run: {ended.reason}{remedy}")
        if folder is None:
            folder = RunFolder.fresh(request.out or RunFolder.default_path(study.name))
            stack.callback(folder.release)
        stack.enter_context(logging_to(folder.log))
        if cluster is not None:
            from tuner.cluster import quiet_ray

            quiet_ray()
        write_text(folder.config, study.to_yaml())
        ledger = ledger or _ledger(stack, folder, study, prior)
        limits = Limits(ledger)
        progress = Progress(study, ledger.trials())
        watchers = Watchers(progress, TensorBoardLog(ledger, folder.tensorboard))
        for note in [f"run folder: {folder.path}", *notes]:
            progress.say(note)
        try:
            with progress.shown():
                if place is not None:
                    _run_trials(place, ledger, folder, watchers, limits, interruption)
        except KeyboardInterrupt:
            interruption.wished = True
        except Exception:
            logger.exception("the run was cut short")
            where = shlex.quote(str(folder.path))
            progress.say(f"cut short by an error; go on with: python -m tuner.run --resume {where}")
            raise
        early = limits.reached() if place is not None and ledger.has_work else None
        return _conclude(folder, ledger, progress, early, interrupted=interruption.wished)


def _connect(stack: ExitStack, address: str | None) -> Cluster:
    from tuner.cluster import connected

    return stack.enter_context(connected(address))


def _prior(
    study: StudyConfig, notes: list[str], *, fresh: bool
) -> Callable[[], Sequence[PriorTrial]]:
    """What the ledger asks for until its first trial: of a fresh study it is read at once."""
    path = study.search.warm_start
    if path is None:
        return tuple
    if not fresh:
        return lambda: read_prior(path, study).trials
    found = read_prior(path, study)
    notes.append(found.note)
    return lambda: found.trials


def _ledger(
    stack: ExitStack,
    folder: RunFolder,
    study: StudyConfig,
    prior: Callable[[], Sequence[PriorTrial]],
) -> Ledger:
    ledger = Ledger(folder.database, study, prior)
    stack.callback(ledger.close)
    return ledger


def _load(request: Request, cluster: Cluster | None, notes: list[str]) -> StudyConfig:
    path = request.config
    if path is None:
        gpus = cluster.n_gpus_possible if cluster else float(torch.cuda.is_available())
        where = cluster.description if cluster else "this machine"
        path = _CONFIGS / ("full.yaml" if gpus else "quickstart.yaml")
        why = f"{where} has {gpus:g} GPUs" if gpus else f"{where} has no GPU"
        notes.append(f"study: {path.name}, as {why} (choose another with --config)")
    else:
        notes.append(f"study: {path}")
    return load_study(path, request.overrides, **request.options)


def _reopen(
    stack: ExitStack, request: Request, path: Path, notes: list[str]
) -> tuple[RunFolder, StudyConfig]:
    """Take the folder of an earlier session and its study, with what may change changed."""
    refused = [_FLAGS[key] for key in _FLAGS if request.options.get(key) is not None]
    refused += ["--config"] if request.config else []
    refused += ["--out"] if request.out else []
    refused += ["--set"] if request.overrides else []
    if refused:
        raise StudyError(
            f"{refused[0]}: cannot change with --resume; a study goes on as it was begun "
            "(--trials, --time-budget, --target, --concurrent, --gpus-per-trial, --address and "
            "--local may change)"
        )
    folder = RunFolder.existing(path)
    stack.callback(folder.release)
    options: dict[str, Any] = {key: request.options.get(key) for key in _RESUMABLE}
    notes.append(f"study: {folder.config}, going on")
    return folder, load_study(folder.config, **options)


def _run_trials(
    place: _Place,
    ledger: Ledger,
    folder: RunFolder,
    watcher: Watcher,
    limits: Limits,
    interruption: Interruption,
) -> None:
    """Let Ray or this process run what is left of the study."""

    def stop() -> bool:
        return interruption.wished or limits.reached() is not None

    def after() -> None:
        limits.look()
        write_trials(folder, ledger)
        write_best(folder, ledger)
        drop_losers(folder, ledger)

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
            concurrent=place.concurrent,
            stop=stop,
            after=after,
        )


def _check_precision(study: StudyConfig, local: bool) -> None:
    on_cpu = study.resources.gpus_per_trial == 0 or (local and not torch.cuda.is_available())
    if on_cpu:
        try:
            AmpPolicy(study.precision, torch.device("cpu"))
        except ValueError as error:
            raise ConfigError(f"precision.amp: got {study.precision.amp!r}; {error}") from error


def _ended(ledger: Ledger, limits: Limits) -> Ended | None:
    """Why the study has nothing to run, if that is so."""
    if not ledger.has_work:
        search = ledger.config.search
        if n_points(search.space) <= search.trials:
            return Ended("every point of search.space has run")
        return Ended("all trials have run", "a larger --trials")
    return limits.reached()


def _place(study: StudyConfig, cluster: Cluster | None, notes: list[str]) -> _Place:
    """GPUs a trial, trials side by side, and the device's name; says what was chosen."""
    cpus = study.resources.cpus_per_trial
    if cluster is None:
        wanted = study.resources.gpus_per_trial
        device = local_device(wanted)
        if wanted and device == "cpu":
            raise StudyError(
                f"resources.gpus_per_trial: {wanted:g} GPU a trial asked, but this machine has "
                "none; ask for 0 to run the trials on the CPU"
            )
        if device == "cpu":
            notes.append(f"no GPU is used: trials run on the CPU, threads each: {cpus}")
        else:
            notes.append(f"trials run on {torch.cuda.get_device_name()}, one after another")
        return _Place(None, float(device != "cpu"), 1, device)
    from tuner.cluster import trial_resources

    gpus, concurrent = trial_resources(cluster, study.resources, study.search.trials)
    notes.append(
        f"{cluster.description}: {cluster.n_cpus:g} CPUs, {cluster.n_gpus:g} GPUs; "
        f"{concurrent} trials side by side, {gpus:g} GPU and {cpus} CPU each"
    )
    if not gpus:
        reason = "by request" if cluster.n_gpus_possible else "there is none"
        notes.append(f"no GPU is used ({reason}): trials run on the CPU")
    if cluster.n_nodes_possible > 1 and not study.resources.storage:
        notes.append(
            "the cluster has several nodes: the run folder must lie on storage that all of them "
            "share (NFS), or resources.storage must name it (s3://...)"
        )
    if cluster.dashboard:
        token = f" (token: {cluster.token_file})" if cluster.token_file else ""
        notes.append(f"Ray dashboard: {cluster.dashboard}{token}")
    return _Place(cluster, gpus, concurrent, "cuda" if gpus else "cpu")


def _conclude(
    folder: RunFolder, ledger: Ledger, progress: Progress, early: Ended | None, *, interrupted: bool
) -> int:
    """Write the results and say how it ended."""
    write_trials(folder, ledger)
    best = write_best(folder, ledger)
    if best is not None:
        export_winner(folder, best)
    _attempt(lambda: write_report(folder, ledger), progress, "report.html")
    counts = Counter(trial.state for trial in ledger.trials())
    states: tuple[State, ...] = ("running", "done", "pruned", "failed")
    words: dict[State, str] = {"running": "to go on"}
    summary = ", ".join(f"{counts[s]} {words.get(s, s)}" for s in states if counts[s])
    progress.say(f"trials: {summary or 'none'}")
    where = shlex.quote(str(folder.path))
    if best is not None:
        untrained = best.metrics.get("untrained_objective")
        beside = f" (untrained network: {untrained:.5f})" if untrained is not None else ""
        progress.say(f"best: trial {best.number:04d}, objective {best.objective:.5f}{beside}")
    if interrupted:
        progress.say(f"interrupted; go on with: python -m tuner.run --resume {where}")
        return INTERRUPTED
    if early is not None:
        more = f"python -m tuner.run --resume {where} {early.remedy}"
        progress.say(f"ended early: {early.reason}; go on with: {more}")
    if best is None:
        reasons = {t.reason for t in ledger.trials() if t.state == "failed" and t.reason}
        why = f"; for example: {sorted(reasons)[0]}" if reasons else ""
        progress.say(f"no trial finished{why}", logging.ERROR)
        return NOTHING_FINISHED
    try:
        _attempt(lambda: _score_winner(folder, progress), progress, "evaluation.json")
    except KeyboardInterrupt:
        progress.say("the winner's scoring was interrupted; tuner.evaluate does it at any time")
    progress.say(f"report: {folder.report}")
    progress.say(f"train the winner at full budget: python -m tuner.train --from {where}")
    return DONE


def _score_winner(folder: RunFolder, progress: Progress) -> None:
    """evaluation.json: the winner beside NOMP.

    Simulated scenes are such as no trial has seen. Of recorded ones the test split is taken, or
    else the validation split, which chose the winner: the result says so.
    """
    from model.localizer import Localizer
    from tuner.evaluation import evaluate_suite, evaluation_of, write_evaluation
    from tuner.scoreboard import REFERENCE

    if not (folder.best / "config.json").exists():
        return  # its checkpoint was out of reach, which has been said
    localizer = Localizer.load(folder.best)
    found = evaluate_suite(
        "nominal",
        localizer.config,
        localizer,
        n_scenes=_SCORED_SCENES,
        classical=[REFERENCE],
        say=logger.info,
    )
    content = evaluation_of({"nominal": found}, localizer.config, checkpoint=folder.best)
    write_evaluation(folder.path / "evaluation.json", content)
    progress.say(f"winner beside NOMP; scenes: {found['scenes']}")
    for name, report in found["methods"].items():
        numbers = report["overall"]
        progress.say(f"{name}: F1 {numbers['f1']:.3f}, GOSPA {numbers['gospa_m']:.2f} m")
    progress.say(f"scoreboard: {folder.path / 'evaluation.html'}")


def _attempt(work: Callable[[], Any], progress: Progress, what: str) -> None:
    # A page that cannot be drawn must not cost the results that are already on disk.
    try:
        work()
    except Exception as error:
        logger.exception("%s was not written", what)
        progress.say(f"{what} was not written: {error}", logging.WARNING)
