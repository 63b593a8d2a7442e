from __future__ import annotations

import csv
import html
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from model import Localizer, Trainer
from model.checkpoint import export_best
from physics import (
    Detections,
    PlanarArray,
    SceneConfig,
    TikhonovConfig,
    nomp,
    scene_crb,
    simulate,
)
from physics.fit import Measurement, normal_equations, position_of
from physics.metrics import match
from tests.tiny import TINY, tiny_config
from tests.tuner.support import run
from tuner import evaluation_page
from tuner.command import execute
from tuner.config import load_study
from tuner.evaluate import app
from tuner.evaluation import evaluate_suite, evaluation_of, suite_scenes, write_evaluation
from tuner.scoreboard import (
    Truth,
    classical_estimators,
    network_estimators,
)
from tuner.scoretable import print_tables
from tuner.suites import SUITES
from tuner.yamlfile import dump_yaml


def evaluate(*arguments: object) -> int:
    return execute(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """best/ of a short training."""
    folder = tmp_path_factory.mktemp("network")
    trainer = Trainer(tiny_config())
    trainer.run_epoch()
    trainer.save(folder / "checkpoint")
    export_best(folder / "checkpoint", folder / "best")
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "tiny.yaml"
    path.write_text(dump_yaml(TINY | {"name": "tiny"}))
    return path


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_changes_what_it_says(name: str) -> None:
    suite, configured = SUITES[name], SceneConfig(dropout=0.2, error_levels="varied")
    scene = suite.scene(configured)
    for key, value in suite.changes.items():
        assert getattr(scene, key) == value
    assert (scene == configured) == (name == "nominal")
    scenes = simulate(3, scene, suite.array(PlanarArray()))
    assert torch.isfinite(torch.view_as_real(scenes.y)).all()
    other = suite.scene(SceneConfig(wavefront="fresnel", true_wavefront="spherical"))
    if suite.told:
        assert other.true_wavefront is None, "those who are told are told of all"
    many = SUITES["many"].scene(SceneConfig(max_sources=2))
    assert (many.min_sources, many.max_sources) == (4, 5)


def test_a_wrong_model_costs_the_classical_estimators(study: Path) -> None:
    """NOMP believes in perfect elements: phases off by 20 degrees cost it sources.

    Fewer where it is not told the SNR: what the model misses counts as noise then.
    """
    config, methods = tiny_config(scene={"snr_db": (20.0, 20.0)}), ["nomp", "nomp-blind"]
    f1 = {}
    for name in ("nominal", "phase-error"):
        content = evaluate_suite(name, config, None, n_scenes=128, methods=methods, say=len)
        f1[name] = {m: report["overall"]["f1"] for m, report in content["methods"].items()}
    assert f1["phase-error"]["nomp"] < f1["nominal"]["nomp"] - 0.02
    assert f1["phase-error"]["nomp-blind"] > f1["phase-error"]["nomp"]


def test_estimators_told_nothing_of_waves_keep_the_configured_ones() -> None:
    """A network's own convention stays the belief, but a told suite is believed."""
    config = tiny_config(scene={"wavefront": "paraxial", "source_mode": "constant"})
    content = evaluate_suite("nominal", config, None, n_scenes=32, methods=["nomp"], say=len)
    assert content["methods"]["nomp"]["overall"]["f1"] > 0.3
    told = evaluate_suite("origin-paraxial", tiny_config(), None, n_scenes=32, say=len)
    assert told["methods"]["nomp"]["overall"]["f1"] > 0.3


def test_the_help_names_every_suite_method_and_number(capsys: pytest.CaptureFixture[str]) -> None:
    from tuner import evaluate as command
    from tuner.evaluation import DEFAULT_SCENES

    assert evaluate("--help") == 0
    shown = set(re.findall(r"[\w+-]+", capsys.readouterr().out))
    config = tiny_config()
    asked = config.array.build(), config.scene, config.tikhonov
    methods = {each.name for each in classical_estimators(*asked, snr_known=True)}
    assert shown >= {*SUITES, *methods, "network", "network+refinement"}
    assert command._SCENES == DEFAULT_SCENES


def test_a_network_and_its_refinement_stand_beside_the_classical_ones(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "result.json"
    arguments = ("--checkpoint", network / "best", "--scenes", 48, "--device", "cpu", "--out", out)
    assert evaluate(*arguments) == 0
    shown = capsys.readouterr().out
    content = json.loads(out.read_text())
    methods = content["suites"]["nominal"]["methods"]
    classical = ["music", "mvdr", "somp", "nomp", "nomp-dense", "nomp-blind"]
    assert list(methods) == ["network", "network+refinement", *classical]
    for name, report in methods.items():
        assert name in shown
        assert report["scenes_per_second"] > 0
        assert report["overall"]["scenes"] == 48
    assert set(methods["network+refinement"]["overall"]["coverage"]) == {"0.5", "0.9", "0.95"}
    assert list(content["suites"]["nominal"]["paired_f1"]) == ["nomp"]
    paired = content["suites"]["nominal"]["paired_f1"]["nomp"]
    assert set(paired) == set(methods) - {"nomp"}
    for name, difference in paired.items():
        expected = methods[name]["overall"]["f1"] - methods["nomp"]["overall"]["f1"]
        assert difference["difference"] == pytest.approx(expected)
        low, high = difference["interval"]
        assert low <= expected <= high
        cost = content["suites"]["nominal"]["paired_gospa_m"]["nomp"][name]
        expected = methods[name]["overall"]["gospa_m"] - methods["nomp"]["overall"]["gospa_m"]
        assert cost["difference"] == pytest.approx(expected)
        assert cost["interval"][0] <= expected <= cost["interval"][1]
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    assert {row["group"] for row in rows} == {"overall", "snr_db", "n_sources", "range_m"}
    overall = next(r for r in rows if r["method"] == "nomp" and r["group"] == "overall")
    assert float(overall["f1"]) == methods["nomp"]["overall"]["f1"]
    page = out.with_suffix(".html").read_text()
    assert page.count("class='plot'") >= 7
    assert "NaN" not in out.read_text()
    # The same command gives the same scores; only the speeds differ.
    again = tmp_path / "again.json"
    assert evaluate(*arguments[:-1], again) == 0
    second = json.loads(again.read_text())["suites"]["nominal"]["methods"]
    for name, report in methods.items():
        assert report["overall"] == second[name]["overall"]
    other = tmp_path / "other.json"
    assert evaluate(*arguments[:-1], other, "--seed", 9, "--method", "nomp") == 0
    third = json.loads(other.read_text())["suites"]["nominal"]["methods"]
    assert third["nomp"]["overall"] != methods["nomp"]["overall"]
    assert list(third) == ["nomp"]


def test_test_scenes_are_none_that_a_training_or_validation_draws() -> None:
    from model.data import open_source

    config = tiny_config()
    source = open_source(config, torch.device("cpu"))
    drawn, _ = suite_scenes(config, SUITES["nominal"], config.array.build(), 64)
    seen = [source.validation(), *source.train_batches(0, 16, 0)]
    known = {row.numpy().tobytes() for batch in seen for row in batch.scenes.y}
    assert not any(row.numpy().tobytes() in known for row in drawn.y)


def test_fewer_recorded_scenes_than_there_are_stand_for_all_of_a_sorted_file(
    origin_shards: Path,
) -> None:
    config = load_study(
        Path(__file__).parents[2] / "configs" / "origin-shards.yaml", data__shards=origin_shards
    )
    array, suite = config.array.build(), SUITES["nominal"]
    whole, said = suite_scenes(config, suite, array, None)
    assert "drawn" not in said
    few, said = suite_scenes(config, suite, array, 6)
    assert f"6 of {origin_shards.resolve()}" in said
    assert f"drawn from {len(whole)}" in said
    rows = [row.numpy().tobytes() for row in whole.y]
    places = [rows.index(row.numpy().tobytes()) for row in few.y]
    assert places == sorted(set(places))
    assert max(places) > len(whole) // 2, "not the first ones"
    again, _ = suite_scenes(config, suite, array, 6)
    assert torch.equal(again.y, few.y)


def test_the_classical_estimators_are_scored_on_shards(origin_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards.json"
    config = Path(__file__).parents[2] / "configs" / "origin-shards.yaml"
    assert evaluate("--config", config, "--data", origin_shards, "--out", out) == 0
    suite = json.loads(out.read_text())["suites"]["nominal"]
    assert "24 of" in suite["scenes"]
    overall = suite["methods"]["nomp"]["overall"]
    # F1 0.79 and 20 of 24 counts; the bounds are some three standard deviations of 24 scenes off
    assert overall["f1"] > 0.6
    assert overall["count_accuracy"] > 0.5
    assert overall["f1"] > suite["methods"]["music"]["overall"]["f1"]


def test_unknown_snr_is_told_to_nobody(study: Path, tmp_path: Path) -> None:
    results = {}
    for flag in ([], ["--unknown-snr"]):
        out = tmp_path / f"{len(flag)}.json"
        assert evaluate("--config", study, "--scenes", 40, "--out", out, *flag) == 0
        results[len(flag)] = json.loads(out.read_text())
    assert (results[0]["snr"], results[1]["snr"]) == ("known", "unknown")
    told, untold = (results[n]["suites"]["nominal"]["methods"] for n in (0, 1))
    assert set(told) - set(untold) == {"nomp-blind"}  # who would be NOMP once more
    assert told["nomp-blind"]["overall"] == untold["nomp"]["overall"] != told["nomp"]["overall"]
    assert told["somp"]["overall"] == untold["somp"]["overall"]
    estimate = results[1]["suites"]["nominal"]["snr_estimate"]
    assert estimate["scenes"] + estimate["without_estimate"] == 40
    assert estimate["without_estimate"] <= 4
    assert math.isfinite(estimate["median_absolute_error_db"])


@pytest.mark.parametrize("known", [0, 6])
def test_recorded_scenes_of_unknown_snr_are_scored(tmp_path: Path, known: int) -> None:
    from model import write_shards

    config = tiny_config(data={"shards": tmp_path / "data"})
    array = config.array.build()
    for name, seed in (("train", 1), ("test", 2)):
        scenes = simulate(12, config.scene, array, generator=torch.Generator().manual_seed(seed))
        scenes = replace(
            scenes, snr_db=scenes.snr_db.index_fill(0, torch.arange(known, 12), math.nan)
        )
        write_shards(tmp_path / "data", name, scenes, array, config.scene.wavefront)
    suite = evaluate_suite("nominal", config, None, say=lambda text: None)
    assert "some have no SNR, so no estimator is told one" in suite["scenes"]
    assert set(suite["methods"]) == {
        "music",
        "mvdr",
        "somp",
        "nomp",
        "nomp-dense",
    }  # nomp-blind is NOMP then
    counted = sum(band["scenes"] for band in suite["methods"]["nomp"]["by_snr"])
    assert counted == known
    assert (suite["gated_share"] > 0) == (known > 0)
    content = evaluation_of({"nominal": suite}, config, checkpoint=None)
    write_evaluation(tmp_path / "found.json", content)
    assert "F1 against SNR" in (tmp_path / "found.html").read_text()
    print_tables(suite, Console(file=io.StringIO()))


def test_whoever_is_named_is_compared_with(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "paired.json"
    options = ("--config", study, "--scenes", 24, "--method", "somp", "--method", "nomp")
    assert evaluate(*options, "--out", out) == 0
    alone = json.loads(out.read_text())["suites"]["nominal"]
    assert list(alone["paired_f1"]) == ["nomp"]
    capsys.readouterr()
    both = ("--reference", "somp", "--reference", "nomp", "--reference", "somp")
    assert evaluate(*options, *both, "--out", out) == 0
    shown = capsys.readouterr().out
    page = out.with_suffix(".html").read_text()
    for name in ("somp", "nomp"):
        assert f"less {name}'s" in shown
        assert html.unescape(page).count(f"less {name}'s [95 %]") == 2  # F1 and GOSPA
    paired = json.loads(out.read_text())["suites"]["nominal"]["paired_f1"]
    assert list(paired) == ["somp", "nomp"]
    assert paired["nomp"] == alone["paired_f1"]["nomp"]
    one, two = paired["somp"]["nomp"], paired["nomp"]["somp"]
    assert one["difference"] == -two["difference"]
    assert one["interval"] == pytest.approx([-end for end in reversed(two["interval"])])
    assert "somp" not in paired["somp"]
    content = json.loads(out.read_text())
    del content["suites"]["nominal"]["paired_gospa_m"]  # as an earlier version wrote it
    assert html.unescape(evaluation_page.page(content)).count("less nomp's [95 %]") == 1


def test_several_suites_make_one_result(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "suites.json"
    options = ("--config", study, "--scenes", 8, "--method", "nomp", "--out", out)
    assert evaluate(*options, "--suite", "near", "--suite", "many", "--suite", "near") == 0
    assert list(json.loads(out.read_text())["suites"]) == ["near", "many"]


def test_scenes_without_sources_are_scored_and_their_noise_is_told(tmp_path: Path) -> None:
    config = tiny_config(scene={"min_sources": 0, "max_sources": 1})
    content = evaluate_suite("nominal", config, None, n_scenes=80, say=len)
    rows = content["methods"]["nomp"]["by_k"]
    assert [row["n_sources"] for row in rows] == [0, 1]
    # A false alarm comes in a few per cent of the scenes.
    assert rows[0]["count_accuracy"] > 0.85
    with (tmp_path / "tables").open("w") as stream:
        print_tables(content, Console(file=stream, width=80))


@pytest.mark.parametrize("n_scenes", [1, 2])
def test_few_scenes_make_a_result_without_nan(n_scenes: int, tmp_path: Path) -> None:
    config = tiny_config(scene={"snr_db": (-15.0, -15.0)})
    found = evaluate_suite("nominal", config, None, n_scenes=n_scenes, say=len)
    content = {"checkpoint": None, "snr": "known", "suites": {"nominal": found}}
    write_evaluation(tmp_path / "few.json", content)  # json refuses NaN
    assert "NaN" not in (tmp_path / "few.json").read_text()


def test_estimators_that_are_told_no_snr_do_not_use_it(network: Path) -> None:
    localizer = Localizer.load(network / "best")
    array, scene = localizer.array, localizer.config.scene
    scenes = simulate(24, scene, array, generator=torch.Generator().manual_seed(4))
    lied_to = replace(scenes, snr_db=scenes.snr_db - 40.0)
    for known in (False, True):
        every = network_estimators(localizer, array, scene, snr_known=known)
        every += classical_estimators(array, scene, TikhonovConfig(), snr_known=known)
        for estimator in every:
            one, two = estimator.run(scenes)[0], estimator.run(lied_to)[0]
            same = torch.equal(one.present, two.present) and torch.equal(one.position, two.position)
            if not known or estimator.name in ("music", "mvdr", "somp", "nomp-blind"):
                assert same, estimator.name
            elif estimator.name == "nomp":
                assert not same


def test_refinement_moves_the_networks_positions_uphill(network: Path) -> None:
    localizer = Localizer.load(network / "best")
    array, scene = localizer.array, localizer.config.scene
    rough, refined = network_estimators(localizer, array, scene, snr_known=True)
    scenes = simulate(40, scene, array, generator=torch.Generator().manual_seed(4))
    before, after = rough.run(scenes)[0], refined.run(scenes)[0]
    assert torch.equal(before.count, after.count)

    def cost(found: Detections) -> torch.Tensor:
        m = Measurement.of(
            scenes.y, scenes.H, scenes.codes, array, scene.wavefront, scene.source_mode
        )
        return normal_equations(m, position_of(found.position), found.present)[0].cost

    assert (cost(after) <= cost(before) * (1 + 1e-4)).all()
    assert float((cost(after) / cost(before)).median()) < 0.99


def test_told_suites_are_judged_by_the_model_that_made_them() -> None:
    config = tiny_config()
    told = evaluate_suite("origin-paraxial", config, None, n_scenes=96, methods=["nomp"], say=len)
    suite, array = SUITES["origin-paraxial"], config.array.build()
    made_by, scene = suite.array(array), suite.scene(config.scene)
    drawn, _ = suite_scenes(config, suite, made_by, 96)
    truth = Truth.of(drawn, made_by, scene)
    expected = scene_crb(drawn, made_by, "paraxial", "constant").diagonal(dim1=-2, dim2=-1).sqrt()
    assert torch.equal(truth.crb_std, expected)
    by_hand = nomp(drawn.y, drawn.H, drawn.codes, array=made_by, scene=scene, snr_db=drawn.snr_db)
    f1 = match(by_hand.detections, drawn.position, drawn.present).f1
    assert told["methods"]["nomp"]["overall"]["f1"] == pytest.approx(f1)
    assert made_by.offset == (-0.075, -0.075)
    wide = PlanarArray(6, 6, spacing=0.2)
    assert suite.array(wide).offset == (-0.1, -0.1)


def test_recorded_scenes_without_a_test_split_say_that_they_choose(origin_shards: Path) -> None:

    study = load_study(
        Path(__file__).parents[2] / "configs" / "origin-shards.yaml", data__shards=origin_shards
    )
    content = evaluate_suite("nominal", study, None, n_scenes=6, methods=["nomp"], say=len)
    assert content["scenes"].startswith("6 of")
    assert "choose a search's winner" in content["scenes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "jiter"], "--suite: no suite 'jiter' (did you mean jitter?)"),
        (
            ["--method", "network+refinement"],
            "--method: no method 'network+refinement' (with a --checkpoint that has it)",
        ),
        (
            ["--scenes", "4", "--method", "nomp", "--reference", "somp"],
            "--reference: 'somp' is not run; there are nomp",
        ),
        (["--scenes", "0"], "--scenes"),
        (["--checkpoint", "nowhere"], "nowhere: no such folder"),
        (["--data", "nowhere"], "nowhere: no such data folder"),
        (["--data", "nowhere", "--suite", "near"], "--suite: is about simulated scenes"),
        (["--data", "nowhere", "--seed", "3"], "--seed: is about simulated scenes"),
        (["--out", "result.txt"], "--out: got result.txt; expected a name that ends in .json"),
        (["--out", "/proc/nowhere/result.json"], "--out: cannot write"),
        (["--set", "scene.n_antenas=3"], "scene.n_antenas"),
        (["--device", "cuda"], "--device: cuda asked"),
        (["--device", "gpu7"], "--device: no device 'gpu7'"),
        (["--set", "data.shards=nowhere"], "--data: the configuration names shards"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    extra = [] if "--out" in arguments else ["--out", str(tmp_path / "out.json")]
    assert evaluate(*arguments, *extra) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not (tmp_path / "out.csv").exists()
    assert len(error.strip().splitlines()) == 1


def test_a_config_beside_a_checkpoint_is_refused(
    network: Path, study: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "o.json"
    assert evaluate("--checkpoint", network, "--config", study, "--out", out) == 2
    assert "--config: a checkpoint says itself" in capsys.readouterr().err
    recorded = ("--checkpoint", network, "--set", "data.shards=nowhere", "--out", out)
    assert evaluate(*recorded, "--suite", "jitter") == 2
    assert "--suite: is about simulated scenes" in capsys.readouterr().err
    changed = ("--checkpoint", network, "--set", "scene.n_antennas=8", "--out", out)
    assert evaluate(*changed) == 2
    assert "--set: the network was trained for another array" in capsys.readouterr().err


def test_the_command_runs_in_a_process_of_its_own(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "own.json"
    finished = run(
        "--config", study, "--scenes", 16, "--out", out, module="tuner.evaluate"
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "nomp" in finished.stdout
    assert str(out) in finished.stdout


def test_a_terminal_of_80_columns_shows_every_number() -> None:
    content = evaluate_suite("nominal", tiny_config(), None, n_scenes=8, say=len)
    methods = content["methods"]
    methods["network+refinement"] = methods["nomp"]  # the longest name
    stream = io.StringIO()
    print_tables(content, Console(file=stream, width=80))
    text = stream.getvalue()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    for unit in ("[dB]", "[m]", "[95 %]"):
        assert unit in text
    for report in methods.values():
        numbers = report["overall"]
        for value in (numbers["f1"], *numbers["f1_interval"], numbers["gospa_m"]):
            assert f"{value:.3f}" in text
        assert f"{report['scenes_per_second']:.1f}" in text
