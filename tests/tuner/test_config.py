from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model.config import TrialConfig
from tests.tuner.support import tiny_study, write_study
from tuner.config import load_study, load_trial
from tuner.errors import ConfigError

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads(path: Path) -> None:
    study = load_study(path)
    assert study.search.space
    assert study.base_point(), "the configuration's own values lie outside its search space"


def test_a_saved_configuration_reads_back_equal(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, training={"learning_rate": 1 / 3000})
    saved = tmp_path / "config.yaml"
    saved.write_text(study.to_yaml())
    assert load_study(saved) == study


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.epoch=3", ["training.epoch: unknown field", "did you mean epochs"]),
        ("trainin.epochs=3", ["trainin: unknown field", "did you mean training"]),
        ("epochs=3", ["epochs: unknown field (did you mean training.epochs?)"]),
        ("nothing_of_that=3", ["nothing_of_that: unknown field; known here: array, blend"]),
        ("training.epochs=0", ["training.epochs: got 0", "greater than or equal to 1"]),
        ("training.epochs=2.5", ["training.epochs: got 2.5", "integer"]),
        ("scene.azimuth_deg=-50,50", ["scene.azimuth_deg: got '-50,50'", "a list, such as [1, 2]"]),
        ("scene=3", ["scene: got 3; expected fields with values"]),
        ("search.space.network.width=8", ["got 8; expected a kind and its values", "{type: float"]),
        ("training.learning_rate=fast", ["training.learning_rate: got 'fast'", "number"]),
        ("training.learning_rate=.nan", ["training.learning_rate: got nan", "finite"]),
        (
            "search.sampler=tree",
            ["search.sampler: got 'tree'", "'tpe', 'tpe-univariate', 'random', 'gp'"],
        ),
        ("resources.gpus_per_trial=2", ["resources.gpus_per_trial: got 2", "less than or equal"]),
        ("network.heads=3", ["network", "width 8 is not a multiple of heads 3"]),
        ("training=5", ["training: got 5"]),
        ("name=a/b", ["name: got 'a/b'"]),
        ("seed", ["expected a.b=VALUE"]),
        ("seed=[", ["--set seed=[", "not valid YAML"]),
    ],
)
def test_an_error_names_the_field_what_it_held_and_what_is_allowed(
    tmp_path: Path, override: str, said: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_study(write_study(tmp_path), [override])
    message = str(caught.value)
    assert "\n" not in message
    for words in said:
        assert words in message


@pytest.mark.parametrize(
    ("overrides", "options", "complaint"),
    [
        (["training.learning_rate=-1"], {}, "--set: training.learning_rate: got -1; "),
        ([], {"search__trials": 0}, "--trials: search.trials: got 0; "),
        ([], {"resources__cpus_per_trial": 0}, "--cpus-per-trial: resources.cpus_per_trial: got 0"),
        ([], {"data__shards": 3}, "--data: data.shards: got 3; "),
        (["network={family: foo}"], {}, "--set: network.family: got 'foo'; expected one of 'snap"),
        (["network.family=foo"], {}, "--set: network.family: got 'foo'; expected one of 'snap"),
        (["search.space.blend.beta.type=flat"], {}, "--set: search.space[blend.beta].type: got "),
        (["network.heads=3"], {}, "{path} with --set: network: width 8 is not a multiple"),
        (["network.family=image"], {}, "{path} with --set: network.heads: unknown field"),
        (["trainig.epochs=3"], {}, "--set: trainig: unknown field (did you mean training?)"),
        (["training.epochs.x=3"], {}, "--set: training.epochs.x: epochs holds 2"),
    ],
)
def test_an_error_blames_what_gave_the_value(
    tmp_path: Path, overrides: list[str], options: dict[str, Any], complaint: str
) -> None:
    path = write_study(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_study(path, overrides, **options)
    assert str(caught.value).startswith(complaint.format(path=path))


def test_an_item_that_fits_no_branch_of_a_union_is_one_problem(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_study(write_study(tmp_path), ["search.space.network.heads.choices=[[1]]", "seed=-1"])
    text = str(caught.value)
    assert text.count("choices[0]") == 1, text
    assert "seed: got -1" in text
    assert "more)" not in text


def test_several_problems_are_told_at_once_each_with_who_gave_it(tmp_path: Path) -> None:
    path = write_study(tmp_path, training={"epochs": -1}, loss={"cov_pred": "much"})
    with pytest.raises(ConfigError) as caught:
        load_study(path, ["seed=-1"], search__trials=0)
    text = str(caught.value)
    assert f"{path}: loss.cov_pred: got 'much'" in text
    assert "; training.epochs: got -1" in text
    assert "--set: seed: got -1" in text
    assert text.endswith(" (and 1 more)")
    assert "\n" not in text


def test_an_override_wins_over_the_file_and_reads_yaml(tmp_path: Path) -> None:
    study = load_study(
        write_study(tmp_path),
        ["training.learning_rate=1e-4", "scene.snr_db=[0, 5]", "training.patience=null"],
    )
    assert study.training.learning_rate == 1e-4
    assert study.scene.snr_db == (0.0, 5.0)
    assert study.training.patience is None


def test_a_time_budget_has_units_and_none_lifts_it(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path), ["search.time_budget=1h30m"], search__target="0.5")
    assert (study.search.time_budget, study.search.target) == (5400.0, 0.5)
    lifted = study.replaced({"search.time_budget": "none", "search.target": "none"})
    assert (lifted.search.time_budget, lifted.search.target) == (None, None)


def test_an_override_reaches_into_the_search_space(tmp_path: Path) -> None:
    study = load_study(
        write_study(tmp_path),
        [
            "search.space.training.learning_rate.low=1e-3",
            "search.space.network.dropout={type: float, low: 0.0, high: 0.1}",
        ],
    )
    assert study.search.space["training.learning_rate"].low == 1e-3  # type: ignore[union-attr]
    assert "network.dropout" in study.search.space


def test_options_of_the_command_line_win_and_none_leaves_the_field_alone(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path), search__trials=7, training__epochs=None)
    assert study.search.trials == 7
    assert study.training.epochs == 2


def test_cpus_of_a_trial_are_its_threads(tmp_path: Path) -> None:
    assert tiny_study(tmp_path, training={"threads": 2}).resources.cpus_per_trial == 2
    assert tiny_study(tmp_path, resources={"cpus_per_trial": 2}).training.threads == 2


def test_a_relative_data_folder_is_made_absolute(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path), data__shards=Path("somewhere"))
    assert study.data.shards == Path.cwd() / "somewhere"


def test_a_trials_configuration_takes_its_parameters_and_seed(tmp_path: Path) -> None:
    study = tiny_study(tmp_path)
    trial = study.trial_config({"training.learning_rate": 2e-3, "network.heads": 4}, seed=9)
    assert type(trial) is TrialConfig
    assert (trial.training.learning_rate, trial.network.heads, trial.seed) == (2e-3, 4, 9)
    assert trial.scene == study.scene


def test_points_tried_first_must_lie_in_the_space(tmp_path: Path) -> None:
    outside: list[dict[str, Any]] = [{"blend.beta": 0.9}]
    with pytest.raises(ConfigError, match=r"search.enqueue\[0\].blend.beta: 0.9 lies outside"):
        tiny_study(tmp_path, search={"enqueue": outside})
    with pytest.raises(ConfigError, match=r"blend.bet.*did you mean blend.beta"):
        tiny_study(tmp_path, search={"enqueue": [{"blend.bet": 0.1}]})


def test_a_saved_trial_can_be_overridden(tmp_path: Path) -> None:
    saved = tiny_study(tmp_path).trial_config({}, seed=1).model_dump(mode="json")
    trial = load_trial(saved, ["training.epochs=5"], seed=2)
    assert (trial.training.epochs, trial.seed) == (5, 2)
    with pytest.raises(ConfigError, match=r"training.epochs: got 0"):
        load_trial(saved, training__epochs=0)
