"""What searches find at equal compute, and how many GPUs one driver keeps busy, in virtual time.

    python -m benchmarks.search [--json FILE] [--seeds 24] [--trials 100] [--gpus 1 8 64] [--jobs 2]
        [--curves benchmarks/data/curves.json.gz]
    python -m benchmarks.search --only driver

Learning curves come from really trained trials by way of a surrogate (benchmarks/_surrogate.py);
ledger, sampler and scheduler are the real ones (benchmarks/_simulator.py), the rungs those of
configs/full.yaml. The measure is the sequential search with TPE and Optuna's median pruner, one
GPU, ``--trials`` trials; the others are let run for ``--beyond`` times its GPU-hours. GPU-hours are
those for which GPUs are held, idle or not. Searches with one seed have the same noise for the same
trial number. The driver's cost is measured, on ledgers in memory and in SQLite, and passes in
virtual time.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from benchmarks._curves import recorded_study
from benchmarks._simulator import (
    DriverCost,
    MedianPruned,
    MemoryLedger,
    PlainLedger,
    Run,
    Span,
    Stopped,
    WaitingLedger,
    simulate,
)
from benchmarks._surrogate import RECORDED, Curve, Recorded, Surrogate
from benchmarks._timing import parser, save, verdict
from tuner.config import StudyConfig
from tuner.records import Assignment
from tuner.space import suggest
from tuner.study import Ledger

TARGET = 1.0 / 3.0
_LARGE = 10_000  # trials of the driver's part
_ENDLESS = 10**6
# Ledger, scheduler, sampler and further settings of each kind of search.
ASHA = "ASHA + TPE"
PLAIN = "ASHA + TPE, stopped told COMPLETE"
PAUSING = "ASHA with pauses + TPE"
CHANCE = {"least_chance": 0.05}
ARMS: dict[str, tuple[type[MemoryLedger | WaitingLedger], str, str, dict[str, Any]]] = {
    ASHA: (MemoryLedger, "asha", "tpe", {}),
    PAUSING: (WaitingLedger, "asha-pausing", "tpe", {}),
    PLAIN: (PlainLedger, "asha", "tpe", {}),
    "ASHA with pauses + TPE, chance": (WaitingLedger, "asha-pausing", "tpe", CHANCE),
    "ASHA + TPE, chance": (MemoryLedger, "asha", "tpe", CHANCE),
    "ASHA + univariate TPE": (MemoryLedger, "asha", "tpe-univariate", {}),
    "ASHA with pauses + univariate TPE": (WaitingLedger, "asha-pausing", "tpe-univariate", {}),
    "ASHA + Gaussian process": (MemoryLedger, "asha", "gp", {}),
    "ASHA + Gaussian process, chance": (MemoryLedger, "asha", "gp", CHANCE),
    "ASHA with pauses + Gaussian process, chance": (WaitingLedger, "asha-pausing", "gp", CHANCE),
    "ASHA + random": (MemoryLedger, "asha", "random", {}),
    "TPE, nobody stopped": (MemoryLedger, "none", "tpe", {}),
}
# Not a real search: a bound that knows the best part of the space from the beginning.
ORACLE = "ASHA + the best 2 % of the space"
_DRAWN, _BEST = 20_000, 400  # random points of the space, and how many of the best are kept


def study_of(scheduler: str, sampler: str, trials: int, seed: int, **search: Any) -> StudyConfig:
    """The recorded study, searched with the rungs and the start of configs/full.yaml.

    Args:
        scheduler, sampler, trials, seed: of the study.
        **search: other fields of its search.
    """
    wanted = {
        "sampler": sampler,
        "scheduler": scheduler,
        "startup_trials": 12,
        "grace_epochs": 1,
        "reduction_factor": 3,
        **search,
    }
    return recorded_study(trials, seed).replaced({f"search.{k}": v for k, v in wanted.items()})


@cache
def surrogate(curves: Path = RECORDED) -> Surrogate:
    """The surrogate, fitted once per process."""
    return Surrogate(Recorded.load(curves))


def replayed(curves: Path, seed: int, assignment: Assignment) -> Curve:
    """A trial's curve, with noise determined by seed and number."""
    noise = np.random.default_rng([seed, assignment.number])
    return surrogate(curves).curve(assignment.params, noise)


# Quality at equal compute


def sequential(curves: Path, trials: int, seed: int) -> Run:
    """The baseline: TPE and Optuna's median pruner on one GPU."""
    ledger = MedianPruned(study_of("none", "tpe", trials, seed))
    return simulate(ledger, partial(replayed, curves, seed), gpus=1)


@cache
def best_points(curves: Path) -> list[dict[str, Any]]:
    """The points with the lowest expected last objective among many random ones."""
    space = study_of("none", "random", 1, 0).search.space
    random = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    points = [suggest(space, random.ask()) for _ in range(_DRAWN)]
    return [points[i] for i in np.argsort(surrogate(curves).expected(points))[:_BEST]]


def searched(
    curves: Path, arm: str, gpus: int, seed: int, gpu_seconds: float
) -> tuple[Run, tuple[int, int]]:
    """Result of one search of another kind, with the trials it :func:`missed`."""
    if arm == ORACLE:
        order = np.random.default_rng(seed).permutation(_BEST)
        known = [best_points(curves)[i] for i in order]
        ledger_type: type[MemoryLedger | WaitingLedger] = MemoryLedger
        scheduler, sampler = "asha", "random"
        search: dict[str, Any] = {"include_base": False, "enqueue": known}
    else:
        ledger_type, scheduler, sampler, search = ARMS[arm]
    ledger = ledger_type(study_of(scheduler, sampler, _ENDLESS, seed, **search))
    curve = partial(replayed, curves, seed)
    run = simulate(ledger, curve, gpus=gpus, gpu_seconds=gpu_seconds)
    return run, missed(run, ledger, curve)


def missed(run: Run, ledger: Ledger, curve: Callable[[Assignment], Curve]) -> tuple[int, int]:
    """Stopped trials that would have become the best, and all stopped since there was a best."""
    params = {trial.number: trial.params for trial in ledger.trials()}
    best, of, would = math.inf, 0, 0
    for span in run.spans:
        if span.state == "done":
            best = min(best, span.objective)
        elif math.isfinite(best):
            end = curve(Assignment(span.number, params[span.number], 0)).objective[-1]
            of, would = of + 1, would + int(end < best)
    return would, of


def compared(
    seed: int, curves: Path, trials: int, counts: list[int], beyond: float, arms: list[str]
) -> dict[str, Any]:
    """Results of the baseline and of all other searches with one seed."""
    measure = sequential(curves, trials, seed)
    compute, target = measure.gpu_seconds, measure.best()
    found: dict[str, Any] = {
        "gpu_seconds": compute,
        "best": target,
        "found_at": measure.gpu_seconds_to(target) / compute,
        "arms": {},
    }
    for arm in arms:
        for gpus in counts:
            run, (would, of) = searched(curves, arm, gpus, seed, beyond * compute)
            equal = [s for s in run.spans if s.end * gpus <= compute]
            done = [s.objective for s in equal if s.state == "done"]
            found["arms"].setdefault(arm, {})[str(gpus)] = {
                "ratio": run.gpu_seconds_to(target) / compute,
                "best": min(done, default=math.inf),
                "trials": len(equal) + sum(t * gpus <= compute for t in run.waiting.values()),
                "done": len(done),
                "would_have_won": would,
                "stopped": of,
                "told": dict(told(run)),
            }
    return found


def told(run: Run) -> Iterable[tuple[str, int]]:
    """Numbers of ended trials by state."""
    for state in ("done", "pruned"):
        yield state, sum(span.state == state for span in run.spans)


def bootstrap(values: np.ndarray, draws: int = 4000) -> tuple[float, float, float]:
    """Mean and its 95 % interval, with seeds resampled with replacement."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(draws, len(values)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def quantiles(values: Iterable[float]) -> list[float]:
    """Quartiles; infinite where too few seeds reached the target."""
    ordered = np.array(sorted(values))
    return [float(np.quantile(ordered, q, method="inverted_cdf")) for q in (0.25, 0.5, 0.75)]


def summary(rows: list[dict[str, Any]], counts: list[int], beyond: float) -> dict[str, Any]:
    """Summarise the figures over the seeds and print them."""
    result: dict[str, Any] = {
        "gpu_seconds": statistics.median(row["gpu_seconds"] for row in rows),
        "best": statistics.median(row["best"] for row in rows),
        "found_at": quantiles(row["found_at"] for row in rows),
        "arms": {},
    }
    print(
        f"measure: GPU time {result['gpu_seconds']:.0f} s, best {result['best']:.4f} (medians of "
        f"{len(rows)} seeds), first reached after {result['found_at'][1]:.2f} of its time\n\n"
        "| search | GPUs | GPU-hours to the measure's best / all of the measure's, quartiles "
        "| reached within a third | at equal GPU-hours: best - measure's [95 %] | trials | done "
        "| stopped that would have become the best |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for arm in rows[0]["arms"]:
        for gpus in counts:
            cells = [row["arms"][arm][str(gpus)] for row in rows]
            ratios = quantiles(cell["ratio"] for cell in cells)
            pairs = zip(cells, rows, strict=True)
            gaps = np.array([cell["best"] - row["best"] for cell, row in pairs])
            gap = bootstrap(gaps) if np.isfinite(gaps).all() else (math.inf,) * 3
            entry = {
                "ratio_quartiles": ratios,
                "within_a_third": sum(cell["ratio"] <= TARGET for cell in cells) / len(cells),
                "gap": gap,
                "no_finished_trial": int((~np.isfinite(gaps)).sum()),
                "trials": statistics.median(cell["trials"] for cell in cells),
                "done": statistics.median(cell["done"] for cell in cells),
                "would_have_won": sum(cell["would_have_won"] for cell in cells),
                "stopped": sum(cell["stopped"] for cell in cells),
            }
            result["arms"].setdefault(arm, {})[str(gpus)] = entry
            shown = ", ".join(f"{r:.2f}" if r <= beyond else f"> {beyond:g}" for r in ratios)
            difference = f"{gap[0]:+.4f} [{gap[1]:+.4f}, {gap[2]:+.4f}]"
            if not math.isfinite(gap[0]):
                difference = f"none finished: {entry['no_finished_trial']} seeds"
            print(
                f"| {arm} | {gpus} | {shown} | {100 * entry['within_a_third']:.0f} % | "
                f"{difference} | {entry['trials']:g} | {entry['done']:g} | "
                f"{entry['would_have_won']} of {entry['stopped']} |"
            )
    print()
    for arm, found in result["arms"].items():
        one = found[str(counts[0])]["ratio_quartiles"][1]
        print(f"{arm}, {counts[0]} GPU: median {one:.2f}, target 0.33: {verdict(one <= TARGET)}")
    result["told"] = {}
    for gpus in counts if {ASHA, PLAIN} <= result["arms"].keys() else []:
        both = [(row["arms"][ASHA][str(gpus)], row["arms"][PLAIN][str(gpus)]) for row in rows]
        gaps = np.array([ours["best"] - plain["best"] for ours, plain in both])
        gaps = gaps[np.isfinite(gaps)]
        if not len(gaps):
            continue
        gap = result["told"][str(gpus)] = bootstrap(gaps)
        sooner = sum(ours["ratio"] < plain["ratio"] for ours, plain in both)
        later = sum(ours["ratio"] > plain["ratio"] for ours, plain in both)
        print(
            f"told PRUNED - told COMPLETE, {gpus} GPUs: best {gap[0]:+.4f} [{gap[1]:+.4f}, "
            f"{gap[2]:+.4f}]; sooner at the measure's best {sooner} times, later {later}"
        )
    return result


# The driver


def ended(study: StudyConfig, n: int) -> list[FrozenTrial]:
    """Trials that ended as under ASHA: one in three is promoted at every rung."""
    random = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    rng = np.random.default_rng(0)
    trials = []
    for number, epochs in enumerate(rungs(rng, n)):
        asked = random.ask()
        suggest(study.search.space, asked)
        curve = np.sort(rng.normal(0.5, 0.05, epochs))[::-1]
        values = {epoch: float(value) for epoch, value in enumerate(curve, start=1)}
        done = epochs == 27
        trials.append(
            create_trial(
                state=TrialState.COMPLETE if done else TrialState.PRUNED,
                value=values[epochs] if done else None,
                params=asked.params,
                distributions=asked.distributions,
                intermediate_values=values,
                user_attrs={"seed": number, "budget": 27},
            )
        )
    return trials


def seconds_of(call: Callable[[], Any], times: int = 7) -> float:
    """Median CPU seconds of a call."""
    spent = []
    for _ in range(times):
        start = time.process_time()
        call()
        spent.append(time.process_time() - start)
    return statistics.median(spent)


def ask_seconds(n: int, sampler: str = "tpe") -> float:
    """Seconds of a proposal after n trials, on a ledger in memory.

    Proposed trials stay running, as on a cluster.
    """
    study = study_of("asha", sampler, _ENDLESS, 0)
    ledger = MemoryLedger(study)
    ledger.optuna_study.add_trials(ended(study, n))
    return seconds_of(ledger.ask)


def database_seconds(running: int) -> dict[str, float]:
    """CPU seconds that SQLite adds to a proposal, and those of an epoch and an end with SQLite.

    They are measured after 100 trials, with others running that have reported some epochs each.
    """
    study = study_of("asha", "tpe", _ENDLESS, 0)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "study.db", study)
        ledger.optuna_study.add_trials(ended(study, 100))
        metrics = {f"metric_{index}": 0.123456789 for index in range(20)}

        def epoch(number: int, count: int) -> None:
            ledger.report(
                number,
                metrics | {"epoch": count, "objective": 0.5},
                "/mnt/ristune/runs/full/trials/0001/checkpoint",
            )

        numbers = []
        for _ in range(running):
            trial = ledger.ask()
            assert trial is not None
            numbers.append(trial.number)
            for count in range(1, 9):
                epoch(trial.number, count)
        found = {
            "ask": max(0.0, seconds_of(ledger.ask) - ask_seconds(100)),
            "report": seconds_of(partial(epoch, numbers[0], 9)),
            "end": seconds_of(lambda: ledger.finish(numbers.pop(), "pruned", reason="stopped")),
        }
        ledger.close()
    return found


def driver(gpu_counts: list[int], sizes: list[int], ray: float) -> dict[str, Any]:
    """Cost of a proposal, and the resulting idle time of GPUs."""
    measured = {n: ask_seconds(n) for n in sizes}
    for n, seconds in measured.items():
        print(f"TPE, a proposal after {n} trials: {1e3 * seconds:.1f} ms")
    modelled = {n: ask_seconds(n, "gp") for n in (30, 100, 300)}
    for n, seconds in modelled.items():
        print(f"Gaussian process, a proposal after {n} trials: {seconds:.2f} s")
    database = database_seconds(64)
    report = database["report"] + ray
    print(
        f"SQLite: {1e3 * database['ask']:.1f} ms more for a proposal, "
        f"{1e3 * database['report']:.1f} ms an epoch, {1e3 * database['end']:.1f} ms an end; "
        f"Ray: {1e3 * ray:g} ms an epoch"
    )

    def ask(n: int) -> float:
        return database["ask"] + float(np.interp(n, list(measured), list(measured.values())))

    result: dict[str, Any] = {
        "ask_seconds": measured,
        "gp_ask_seconds": modelled,
        "database": database,
        "idle": {},
    }
    print(
        f"\n{_LARGE} trials, one in three going on at each rung; "
        "share of GPU time spent waiting (of the driver's time at work)\n\n| s an epoch | "
        + " | ".join(f"{gpus} GPUs" for gpus in gpu_counts)
        + " |\n|"
        + "---|" * (len(gpu_counts) + 1)
    )
    rng = np.random.default_rng(0)
    epochs = rungs(rng, _LARGE)
    for seconds in (1.0, 10.0, 60.0, 600.0):
        cells = []
        for gpus in gpu_counts:
            trials = Stopped(epochs)
            run = simulate(
                trials,
                partial(_even, seconds),
                gpus=gpus,
                cost=DriverCost(ask=ask, report=report, end=lambda n: database["end"]),
            )
            # Until the last trial has begun: afterwards GPUs are idle for lack of trials, not
            # because of the driver.
            full = max(s.start for s in run.spans)
            busy = sum(_overlap(s, full) for s in run.spans)
            idle = max(0.0, 1.0 - busy / (gpus * full))
            share = run.driver / run.seconds
            result["idle"][f"{seconds:g} s, {gpus} GPUs"] = {"idle": idle, "driver": share}
            cells.append(f"{100 * idle:.0f} % ({100 * share:.0f} %)")
        print(f"| {seconds:g} | " + " | ".join(cells) + " |")
    return result


def rungs(rng: np.random.Generator, n: int) -> list[int]:
    """Epochs of n trials of which one in three is promoted at each rung."""
    return [min(27, 3 ** (int(k) - 1)) for k in rng.geometric(2 / 3, n)]


def _even(seconds: float, assignment: Assignment) -> Curve:
    """A trial with epochs of the given duration."""
    return Curve(np.ones(27), np.full(27, seconds))


def _overlap(span: Span, until: float) -> float:
    """Seconds of a trial's epochs before a time, assuming them evenly spread over its span."""
    return span.busy * max(0.0, min(span.end, until) - span.start) / (span.end - span.start)


def main() -> None:
    """Run the benchmark and print the result."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--seeds", type=int, default=24, help="of searches (%(default)s)")
    arguments.add_argument("--trials", type=int, default=100, help="of the measure (%(default)s)")
    arguments.add_argument("--curves", type=Path, default=RECORDED, help="to replay (%(default)s)")
    arguments.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64])
    arguments.add_argument("--beyond", type=float, default=2.0, help="times its GPU-hours")
    arguments.add_argument("--arms", nargs="+", choices=[*ARMS, ORACLE], default=[*ARMS, ORACLE])
    arguments.add_argument("--jobs", type=int, default=2, help="processes (%(default)s)")
    arguments.add_argument("--only", choices=["quality", "driver"])
    arguments.add_argument(
        "--ray", type=float, default=0.005, help="Ray's own seconds for an epoch (%(default)s)"
    )
    args = arguments.parse_args()
    figures: dict[str, Any] = {}
    if args.only != "driver":
        figures["surrogate"] = found = surrogate(args.curves).leave_one_out()
        print(
            f"surrogate: Gaussian processes over {found['trials']} recorded trials, "
            f"{found['components']} components of their shapes; left out, a trial's last "
            f"objective is off by {found['rms_error']:.4f} (standard deviation of the values "
            f"{found['standard_deviation']:.4f}, explained {100 * found['explained']:.0f} %, rank "
            f"correlation {found['rank_correlation']:.2f}); noise of a trial {found['noise']:.4f}; "
            f"first and last epoch rank alike by {found['first_to_last_rank']:.2f}\n"
        )
        compare = partial(
            compared,
            curves=args.curves,
            trials=args.trials,
            counts=args.gpus,
            beyond=args.beyond,
            arms=args.arms,
        )
        with ProcessPoolExecutor(args.jobs) as pool:
            rows = list(pool.map(compare, range(args.seeds)))
        figures["quality"] = summary(rows, args.gpus, args.beyond) | {"seeds": rows}
        print()
    if args.only != "quality":
        figures["driver"] = driver([1, 8, 64, 1024], [10, 100, 1000, _LARGE], args.ray)
    save(figures, args.json, "cpu")


if __name__ == "__main__":
    main()
