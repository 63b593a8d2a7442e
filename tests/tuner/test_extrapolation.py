"""What stopped trials are expected to end with, beside least squares written out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from scipy.stats import t as student

from tests.tuner.support import tiny_study
from tuner.extrapolation import Finished, expected_ends, with_expected_ends
from tuner.records import REPEATS
from tuner.study import Ledger

SPACE = FloatDistribution(0.0, 1.0)


def trial(
    number: int, curve: Sequence[float], state: TrialState = TrialState.PRUNED
) -> FrozenTrial:
    made = create_trial(
        state=state,
        value=curve[-1] if state == TrialState.COMPLETE else None,
        params={"x": 0.5},
        distributions={"x": SPACE},
        intermediate_values=dict(enumerate(curve, start=1)),
    )
    made.number = number
    return made


def done(number: int, *curve: float) -> FrozenTrial:
    return trial(number, curve, TrialState.COMPLETE)


def test_a_stopped_trial_is_expected_on_the_line_of_those_that_came_further() -> None:
    # The last is 0.5 + 0.6 of the first.
    further = [done(number, v, 0.5 + 0.6 * v) for number, v in enumerate([2.0, 3.0, 5.0, 6.0])]
    ends = expected_ends([*further, trial(4, [4.0]), trial(5, [11.0])])
    assert ends[4] == pytest.approx(0.5 + 0.6 * 4.0, abs=1e-9)  # in the middle no ridge is felt
    assert ends[5] == pytest.approx(0.5 + 0.6 * 11.0, rel=0.01)
    assert [ends[number] for number in range(4)] == [t.values[0] for t in further]


@pytest.mark.parametrize(("rise", "taken"), [(-3.0, 0.2), (0.0, 0.2), (0.5, 0.5), (7.0, 1.0)])
def test_differences_neither_grow_nor_turn_round(rise: float, taken: float) -> None:
    further = [done(number, v, rise * v - 30.0) for number, v in enumerate([1.0, 2.0, 3.0])]
    ends = expected_ends([*further, trial(3, [2.0]), trial(4, [1.0])])
    assert ends[3] - ends[4] == pytest.approx(taken, rel=0.02)


def test_nobody_is_expected_to_fall_behind_what_was_reached() -> None:
    further = [done(number, v, 5.0) for number, v in enumerate([5.0, 6.0, 7.0])]
    assert expected_ends([*further, trial(3, [0.5])])[3] == 0.5


def test_rungs_are_climbed_one_by_one_and_epochs_before_the_best_do_not_count() -> None:
    rng = np.random.default_rng(0)
    finished = [done(n, *rng.uniform(0.5, 1.0, 9)) for n in range(4)]
    middle = [trial(n, rng.uniform(0.5, 1.0, 3).tolist()) for n in range(4, 9)]
    low = [trial(n, rng.uniform(0.5, 1.0, 1).tolist()) for n in range(9, 20)]
    shuffled = [*low, *finished, *middle]
    rng.shuffle(shuffled)  # type: ignore[arg-type]

    def fitted(known: list[FrozenTrial], ends: dict[int, float], epoch: int) -> np.ndarray:
        """Slope and intercept by least squares; the slope's ridge is a row of its own."""
        x = np.array([min(t.intermediate_values[e] for e in range(1, epoch + 1)) for t in known])
        y = np.array([ends[t.number] for t in known])
        centred = x - x.mean()
        ridge = math.sqrt(0.01 * float(centred @ centred))
        a = np.column_stack([np.append(centred, ridge), np.append(np.ones(len(x)), 0.0)])
        slope, mean = np.linalg.lstsq(a, np.append(y, 0.0), rcond=None)[0]
        slope = min(1.0, max(0.2, slope))
        return np.array([slope, mean - slope * x.mean()])

    wanted = {t.number: t.values[0] for t in finished}
    slope, offset = fitted(finished, wanted, 3)
    for stopped in middle:
        best = min(stopped.intermediate_values.values())
        wanted[stopped.number] = min(best, slope * best + offset)
    slope, offset = fitted([*finished, *middle], wanted, 1)
    for stopped in low:
        best = stopped.intermediate_values[1]
        wanted[stopped.number] = min(best, slope * best + offset)
    found = expected_ends(shuffled)
    assert found.keys() == wanted.keys()
    assert [found[n] for n in wanted] == pytest.approx(list(wanted.values()))


def test_nothing_is_expected_where_nobody_came_further() -> None:
    assert expected_ends([]) == {}
    assert expected_ends([trial(0, [1.0]), trial(1, [1.0, 0.5])]) == {}
    early = done(0, 1.0)  # out of patience before the others were stopped
    assert expected_ends([early, trial(1, [2.0, 1.5])])[1] == pytest.approx(1.5)


def test_a_sampler_sees_them_as_finished_and_the_study_does_not() -> None:
    waiting = create_trial(state=TrialState.WAITING)
    earlier = create_trial(value=0.1, params={"x": 0.1}, distributions={"x": SPACE})
    waiting.number, earlier.number = 7, 8
    trials = [
        trial(0, [2.0]),
        done(1, 1.0, 0.5),
        trial(2, [1.5], TrialState.RUNNING),
        trial(3, [9.0], TrialState.FAIL),
        trial(4, [], TrialState.RUNNING),
        waiting,
        earlier,  # of an earlier study: no epochs are known of it
    ]
    seen = with_expected_ends(trials)
    assert [t.number for t in seen] == [t.number for t in trials]
    assert [t.state for t in trials] == [
        TrialState.PRUNED, TrialState.COMPLETE, TrialState.RUNNING, TrialState.FAIL,
        TrialState.RUNNING, TrialState.WAITING, TrialState.COMPLETE,
    ]  # fmt: skip
    assert [t.state for t in seen] == [
        TrialState.COMPLETE, TrialState.COMPLETE, TrialState.COMPLETE, TrialState.COMPLETE,
        TrialState.RUNNING, TrialState.WAITING, TrialState.COMPLETE,
    ]  # fmt: skip
    assert [seen[0].values, seen[2].values] == [[1.5], [1.0]]
    assert seen[3].values == [0.5], "the worst that has finished"
    assert with_expected_ends(trials[3:4]) == trials[3:4], "nobody has"
    assert trials[0].values is None


def test_a_repetition_is_worth_what_it_repeats() -> None:
    repeated = [trial(n, [], TrialState.FAIL) for n in (3, 4)]
    for one, twin in zip(repeated, (0, 2), strict=True):
        one.set_user_attr(REPEATS, twin)
    trials = [done(0, 0.3), done(1, 0.9), trial(2, [], TrialState.FAIL), *repeated]
    assert [t.values for t in with_expected_ends(trials)] == [[0.3], [0.9], [0.9], [0.3], [0.9]]


@pytest.mark.parametrize("n", [3, 5, 40])
def test_a_chance_is_that_of_a_new_point_on_a_fitted_line(n: int) -> None:
    """Beside least squares by QR, whose prediction interval textbooks give."""
    rng = np.random.default_rng(n)
    for _ in range(20):
        stood = np.linspace(1.0, 2.0, n) + rng.uniform(0.0, 0.2, n)  # none far behind
        ended = np.minimum(stood, 0.5 + 0.5 * stood + 0.1 * rng.normal(size=n) - 0.3)
        finished = [done(i, *rng.uniform(3.0, 4.0, 2), x, y) for i, (x, y) in
                    enumerate(zip(stood, ended, strict=True))]  # fmt: skip
        reached, target = rng.uniform(1.2, 2.2), float(ended.min())
        found = Finished(finished).chance_below(target, 3, reached)
        x = stood - stood.mean()
        slope = float((x @ (ended - ended.mean())) / (1.01 * x @ x))
        slope = min(1.0, max(0.2, slope))
        design = np.column_stack([np.ones(n), stood])
        new = np.array([1.0, reached])
        r = np.linalg.qr(design, mode="r")
        lever = float(((np.linalg.solve(r.T, new)) ** 2).sum())
        residual = ended - ended.mean() - slope * x
        deviation = math.sqrt(float(residual @ residual) / (n - 2) * (1.0 + lever))
        expected = min(reached, float(ended.mean() + slope * (reached - stood.mean())))
        wanted = 1.0 if reached < target else student.cdf((target - expected) / deviation, n - 2)
        assert found == pytest.approx(wanted, rel=1e-9)


def test_chances_are_calibrated_where_the_line_is_true() -> None:
    rng = np.random.default_rng(0)
    chances, came = [], []
    for _ in range(4000):
        stood = rng.normal(3.0, 0.5, 9)
        ended = 0.5 * stood + 0.2 * rng.normal(size=9)  # further down than anybody has reached
        *finished, new = (done(i, x, y) for i, (x, y) in enumerate(zip(stood, ended, strict=True)))
        target = min(float(t.values[0]) for t in finished)
        chances.append(Finished(finished).chance_below(target, 1, new.intermediate_values[1]))
        came.append(float(new.values[0]) < target)
    chances_, came_ = np.array(chances), np.array(came)
    for low, high in ((0.0, 0.05), (0.05, 0.2), (0.2, 0.5), (0.5, 1.0)):
        inside = (chances_ >= low) & (chances_ < high)
        error = 3.0 * math.sqrt(chances_[inside].mean() / inside.sum())
        assert inside.sum() > 100
        assert came_[inside].mean() == pytest.approx(chances_[inside].mean(), abs=error)


def test_few_trials_and_a_trial_that_leads_are_no_reason_to_stop() -> None:
    two = [done(0, 2.0, 1.0), done(1, 3.0, 2.0)]
    assert Finished(two).chance_below(1.0, 1, 99.0) == 1.0
    three = [*two, done(2, 4.0, 3.0)]
    assert Finished(three).chance_below(1.0, 1, 0.9) == 1.0
    assert Finished(three).chance_below(1.0, 1, 99.0) < 0.01  # all ended on one line
    assert Finished(three).why_hopeless(1, 99.0, 4, 0.05) is None, "the fourth best is none yet"


def test_trials_that_stood_alike_say_nothing_of_one_that_stands_elsewhere() -> None:
    alike = Finished([done(number, 2.0, end) for number, end in enumerate([1.0, 1.2, 1.4, 1.6])])
    assert alike.chance_below(1.0, 1, 3.0) == 1.0
    for flat in (1.0, 0.7):  # 1 - F1 of networks that name nothing yet
        silent = Finished([done(number, flat, flat, flat) for number in range(3)])
        for reached in (flat, 0.8, 2.0):
            assert silent.why_hopeless(1, reached, 1, 0.05) is None


def test_one_trial_that_stood_far_behind_does_not_decide_where_the_line_lies() -> None:
    rng = np.random.default_rng(2)
    near = [done(n, x, 0.5 * x + 0.01 * rng.normal()) for n, x in enumerate([2.0, 2.2, 2.4, 2.6])]
    wanted = Finished(near).chance_below(1.0, 1, 2.5)
    assert 0.0 < wanted < 0.05
    for stood, ended in ((2000.0, 20.0), (2e6, 1e6)):
        assert Finished([*near, done(4, stood, ended)]).chance_below(1.0, 1, 2.5) == wanted


def test_as_many_of_the_best_as_are_wanted_are_the_mark() -> None:
    rng = np.random.default_rng(1)
    finished = [done(n, x, 0.5 * x + 0.01 * rng.normal()) for n, x in enumerate(range(2, 12))]
    assert Finished(finished).why_hopeless(1, 7.0, 8, 0.05) is None
    said = Finished(finished).why_hopeless(1, 7.0, 1, 0.05)
    assert said is not None
    best = min(float(t.values[0]) for t in finished)
    assert said.startswith(f"stopped after epoch 1 at 7: its chance to end below {best:.5g} was ")


@pytest.mark.slow
def test_a_gaussian_process_learns_from_trials_that_were_stopped(tmp_path: Path) -> None:
    axis = {"type": "float", "low": 0.0, "high": 0.6}
    search = {
        "sampler": "gp",
        "trials": 100,
        "startup_trials": 6,
        "space": {"blend.beta": axis, "blend.shrinkage": axis},
    }
    ledger = Ledger(tmp_path / "study.db", tiny_study(tmp_path, search=search))
    away = []
    for count in range(20):
        found = ledger.ask()
        assert found is not None
        beta, shrinkage = (float(found.params[path]) for path in search["space"])  # type: ignore[arg-type]
        away.append(abs(beta - 0.2) + abs(shrinkage - 0.2))
        ledger.report(found.number, {"epoch": 1, "objective": 1.0 + away[-1]})
        if count == 0:  # one finishes, and nobody else
            ledger.report(found.number, {"epoch": 2, "objective": 0.5 + away[-1]})
            ledger.finish(found.number, "done", objective=0.5 + away[-1])
        else:
            ledger.finish(found.number, "pruned", reason="stopped after epoch 1")
    assert [t.state for t in ledger.trials()].count("pruned") == 19
    assert np.median(away[-8:]) < 0.3 * np.median(away[:6])
    ledger.close()
