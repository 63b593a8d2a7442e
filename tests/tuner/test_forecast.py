from __future__ import annotations

import pytest

from tuner.forecast import Pace, about, time_left


def test_nothing_is_foretold_before_a_trial_has_ended() -> None:
    running = [Pace("running", 3, (2.0, 2.0, 2.0))]
    assert time_left(running, epochs=8, n_new=5, elapsed=6.0) is None
    assert time_left([], epochs=8, n_new=5, elapsed=0.0) is None
    failed_at_once = [*running, Pace("failed", 0, ())]
    assert time_left(failed_at_once, epochs=8, n_new=5, elapsed=6.0) is None


def test_trials_to_come_last_as_long_as_those_that_ended() -> None:
    ended = [Pace("done", 8, (2.0,) * 8), Pace("pruned", 2, (2.0,) * 2)]
    assert time_left(ended, epochs=8, n_new=3, elapsed=20.0) == pytest.approx(3 * 5 * 2.0)


def test_what_runs_side_by_side_takes_its_share_of_the_time() -> None:
    ended = [Pace("done", 4, (1.0,) * 4) for _ in range(4)]
    left = time_left(ended, epochs=4, n_new=8, elapsed=8.0)  # 16 s of epochs in 8 s
    assert left == pytest.approx(8 * 4 * 1.0 / 2)
    assert time_left(ended, epochs=4, n_new=1, elapsed=8.0) == pytest.approx(4.0), "one by one"


def test_a_running_trial_goes_as_far_as_those_that_came_further() -> None:
    ended = [Pace("pruned", 1, (1.0,)), Pace("done", 9, (1.0,) * 9)]
    running = Pace("running", 3, (1.0,) * 3)
    assert time_left([*ended, running], epochs=9, n_new=0, elapsed=13.0) == pytest.approx(6.0)
    alone = [Pace("pruned", 1, (1.0,)), running]
    assert time_left(alone, epochs=9, n_new=0, elapsed=4.0) == pytest.approx(6.0), "its budget"


def test_a_first_epoch_that_waited_is_not_expected_again() -> None:
    ended = [Pace("done", 4, (60.0, 1.0, 1.0, 1.0))]
    assert time_left(ended, epochs=4, n_new=1, elapsed=63.0) == pytest.approx(4.0)


def test_the_time_budget_bounds_it_and_nothing_left_is_nothing() -> None:
    ended = [Pace("done", 4, (1.0,) * 4)]
    assert time_left(ended, epochs=4, n_new=9, elapsed=4.0, budget=10.0) == pytest.approx(6.0)
    assert time_left([], epochs=4, n_new=9, elapsed=4.0, budget=10.0) == pytest.approx(6.0)
    assert time_left(ended, epochs=4, n_new=9, elapsed=40.0, budget=10.0) == 0.0
    assert time_left(ended, epochs=4, n_new=0, elapsed=4.0) == 0.0


def test_it_is_said_to_be_about() -> None:
    assert about(0.2) == "about 1s"
    assert about(3725) == "about 1h2m"
