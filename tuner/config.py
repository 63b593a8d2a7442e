"""The study's configuration: the trial's sections, the search and the resources."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from model.config import TrialConfig
from physics.config import FrozenModel
from tuner.duration import parse_duration
from tuner.errors import ConfigError
from tuner.explain import did_you_mean, explain, field_paths
from tuner.population import refusal
from tuner.refusals import cost_refusal, sampler_refusal
from tuner.space import SearchSpace, Value, default_space, is_unsearchable, varies_images
from tuner.yamlfile import dump_yaml, parse_yaml, read_yaml

Section = TypeVar("Section", bound=BaseModel)

_SPACE_FIELDS = {"type", "low", "high", "log", "step", "choices"}
MEDIAN_OVER = 3  # trials that the median stopping rule needs for a decision
_MAX_JOINT = 4096  # joint choices of one section that are checked before a study starts


Sampler = Literal["tpe", "tpe-univariate", "random", "gp", "cmaes", "grid"]


class SearchConfig(FrozenModel):
    """The search: its space, sampler and scheduler, and when it ends."""

    trials: int = Field(
        16, ge=1, description="trials of the whole study; with pbt, successors count too"
    )
    time_budget: float | None = Field(
        None,
        gt=0,
        description="time for all trials, over all sessions: seconds, or for example 90m or 1h30m",
    )
    target: float | None = Field(
        None, description="end the study when a finished trial's objective is at or below this"
    )
    cost: Literal["flops"] | None = Field(
        None,
        description="second objective, operations of the network per scene; the study then has "
        "a Pareto front",
    )
    sampler: Sampler = Field(
        "tpe",
        description="tpe: multivariate; tpe-univariate: each parameter independently; gp: "
        "Gaussian process; cmaes: adapts numbers, draws categorical choices at "
        "random; grid: every point of a finite space",
    )
    warm_start: Path | None = Field(
        None, description="run folder of an earlier study from which the sampler learns"
    )
    startup_trials: int = Field(8, ge=0, description="random trials before the sampler learns")
    scheduler: Literal["asha", "asha-pausing", "hyperband", "median", "pbt", "none"] = Field(
        "asha",
        description="asha: stops trials that are not among the best at a rung; asha-pausing: "
        "trials wait at a rung and continue once they are among its best; "
        "hyperband: asha in several brackets, each of which begins to stop at a "
        "different rung; median: stops trials that are worse than the median of the "
        "others; pbt: successors of the best replace the worst of a population",
    )
    grace_epochs: int = Field(1, ge=1, description="epochs of every trial before it may be stopped")
    reduction_factor: int = Field(
        3, ge=2, description="one trial in this many continues at each rung"
    )
    least_chance: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="also stop a trial whose chance to end better than the best so far is below "
        "this, for example 0.05; 0: off",
    )
    population: int = Field(8, ge=2, description="pbt: members that are alive at a time")
    perturbation_epochs: int | None = Field(
        None, ge=1, description="pbt: epochs between two comparisons; null: a fifth of all"
    )
    quantile: float = Field(
        0.25,
        gt=0,
        le=0.5,
        description="pbt: share of the population that is replaced at each comparison",
    )
    full_epochs: int | None = Field(
        None, ge=1, description="epochs of the final training; null: as in the search"
    )
    promote: int = Field(
        0,
        ge=0,
        description="number of best configurations that are trained again at full budget after "
        "the search",
    )
    promote_seeds: int = Field(3, ge=1, description="seeds with which each of them is trained")
    include_base: bool = Field(True, description="try the configuration's own values first")
    enqueue: tuple[dict[str, Value], ...] = Field((), description="points to try first")
    storage: str | None = Field(
        None,
        description="database of the ledger, postgresql://USER@HOST/NAME, without the password; "
        "null: study.db in the run folder",
    )
    space: SearchSpace = Field(
        default_factory=default_space, description="searched parameters, by dotted path"
    )

    @field_validator("time_budget", mode="before")
    @classmethod
    def _units(cls, value: Any) -> Any:
        return parse_duration(value) if isinstance(value, str) else value

    @property
    def who_stops(self) -> str | None:
        """The fields that stop trials early, joined by "and"; None if none does."""
        who = [] if self.scheduler == "none" else [self.scheduler]
        return " and ".join(who + ["least_chance"] * bool(self.least_chance)) or None

    def moved_by_cmaes(self) -> list[str]:
        """Return the numeric parameters with more than one value, over which CMA-ES searches."""
        return [p for p, s in self.space.items() if s.type != "categorical" and s.size > 1]

    def milestones(self, epochs: int) -> list[int]:
        """Return the epochs after which PBT compares its population; empty for other schedulers."""
        if self.scheduler != "pbt":
            return []
        every = self.perturbation_epochs or math.ceil(epochs / 5)
        return list(range(every, epochs, every))

    @property
    def replaced(self) -> int:
        """Number of members replaced at each milestone."""
        return max(1, math.floor(self.quantile * self.population))

    def population_trials(self, epochs: int) -> int:
        """Return the number of trials of a population: its members and all their successors."""
        return self.population + self.replaced * len(self.milestones(epochs))

    @property
    def proposer(self) -> Sampler:
        """The sampler in effect: random if there are no more trials than the startup trials.

        A sampler that is warm-started from an earlier study begins with its trials instead.
        """
        knows = self.sampler == "grid" or self.warm_start is not None
        return self.sampler if knows or self.trials > self.startup_trials else "random"

    def planned_trials(self, epochs: int) -> int:
        """Return the number of trials without early end; with PBT, of whole populations."""
        if self.scheduler != "pbt":
            return self.trials
        whole = self.population_trials(epochs)
        return self.trials // whole * whole

    # Pydantic runs "before" validators in reverse order of definition.
    @field_validator("time_budget", "target", mode="before")
    @classmethod
    def _none_lifts(cls, value: Any) -> Any:
        return None if isinstance(value, str) and value.strip().lower() == "none" else value


class ResourcesConfig(FrozenModel):
    """The resources of a trial, and how many trials run in parallel."""

    gpus_per_trial: float | None = Field(
        None, ge=0, le=1, description="null: one GPU if there is one, else none"
    )
    cpus_per_trial: int | None = Field(None, ge=1, description="null: training.threads")
    concurrent: int | None = Field(
        None, ge=1, description="trials that run in parallel; null: as many as the cluster holds"
    )
    max_failures: int = Field(
        5,
        ge=0,
        description="machines that a trial may lose in a row without finishing an epoch in "
        "between; counted anew in every session",
    )
    storage: str | None = Field(
        None,
        description="folder or URI that all machines reach, for the checkpoints; null: the run "
        "folder",
    )
    device: Literal["auto", "cpu"] = Field(
        "auto",
        description="auto: a trial's GPU, or the CPU if it has none; cpu: the CPU, even if a "
        "GPU is reserved (to try out a cluster)",
    )


class StudyConfig(TrialConfig):
    """A study: the base configuration of its trials and how it is varied."""

    name: str = Field(
        "study",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the study and of its run folder",
    )
    search: SearchConfig = Field(default_factory=SearchConfig)
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig)

    # Not a field validator: its error would show the value, which may hold a password.
    @model_validator(mode="before")
    @classmethod
    def _storage_is_a_database(cls, data: Any) -> Any:
        search = data.get("search") if isinstance(data, Mapping) else None
        storage = search.get("storage") if isinstance(search, Mapping) else None
        if not isinstance(search, Mapping) or not isinstance(storage, str):
            return data
        from tuner.storage import parse_url

        try:
            url = parse_url(storage)
        except ValueError as error:
            raise ValueError(f"search.storage: {error}") from None
        return {**data, "search": {**search, "storage": url.render_as_string()}}

    @model_validator(mode="after")
    def _parts_suit_each_other(self) -> Self:
        for complaint in (sampler_refusal(self.search), cost_refusal(self.search), refusal(self)):
            if complaint is not None:
                raise ValueError(complaint)
        return self

    @model_validator(mode="after")
    def _points_lie_in_the_space(self) -> Self:
        for index, point in enumerate(self.search.enqueue):
            for path, value in point.items():
                field = f"search.enqueue[{index}].{path}"
                if path not in self.search.space:
                    hint = did_you_mean(path, self.search.space)
                    raise ValueError(f"{field}: is not in search.space{hint}")
                if not self.search.space[path].contains(value):
                    raise ValueError(f"{field}: {value!r} lies outside search.space[{path}]")
        return self

    def trial_config(self, params: Mapping[str, Value], seed: int) -> TrialConfig:
        """Return the configuration of one trial: the base with the parameters and seed set."""
        data = self.model_dump(include=set(TrialConfig.model_fields))
        images = self.network.spectra and self.data.keep_images
        own = {"data.keep_images": False} if images and varies_images(self.search.space) else {}
        for path, value in {**own, **params, "seed": seed}.items():
            _assign(data, path, value)
        try:
            return TrialConfig.model_validate(data)
        except ValidationError as error:
            raise ConfigError(explain(error, TrialConfig)) from error

    def base_point(self) -> dict[str, Value]:
        """Return the base configuration's values of searched parameters, if inside the space."""
        point: dict[str, Value] = {}
        for path, parameter in self.search.space.items():
            value = held_value(self, path)
            if parameter.contains(value):
                point[path] = value
        return point

    def replaced(self, changes: Mapping[str, Any]) -> StudyConfig:
        """Return a validated copy with dotted fields changed."""
        data = self.model_dump()
        for path, value in changes.items():
            _assign(data, path, value)
        return _validate(data, "configuration")

    def to_yaml(self) -> str:
        """Return the full resolved configuration; `load_study` reads it back unchanged."""
        return dump_yaml(self.model_dump(mode="json"))


def held_value(config: TrialConfig, path: str) -> Any:
    """Return the value of a configuration at a dotted path."""
    value: Any = config
    for part in path.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def plain_of(section: Section) -> Section:
    """Return a section of the same type at its defaults; required fields keep their values."""
    fields = type(section).model_fields
    return type(section)(**{n: getattr(section, n) for n, f in fields.items() if f.is_required()})


def _leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted paths of all values, including user-defined names (network.options)."""
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def load_study(path: Path | None, overrides: Sequence[str] = (), **options: Any) -> StudyConfig:
    """Read, override, resolve and check a study.

    Args:
        path: YAML file; None takes every default.
        overrides: `a.b=VALUE`, the value in YAML.
        **options: dotted fields with double underscores for dots
            (`search__trials=8`); None leaves the field alone.

    Raises:
        ConfigError: invalid configuration; one line with the field, its value and what is allowed.
    """
    data = read_yaml(path) if path else {}
    said = _override(data, overrides, options)
    study = _resolve(_validate(data, str(path) if path else "configuration", said))
    check_space(study)
    return study


def load_trial(
    data: Mapping[str, Any], overrides: Sequence[str] = (), **options: Any
) -> TrialConfig:
    """Load a trial's configuration from its saved form, with overrides like a study's."""
    changed = copy.deepcopy(dict(data))
    said = _override(changed, overrides, options)
    try:
        config = TrialConfig.model_validate(changed)
    except ValidationError as error:
        raise ConfigError(explain(error, TrialConfig, said=said)) from error
    if config.data.shards is None:
        return config
    changed["data"]["shards"] = config.data.shards.expanduser().resolve()
    return TrialConfig.model_validate(changed)


def flag_of(option: str) -> str:
    """Return the command-line flag of an option, such as `--epochs` of `training__epochs`."""
    name = {"data__shards": "data"}.get(option, option.rpartition("__")[2])
    return f"--{name.replace('_', '-')}"


def _override(
    data: dict[str, Any], overrides: Sequence[str], options: Mapping[str, Any]
) -> dict[str, str]:
    """Change fields in place; return the flag that changed each, by dotted path."""
    said: dict[str, str] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {override}: expected a.b=VALUE")
        value = parse_yaml(text, f"--set {override}")
        try:
            _assign(data, key.strip(), value)
        except ConfigError as error:
            raise ConfigError(f"--set: {error}") from error
        said[key.strip()] = "--set"
    for option, value in options.items():
        if value is not None:
            _assign(data, option.replace("__", "."), value)
            said[option.replace("__", ".")] = flag_of(option)
    return said


def check_space(study: StudyConfig) -> None:
    """Reject a space with unknown fields or with values that cannot be built."""
    held = _leaves(study.model_dump(include=set(TrialConfig.model_fields)))
    fields = dict.fromkeys((*field_paths(TrialConfig), *held))
    known = [path for path in fields if not is_unsearchable(path)]
    space = study.search.space
    for path, parameter in space.items():
        field = f"search.space[{path}]"
        if is_unsearchable(path):
            raise ConfigError(f"{field}: may not be searched; it must be the same in every trial")
        if path not in known:
            raise ConfigError(f"{field}: names no searchable field{did_you_mean(path, known)}")
        for value in parameter.probes():
            _check_buildable(study, {path: value}, f"{field}: {value!r} is not allowed", alone=True)
    sections: dict[str, list[str]] = {}
    for path in space:
        sections.setdefault(path.rpartition(".")[0], []).append(path)
    for paths in sections.values():
        for point in _joint_points(space, paths):
            named = ", ".join(f"{path}={value!r}" for path, value in point.items())
            _check_buildable(study, point, f"search.space: {named} cannot be built")


def _joint_points(space: SearchSpace, paths: list[str]) -> Iterator[dict[str, Value]]:
    """Yield every joint choice in one section, as rules between fields apply within a section.

    If there are too many, yield a subset in which each parameter takes all its values equally
    often.
    """
    probes = [space[path].probes() for path in paths]
    if math.prod(len(values) for values in probes) <= _MAX_JOINT:
        for values in product(*probes):
            yield dict(zip(paths, values, strict=True))
        return
    shuffled = random.Random(0)
    n_points = max(_MAX_JOINT, *map(len, probes))
    columns = [list(islice(cycle(values), n_points)) for values in probes]
    for column in columns:
        shuffled.shuffle(column)
    for values in zip(*columns, strict=True):
        yield dict(zip(paths, values, strict=True))


def _check_buildable(
    study: StudyConfig, point: dict[str, Value], complaint: str, *, alone: bool = False
) -> None:
    # A value may be valid only with another field's value (a width that the base's heads do not
    # divide): a single field is checked by its own rules only, and joint choices of a section by
    # all rules.
    try:
        built = study.trial_config(point, study.seed)
    except ConfigError as error:
        if alone and not _blames_field(error, next(iter(point))):
            return
        raise ConfigError(f"{complaint}: {error}") from error
    for path, value in point.items():
        held = held_value(built, path)
        if held != value or isinstance(held, bool) != isinstance(value, bool):
            raise ConfigError(f"{complaint}: the field would hold {held!r}")


def _blames_field(error: ConfigError, path: str) -> bool:
    return str(error).startswith(path + ":")


def _validate(
    data: dict[str, Any], source: str, said: Mapping[str, str] | None = None
) -> StudyConfig:
    try:
        return StudyConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, StudyConfig, source, said)) from error


def _resolve(study: StudyConfig) -> StudyConfig:
    """Fill in derived fields: threads and absolute paths."""
    changes: dict[str, Any] = {}
    cpus = study.resources.cpus_per_trial
    if cpus is None:
        changes["resources.cpus_per_trial"] = study.training.threads
    elif cpus != study.training.threads:
        changes["training.threads"] = cpus
    if study.data.shards is not None:
        changes["data.shards"] = study.data.shards.expanduser().resolve()
    storage = study.resources.storage
    if storage is not None and "://" not in storage:
        changes["resources.storage"] = str(Path(storage).expanduser().resolve())
    if study.search.warm_start is not None:
        changes["search.warm_start"] = study.search.warm_start.expanduser().resolve()
    return study.replaced(changes) if changes else study


def _assign(data: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted path in nested mappings; keys that contain dots are recognised."""
    *parents, last = _split(data, path)
    here = data
    for part in parents:
        child = here.get(part)
        if child is None:
            child = here[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{path}: {part} holds {child!r}, which has no fields")
        here = child
    here[last] = value


def _split(data: Mapping[str, Any], path: str) -> list[str]:
    """Split at dots, but not within existing keys that contain dots (as in search.space)."""
    parts = path.split(".")
    if parts[:2] != ["search", "space"] or len(parts) < 4:
        return parts
    section = data.get("search")
    space = section.get("space") if isinstance(section, dict) else None
    rest = ".".join(parts[2:])
    inside = parts[-1] in _SPACE_FIELDS and rest not in (space or {})
    return ["search", "space", rest.rpartition(".")[0], parts[-1]] if inside else [*parts[:2], rest]


if __name__ == "__main__":
    # `python -m tuner.config` runs this file as `__main__`; the command imports it by its name.
    from tuner.schema import main

    raise SystemExit(main())
