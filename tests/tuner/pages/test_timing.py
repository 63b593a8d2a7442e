from __future__ import annotations

from pathlib import Path

import pytest

from tests.tuner.pages.support import START, material, record
from tuner.pages.timing import Segment, segments_of, slots_of


def spans(segments: list[Segment]) -> list[tuple[int, str, float, float, float]]:
    return [(s.number, s.place, s.begin - START, s.end - START, s.busy) for s in segments]


def test_epochs_in_a_row_are_one_stretch() -> None:
    assert spans(segments_of([record(0, n_epochs=3, begin=5.0)])) == [
        (0, "alpha cpu", 5.0, 35.0, 30.0)
    ]


def test_an_interruption_and_another_machine_begin_a_new_stretch() -> None:
    trial = record(0, n_epochs=4)
    trial.reported.update({3: START + 530.0, 4: START + 540.0})
    trial.epochs[4]["node"] = "beta"
    assert spans(segments_of([trial])) == [
        (0, "alpha cpu", 0.0, 20.0, 20.0),
        (0, "alpha cpu", 520.0, 530.0, 10.0),
        (0, "beta cpu", 530.0, 540.0, 10.0),
    ]


def test_gpus_of_a_node_are_places_of_their_own() -> None:
    trials = [record(n, node="alpha", gpu=str(n), begin=0.0) for n in range(2)]
    assert {s.place for s in segments_of(trials)} == {"alpha GPU 0", "alpha GPU 1"}


def test_an_epoch_without_a_time_is_left_out() -> None:
    trial = record(0, n_epochs=2)
    del trial.reported[2], trial.epochs[1]["epoch_seconds"]
    assert segments_of([trial, record(1, n_epochs=0)]) == []


def test_trials_side_by_side_have_slots_of_their_own_and_successors_share() -> None:
    trials = [record(0, begin=0.0), record(1, begin=1.0), record(2, begin=20.0)]
    slots = {s.number: s.slot for s in slots_of(segments_of(trials))}
    assert slots == {0: 0, 1: 1, 2: 0}


def test_a_late_report_makes_no_slot() -> None:
    trials = [record(0, begin=1.0), record(1, begin=20.0)]  # 0 ends at 21, by its report
    assert {s.slot for s in slots_of(segments_of(trials))} == {0}


@pytest.mark.parametrize("seed", range(5))
def test_no_slot_holds_two_trials_at_once(seed: int) -> None:
    import numpy as np

    rng = np.random.default_rng(seed)
    trials = [
        record(n, begin=float(rng.uniform(0, 300)), n_epochs=int(rng.integers(1, 6)))
        for n in range(40)
    ]
    found = slots_of(segments_of(trials))
    for one in found:
        for other in found:
            if one.number < other.number and one.slot == other.slot:
                overlap = min(one.end, other.end) - max(one.begin, other.begin)
                assert overlap <= 5.0


def test_busy_is_training_over_slots_and_time(tmp_path: Path) -> None:
    trials = [record(0, begin=0.0), record(1, begin=1.0), record(2, begin=21.0)]
    assert material(tmp_path, *trials, seconds=60.0).busy == pytest.approx(60 / (2 * 60))
    assert material(tmp_path, *trials, seconds=0.0).busy is None
    assert material(tmp_path, seconds=60.0).busy is None
