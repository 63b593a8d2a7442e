"""The samplers of a study: what each proposes, and that a resume changes nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import TrialState
from pydantic import TypeAdapter

from tests.tuner.support import FakeRun, run_here, tiny_study, write_study
from tuner.config import load_study
from tuner.errors import ConfigError
from tuner.records import PriorTrial
from tuner.samplers import SpaceTPESampler, UnivariateTPESampler, sampler_note
from tuner.space import SearchSpace, suggest
from tuner.study import Ledger

NUMBERS: dict[str, Any] = {
    "blend.beta": {"type": "float", "low": 0.0, "high": 0.6},
    "blend.shrinkage": {"type": "float", "low": 0.0, "high": 0.6},
}
HEADS: dict[str, Any] = {"network.heads": {"type": "categorical", "choices": [1, 2, 4]}}
STEPS: dict[str, Any] = {
    "blend.beta": {"type": "float", "low": 0.1, "high": 0.4, "step": 0.1},
    "network.depth": {"type": "int", "low": 1, "high": 3, "step": 2},
}


def ledger_in(folder: Path, *prior: PriorTrial, **search: Any) -> Ledger:
    folder.mkdir(exist_ok=True)
    study = tiny_study(folder, search=search)
    return Ledger(folder / "study.db", study, lambda: prior)


def propose(ledger: Ledger, count: int) -> list[dict[str, Any]]:
    """Trials that finish at once."""
    found = []
    for _ in range(count):
        trial = ledger.ask()
        assert trial is not None
        ledger.finish(trial.number, "done", objective=distance(trial.params))
        found.append(trial.params)
    return found


def distance(params: dict[str, Any]) -> float:
    """To the best, which is at 0.2, 0.2."""
    return abs(params["blend.beta"] - 0.2) + abs(params.get("blend.shrinkage", 0.2) - 0.2)


@pytest.mark.parametrize(
    ("sampler", "sessions"),
    [pytest.param("gp", (3, 2, 2), marks=pytest.mark.slow), ("cmaes", (3, 6, 3))],
)
def test_a_resume_continues_what_the_sampler_would_have_proposed(
    tmp_path: Path, sampler: str, sessions: tuple[int, ...]
) -> None:
    changes = {"sampler": sampler, "trials": 12, "startup_trials": 2, "space": NUMBERS | HEADS}
    ledger = ledger_in(tmp_path / "whole", **changes)
    whole = propose(ledger, sum(sessions))
    if sampler == "cmaes":
        generations = {t.system_attrs.get("cma:generation") for t in ledger.optuna_study.trials}
        assert {0, 1} <= generations, "its distribution was never carried over"
    cut = []
    for count in sessions:  # each ends with a trial that the next one goes on with
        ledger = ledger_in(tmp_path / "cut", **changes)
        for trial in ledger.orphans():
            ledger.report(trial.number, {"epoch": 1, "objective": distance(trial.params)})
            ledger.finish(trial.number, "done", objective=distance(trial.params))
            cut.append(trial.params)
        cut += propose(ledger, count - 1)
        assert ledger.ask() is not None
        ledger.close()
    cut += [trial.params for trial in ledger.orphans()]
    assert cut == whole
    assert len({repr(params) for params in whole}) == len(whole)


def test_a_gaussian_process_closes_in_on_the_best(tmp_path: Path) -> None:
    changes = {"sampler": "gp", "trials": 12, "startup_trials": 4, "space": NUMBERS}
    found = propose(ledger_in(tmp_path, **changes), 12)
    assert min(distance(params) for params in found[-4:]) < 0.1, "chance alone is at 0.3 on average"


@pytest.mark.parametrize("known", [1, 4, 9])
def test_cma_es_begins_at_the_best_of_few_earlier_trials(tmp_path: Path, known: int) -> None:
    """Of fewer than ten there is no best tenth, which Optuna would want."""
    prior = [
        PriorTrial(
            f"x#{i}",
            {"blend.beta": 0.55 - i / 20, "blend.shrinkage": 0.02 + i / 40, "network.heads": 2},
            1.0 + i,
        )
        for i in range(known)
    ]
    changes = {
        "sampler": "cmaes", "trials": 12, "startup_trials": 1, "include_base": False,
        "space": NUMBERS | HEADS,
    }  # fmt: skip
    found = propose(ledger_in(tmp_path, *prior, **changes), 12)[1:5]
    assert sum(p["blend.beta"] for p in found) / 4 > 0.4, "from the middle it is 0.3"


def test_a_gaussian_process_without_a_start_waits_for_one_trial(tmp_path: Path) -> None:
    changes = {
        "sampler": "gp", "trials": 4, "startup_trials": 0, "include_base": False, "space": NUMBERS
    }  # fmt: skip
    ledger = ledger_in(tmp_path, **changes)
    side_by_side = [ledger.ask(), ledger.ask()]
    assert all(trial is not None for trial in side_by_side)
    for trial in side_by_side:
        assert trial is not None
        ledger.finish(trial.number, "failed", reason="diverged")
    assert len(propose(ledger, 2)) == 2


def test_a_gaussian_process_does_not_propose_again_what_failed(tmp_path: Path) -> None:
    space = {
        "training.learning_rate": {"type": "categorical", "choices": [1e-3, 1e29, 1e30]},
        "blend.beta": {"type": "float", "low": 0.0, "high": 0.6},
    }
    changes = {"sampler": "gp", "trials": 16, "startup_trials": 4, "space": space}
    ledger = ledger_in(tmp_path, **changes)
    while (trial := ledger.ask()) is not None:
        if trial.params["training.learning_rate"] > 1.0:
            ledger.finish(trial.number, "failed", reason="diverged: loss is nan")
        else:
            off = trial.params["blend.beta"] - 0.31
            ledger.finish(trial.number, "done", objective=1.0 + 10.0 * off**2)
    failed = {trial.number for trial in ledger.trials() if trial.state == "failed"}
    again = [t.user_attrs.get("duplicate_of") for t in ledger.optuna_study.trials]
    assert sum(number in failed for number in again) <= 1
    proposed = [t.params["training.learning_rate"] for t in ledger.trials()[8:]]
    assert sum(rate > 1.0 for rate in proposed) <= 2, "two in three are, by chance"


def test_cma_es_begins_where_an_earlier_study_was_good(tmp_path: Path) -> None:
    prior = [
        PriorTrial(
            f"x#{i}",
            {"blend.beta": 0.5 + i / 200, "blend.shrinkage": 0.1 + i / 200, "network.heads": 2},
            1.0 + i,
        )
        for i in range(10)
    ]
    changes = {"sampler": "cmaes", "trials": 5, "include_base": False, "space": NUMBERS | HEADS}
    found = propose(ledger_in(tmp_path, *prior, **changes), 5)
    assert sum(p["blend.beta"] for p in found) / 5 > 0.4, "from the middle it is 0.3"
    assert sum(p["blend.shrinkage"] for p in found) / 5 < 0.2


def test_a_grid_has_every_point_once_whatever_was_enqueued_and_however_often_cut(
    tmp_path: Path,
) -> None:
    enqueued = [{"blend.beta": 0.1 + 2 * 0.1, "network.depth": 3}]  # 0.30000000000000004
    changes = {"sampler": "grid", "trials": 99, "space": STEPS, "enqueue": enqueued}
    found = propose(ledger_in(tmp_path, **changes), 3)
    found += propose(ledger_in(tmp_path, **changes), 5)
    ledger = ledger_in(tmp_path, **changes)
    assert ledger.ask() is None
    assert not ledger.has_work
    points = sorted((round(p["blend.beta"], 9), p["network.depth"]) for p in found)
    assert points == [(beta / 10, depth) for beta in (1, 2, 3, 4) for depth in (1, 3)]
    assert len(ledger.trials()) == len(ledger.optuna_study.trials), "points were proposed twice"


def test_a_grid_study_ends_when_every_point_has_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tuner.local.TrialRun", FakeRun)
    monkeypatch.setattr("tuner.conclusion._score_winner", lambda folder, study, progress: None)
    space = {"blend.beta": STEPS["blend.beta"]}
    config = write_study(tmp_path, search={"sampler": "grid", "space": space, "scheduler": "none"})
    out = tmp_path / "run"
    asked = ("--config", config, "--local", "--out", out)
    assert run_here(*asked, "--trials", 3) == 0
    assert "sampler grid: 4 points, of which 3 will run" in capsys.readouterr().out
    assert run_here("--resume", out, "--local", "--trials", 9) == 0
    ledger = Ledger(out / "study.db", load_study(out / "config.yaml"))
    assert sorted(t.params["blend.beta"] for t in ledger.trials()) == [0.1, 0.2, 0.3, 0.4]  # type: ignore[type-var]
    assert run_here("--resume", out, "--address", "127.0.0.1:1") == 0
    assert "nothing is left to run: every point of search.space has run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sampler", "space", "said"),
    [
        ("grid", NUMBERS, r"search.sampler: grid needs a finite space, and blend.beta is a float"),
        (
            "grid",
            {"training.max_skipped_steps":
             {"type": "int", "low": 1, "high": 200_000}},
            r"grid has 200000 points in this space, more than 100000",
        ),
        ("cmaes", HEADS, r"search.sampler: cmaes needs two or more float or int .* which has 0"),
    ],
)  # fmt: skip
def test_a_sampler_that_does_not_suit_the_space_is_refused(
    tmp_path: Path, sampler: str, space: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        tiny_study(tmp_path, search={"sampler": sampler, "space": space})


@pytest.mark.parametrize(("trials", "said"), [(300, False), (301, True)])
def test_that_a_gaussian_process_is_slow_with_many_trials_is_said(
    tmp_path: Path, trials: int, said: bool
) -> None:
    study = tiny_study(tmp_path, search={"sampler": "gp", "trials": trials})
    assert (sampler_note(study.search) is not None) == said
    assert sampler_note(study.replaced({"search.space": HEADS}).search) is None, "it ends soon"


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes"])
def test_that_a_sampler_proposes_nothing_is_said(tmp_path: Path, sampler: str) -> None:
    search = {"sampler": sampler, "trials": 6, "startup_trials": 6, "space": NUMBERS}
    study = tiny_study(tmp_path, search=search)
    said = f"sampler {sampler}: proposes none of 6 trials, as the first 6 are drawn at random"
    assert said in str(sampler_note(study.search))
    more = study.replaced({"search.trials": 7})
    assert "proposes none" not in str(sampler_note(more.search))
    chance = study.replaced({"search.sampler": "random"})
    assert sampler_note(chance.search) is None
    taught = study.replaced({"search.warm_start": str(tmp_path)})
    assert "proposes none" not in str(sampler_note(taught.search))


def test_what_cma_es_leaves_to_chance_is_said(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, search={"sampler": "cmaes", "space": NUMBERS | HEADS})
    note = str(sampler_note(study.search))
    assert "sampler cmaes: moves blend.beta, blend.shrinkage" in note
    assert "leaves categorical parameters to chance: network.heads" in note
    assert "not from those that are stopped" in note
    nobody = study.replaced({"search.scheduler": "none"})
    assert "that are stopped" not in str(sampler_note(nobody.search))
    by_chance = nobody.replaced({"search.least_chance": 0.05})
    assert "that are stopped" in str(sampler_note(by_chance.search))
    assert sampler_note(tiny_study(tmp_path).search) is None


SPACE = TypeAdapter(SearchSpace).validate_python(
    NUMBERS | HEADS | STEPS | {"network.width": {"type": "int", "low": 8, "high": 8}}
)


def proposed(sampler_of: Callable[[int], BaseSampler]) -> list[dict[str, Any]]:
    """Of 40 trials, some finished, some stopped, some running; differing proposals mostly."""
    study = optuna.create_study(direction="minimize")
    found = []
    for number in range(40):
        study.sampler = sampler_of(number)
        trial = study.ask()
        found.append(params := suggest(SPACE, trial))
        if number % 3:
            trial.report(distance(params), 1)
            study.tell(trial, state=TrialState.PRUNED)
        elif number % 5:  # the others stay running
            study.tell(trial, distance(params))
    assert len({repr(params) for params in found}) > 30
    return found


def test_tpe_over_the_known_space_proposes_what_optunas_tpe_does() -> None:
    ours = proposed(lambda number: SpaceTPESampler(SPACE, seed=number, n_startup_trials=4))
    assert ours == proposed(lambda number: TPESampler(seed=number, n_startup_trials=4))


def test_univariate_tpe_proposes_what_optunas_does_one_parameter_after_the_other() -> None:
    class ByName(TPESampler):
        """Optuna's, which takes the parameters in the order in which they are asked for."""

        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            return known

        def sample_relative(self, study: Any, trial: Any, space: Any) -> Any:
            ended = (TrialState.COMPLETE, TrialState.PRUNED)
            if len(study.get_trials(deepcopy=False, states=ended)) < 4:
                return {}  # by chance, in the space's order
            return {
                name: self.sample_independent(study, trial, name, distribution)
                for name, distribution in space.items()
            }

    known = UnivariateTPESampler(SPACE, seed=0, n_startup_trials=4)._known
    ours = proposed(lambda number: UnivariateTPESampler(SPACE, seed=number, n_startup_trials=4))
    theirs = proposed(lambda n: ByName(seed=n, n_startup_trials=4, multivariate=False))
    assert ours == theirs
    joint = proposed(lambda number: SpaceTPESampler(SPACE, seed=number, n_startup_trials=4))
    assert ours != joint


@pytest.mark.parametrize("sampler", ["tpe", "tpe-univariate"])
def test_with_two_objectives_it_proposes_too(tmp_path: Path, sampler: str) -> None:
    search = {"sampler": sampler, "cost": "flops", "scheduler": "none", "startup_trials": 3}
    study = tiny_study(tmp_path, search={"trials": 9, **search})
    ledger = Ledger(tmp_path / "study.db", study)
    for _ in range(9):
        found = ledger.ask()
        assert found is not None
        metrics = {"epoch": 1, "objective": distance(found.params), "flops": 10.0}
        ledger.report(found.number, metrics)
        ledger.finish(found.number, "done", objective=distance(found.params))
    assert len({repr(trial.params) for trial in ledger.trials()}) == 9
