"""The overview of a study: a paragraph, a table, and the winner's configuration."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from model.config import OBJECTIVES, TrialConfig
from model.wording import counted
from tuner.config import SearchConfig, plain_of
from tuner.duration import format_duration
from tuner.gain import change_in_words, gain_of, untrained_objective
from tuner.pages.markup import Markup, escape, listed, note, pairs, short, table
from tuner.records import STATE_WORDS, config_of
from tuner.scoretable import signed
from tuner.suites import CHOOSERS

if TYPE_CHECKING:
    from tuner.pages.material import Material

_UNITS = {"nmse": "", "f1": "", "gospa": " m", "nll": " nat"}
_SAMPLERS = {
    "tpe": "TPE",
    "tpe-univariate": "univariate TPE",
    "random": "chance",
    "gp": "a Gaussian process",
    "cmaes": "CMA-ES",
    "grid": "a grid",
}
_SCHEDULERS = {
    "asha": "ASHA", "asha-pausing": "ASHA with pauses", "hyperband": "Hyperband",
    "median": "the median rule", "pbt": "population-based training",
}  # fmt: skip


def overview(material: Material) -> Markup:
    """Return the paragraph and the table."""
    return Markup(f"<p>{escape(_asked(material))} {escape(_found(material))}</p>{_facts(material)}")


def tiles(material: Material) -> Markup:
    """Return the tiles with the key figures."""
    best, counts = material.best, material.counts
    unit = _UNITS[material.study.objective]
    shown = [
        (
            "–" if best is None else f"{short(best.objective, 5)}{unit}",
            f"best objective{_of_search(material)}"
            + ("" if best is None else f", trial {best.number:04d}"),
        ),
        (f"{len(material.trials):,}", f"trials of {material.study.search.trials:,}"),
        (
            f"{counts['done']:,} / {counts['pruned']:,} / {counts['failed']:,}",
            "done / stopped early / failed",
        ),
        (format_duration(material.seconds), "time of trials"),
    ]
    if material.busy is not None:
        shown.append((f"{material.busy:.0%}", "of the slots' time spent training"))
    scores = _scores(material)
    if scores:
        shown.append((f"{scores['network']['f1']:.3f}", _beside(scores)))
    inside = "".join(
        f"<div class='tile'><b>{escape(value)}</b><span>{escape(name)}</span></div>"
        for value, name in shown
    )
    return Markup(f"<div class='tiles'>{inside}</div>")


def _of_search(material: Material) -> str:
    """Return a phrase that distinguishes the search's best from the promotion's winner."""
    return "" if material.promoted is None else " in the search"


def _beside(scores: dict[str, Any]) -> str:
    other = scores.get("nomp")
    return "the winner's F1" + (f"; NOMP {other['f1']:.3f}" if other else "")


def _asked(material: Material) -> str:
    study = material.study
    search = study.search
    data = (
        f"the shards in {study.data.shards}"
        if study.data.shards
        else f"{counted(study.data.train_scenes, 'simulated scene')} an epoch"
    )
    budget = (
        f", within {format_duration(search.time_budget)}" if search.time_budget is not None else ""
    )
    target = f", down to {short(search.target)}" if search.target is not None else ""
    return (
        f"Asked: the {study.network.family} network with the lowest "
        f"{OBJECTIVES[study.objective]}{target}, over {counted(len(search.space), 'parameter')}; "
        f"{counted(search.trials, 'trial')} of at most {counted(study.training.epochs, 'epoch')}"
        f"{budget}, proposed by {_SAMPLERS[search.proposer]}, {_stopped(search)}, "
        f"trained on {data}."
    )


def _stopped(search: SearchConfig) -> str:
    rules = [_SCHEDULERS[search.scheduler]] if search.scheduler != "none" else []
    if search.least_chance:
        rules.append(f"a chance to win below {100 * search.least_chance:g} %")
    return f"stopped early by {' and by '.join(rules)}" if rules else "none stopped early"


def _found(material: Material) -> str:
    best, counts = material.best, material.counts
    if not material.trials:
        return "Found: nothing yet, as no trial has started."
    ends = [f"{counts[state]:,} {STATE_WORDS[state]}" for state in counts if counts[state]]
    so_far = f"Found: of {counted(len(material.trials), 'trial')}, {listed(ends)}."
    if best is None:
        return f"{so_far} No trial has finished, so that there is no winner."
    unit = _UNITS[material.study.objective]
    text = f"{so_far} The best{_of_search(material)} is trial {best.number:04d} with "
    text += f"{short(best.objective, 5)}{unit}"
    untrained = untrained_objective(material.trials)
    if untrained is not None and best.objective is not None:
        change = change_in_words(material.study.objective, untrained, best.objective)
        text += f", {change} untrained networks"
    gain = gain_of(material.study, material.trials, best)
    text += f". {gain}" if gain else "."
    if len(material.trials) > 1:
        text += " It is the best of many on the same validation scenes, and so a little optimistic."
    it = "it"
    if material.promoted is not None and material.promoted.best is not None:
        text += (
            f" Of the promoted configurations that of trial {material.promoted.trial.number:04d} "
            f"is the best: {material.promoted.words}. The winner is its network of seed "
            f"{material.promoted.best.seed}."
        )
        it = "the winner"
    scores = _scores(material)
    if scores:
        suite = next(iter(material.evaluation["suites"].values()))  # type: ignore[index]
        where = "the validation" if CHOOSERS in suite["scenes"] else "other"
        text += f" On {where} scenes ({suite['scenes']}) {it} finds sources with F1 "
        text += f"{scores['network']['f1']:.3f} and GOSPA {scores['network']['gospa_m']:.2f} m"
        if other := scores.get("nomp"):
            text += f"; NOMP with {other['f1']:.3f} and {other['gospa_m']:.2f} m"
        beside = [
            f"{name} {signed(found)}{unit}"
            for name, key, unit in (("F1", "paired_f1", ""), ("GOSPA", "paired_gospa_m", " m"))
            if (found := suite.get(key, {}).get("nomp", {}).get("network"))
        ]
        text += f"; the difference with its 95 % interval: {', '.join(beside)}." if beside else "."
    return text


def _scores(material: Material) -> dict[str, Any]:
    """Return the overall scores on the first suite if the evaluation is of the winner, else {}."""
    from tuner.pages.scoreboard import usable

    content = material.evaluation
    if content is None or not usable(content) or not material.is_of_winner(content["config"]):
        return {}
    methods = next(iter(content["suites"].values()))["methods"]
    found = {name: report["overall"] for name, report in methods.items()}
    return found if "network" in found else {}


def _facts(material: Material) -> Markup:
    study, best = material.study, material.winner
    limit = study.search.time_budget
    rows: list[tuple[str, object]] = [
        ("Objective", f"{OBJECTIVES[study.objective]}, best epoch so far; lower is better"),
        ("Budget", f"{counted(study.training.epochs, 'epoch')} a trial"),
        (
            "Search",
            f"{study.search.sampler}, {study.search.scheduler}, seed {study.seed}"
            + (f", warm start from {study.search.warm_start}" if study.search.warm_start else ""),
        ),
        ("Scenes", _scenes(material)),
        (
            "Time of trials",
            format_duration(material.seconds)
            + (f" of {format_duration(limit)}" if limit is not None else "")
            + ", over all sessions",
        ),
    ]
    begun = [t.started for t in material.trials if t.started]
    ended = [t.finished for t in material.trials if t.finished]
    if begun and ended:
        rows.append(("From, to", f"{min(begun):%Y-%m-%d %H:%M} to {max(ended):%Y-%m-%d %H:%M}"))
    if best is not None:
        metrics = best.scored
        scores = [f"{OBJECTIVES[study.objective]} {short(best.objective, 6)}"]
        scores += [
            f"{name} {metrics[key]:.3f}"
            for name, key in (("F1", "f1"), ("GOSPA [m]", "gospa"), ("NMSE of R_pred", "nmse_pred"))
            if isinstance(metrics.get(key), float)
            and (key == "f1" or key.removesuffix("_pred") != study.objective)  # already listed
        ]
        seed = "" if material.promoted is not None else f", seed {best.seed}"
        rows.append(("Winner", f"{material.winner_name}{seed}: {', '.join(scores)}"))
    rows += [
        (purpose, Markup(f"<code>{escape(command)}</code>")) for purpose, command in _next(material)
    ]
    return pairs(rows)


def _next(material: Material) -> list[tuple[str, str]]:
    """Return the next steps and their commands."""
    search, epochs = material.study.search, material.study.training.epochs
    on, ended = f"python -m tuner.run --resume {material.place}{material.mode}", material.ended
    steps = []
    promotion = material.promotion
    if ended is None or (promotion is not None and promotion.has_work):
        steps.append(("Go on, if it was cut", on))
    if ended is not None and ended.remedy is not None:
        steps.append(("Search on", f"{on} {ended.remedy}"))
    if material.best is not None:
        if material.promoted is None and (search.full_epochs or epochs) > epochs:
            train = f"python -m tuner.train --from {material.place}"
            steps.append(("Train the winner at full budget", train))
        locate = f"python -m model.locate SNAPSHOTS --checkpoint {material.place}/best"
        steps.append(("Locate with it", locate))
    return steps


def _scenes(material: Material) -> str:
    scene, data = material.study.scene, material.study.data
    if data.shards:
        return f"recorded, {data.shards}"
    low, high = scene.snr_db
    return (
        f"{scene.source_mode} symbols, {scene.wavefront} waves, {scene.min_sources} to "
        f"{scene.max_sources} sources, SNR {low:g} to {high:g} dB; "
        f"{data.train_scenes:,} to train, {data.val_scenes:,} to validate"
    )


def winner(material: Material) -> Markup:
    """Return the fields of the winner's configuration that differ from the defaults."""
    best, study = material.winner, material.winner_study
    if best is None:
        return note("No trial has finished, so that there is no winner.")
    config = config_of(study, best)
    held, usual = flattened(config), flattened(defaults_of(config))
    own = flattened(study.trial_config({}, best.seed))
    rows: list[tuple[object, ...]] = []
    for path, value in held.items():
        if path == "seed" or value == usual.get(path):
            continue
        change = f"<del>{escape(short(usual.get(path)))}</del> → <ins>{escape(short(value))}</ins>"
        halved = best.accumulation is not None and path == "training.accumulation"
        who = "memory" if halved else "search"
        kept = "study, searched" if path in best.params else "study"
        rows.append((path, Markup(change), kept if value == own[path] else who))
    rows.sort(key=lambda row: (row[2] != "search", row[0]))
    same = [path for path in best.params if held.get(path) == usual.get(path)]
    usual_too = f" Searched, and at their defaults: {listed(same)}." if same else ""
    by = Counter(str(row[2]).partition(",")[0] for row in rows)
    text = (
        f"The fields of {material.winner_name} that differ from the defaults: the search set "
        f"{by['search']}, the study's own configuration {by['study']}.{usual_too}"
    )
    if best.accumulation is not None:
        text += f" Memory was not enough for whole batches: they are in {best.accumulation} parts."
    if best.heir is not None:
        text += (
            f" Its weights come {best.heir.words}; what they were trained with until then is under "
            "lineage in best.json."
        )
    return Markup(
        note(text) + table(["field", "default → winner", "set by"], rows, most=200, whole=True)
    )


def defaults_of(config: TrialConfig) -> TrialConfig:
    """Return the defaults, with the network section of the configuration's own family."""
    usual = TrialConfig()
    # The sizes of the default family do not apply to another one.
    network = plain_of(config.network).model_copy(update={"family": usual.network.family})
    return usual.model_copy(update={"network": network})


def flattened(config: TrialConfig) -> dict[str, Any]:
    """Return every field by its dotted path."""
    found: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{path}.{key}" if path else key)
        else:
            found[path] = value

    walk(config.model_dump(mode="json", warnings=False), "")
    return found
