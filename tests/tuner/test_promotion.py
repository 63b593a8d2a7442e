"""The best of a search trained again: who, with which seeds, how they rank; all of it durable."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tuner.support import tiny_study
from tuner.errors import StudyError
from tuner.folder import RunFolder
from tuner.owned import OwnedStorage
from tuner.pages.material import Material
from tuner.promotion import Promoted, Promotion, open_promotion, promoted_seed
from tuner.records import Assignment, TrialRecord, trial_seed
from tuner.report import page
from tuner.study import Ledger

pytestmark = pytest.mark.long


def search_in(folder: Path, *objectives: float, **search: Any) -> Ledger:
    """A study whose trials have finished with these objectives."""
    changes = {"trials": len(objectives) or 1, "promote": 2, "full_epochs": 5} | search
    ledger = Ledger(folder / "study.db", tiny_study(folder, search=changes))
    for objective in objectives:
        trial = ledger.ask()
        assert trial is not None
        ledger.report(trial.number, {"epoch": 2, "objective": objective})
        ledger.finish(trial.number, "done", objective=objective)
    return ledger


def promotion_of(folder: Path, *objectives: float, **search: Any) -> Promotion:
    return Promotion(search_in(folder, *objectives, **search))


def asked(promotion: Promotion) -> list[Assignment]:
    found = []
    while (assignment := promotion.ask()) is not None:
        found.append(assignment)
    return found


def end(promotion: Promotion, number: int, objective: float | None) -> None:
    """Finish a run, or let it fail."""
    if objective is None:
        promotion.finish(number, "failed", reason="diverged: no <b>luck</b>")
        return
    promotion.report(number, {"epoch": 5, "objective": objective})
    promotion.finish(number, "done", objective=objective)


def record(objective: float | None, number: int = 0) -> TrialRecord:
    state = "failed" if objective is None else "done"
    return TrialRecord(number, state, {}, number, objective, {}, reason="diverged")  # type: ignore[arg-type]


def promoted(*objectives: float | None, trial: int = 0, seeds: int | None = None) -> Promoted:
    runs = tuple(record(value, number) for number, value in enumerate(objectives))
    return Promoted(record(0.5, trial), runs, seeds or len(objectives))


def test_the_best_are_trained_with_seeds_that_the_search_never_used(tmp_path: Path) -> None:
    promotion = promotion_of(tmp_path, 3.0, 1.0, 2.0)
    runs = asked(promotion)
    assert [found.origin for found in runs] == [
        f"trial {number:04d}, seed {index} of 3" for number in (1, 2) for index in (1, 2, 3)
    ]
    best = promotion.search.trial(1)
    assert [found.params for found in runs[:3]] == [best.params] * 3
    seeds = [found.seed for found in runs]
    assert seeds == [promoted_seed(3, number, index) for number in (1, 2) for index in range(3)]
    assert len({*seeds, *(trial.seed for trial in promotion.search.trials())}) == 9


def test_a_run_is_asked_for_without_a_copy_of_the_searchs_trials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promotion, read = promotion_of(tmp_path, 2.0, 1.0), OwnedStorage.get_all_trials

    def seen(storage: OwnedStorage, study: int, deepcopy: bool = True, **named: Any) -> Any:
        assert not deepcopy, "of 10,000 trials it takes most of a second"
        return read(storage, study, deepcopy, **named)

    monkeypatch.setattr(OwnedStorage, "get_all_trials", seen)
    assert promotion.ask() is not None


def test_no_seed_of_a_promotion_is_one_of_a_search() -> None:
    seeds = [trial_seed(0, number) for number in range(300)]
    seeds += [promoted_seed(0, number, index) for number in range(100) for index in range(10)]
    assert len(set(seeds)) == len(seeds)


def test_runs_have_the_full_budget_and_nobody_stops_them(tmp_path: Path) -> None:
    promotion = promotion_of(tmp_path, 2.0, 1.0, reduction_factor=2)
    good, bad, *_ = asked(promotion)
    assert promotion.config.trial_config(good.params, good.seed).training.epochs == 5
    for number, objective in ((good.number, 1.0), (bad.number, 9.0)):
        for epoch in (1, 2, 3, 4):
            assert promotion.report(number, {"epoch": epoch, "objective": objective}) is None
    assert promotion.trial(good.number).budget == 5


def test_runs_of_two_budgets_are_not_ranked_with_each_other(tmp_path: Path) -> None:
    promotion = promotion_of(tmp_path, 1.0)
    assert promotion.ask() is not None
    search = promotion.search
    study = search.config.replaced({"search.full_epochs": 7})
    other = Ledger(tmp_path / "study.db", study)
    with pytest.raises(
        StudyError, match=r"search\.full_epochs: promoted runs of 5 epochs .* 7 are"
    ):
        Promotion(other)
    Promotion(Ledger(tmp_path / "study.db", search.config))


def test_without_full_epochs_runs_have_the_searchs_budget(tmp_path: Path) -> None:
    promotion = promotion_of(tmp_path, 1.0, full_epochs=None)
    assert promotion.config.training.epochs == promotion.search.config.training.epochs == 2


def test_more_than_have_finished_cannot_be_promoted(tmp_path: Path) -> None:
    promotion = promotion_of(tmp_path, 2.0, 1.0, promote=7, promote_seeds=1)
    assert [found.params for found in asked(promotion)] == [
        trial.params for trial in promotion.search.ranking()
    ]
    assert not promotion_of(tmp_path / "none", promote=7).has_work


def test_nothing_is_promoted_unasked(tmp_path: Path) -> None:
    assert open_promotion(search_in(tmp_path, 1.0, promote=0)) is None


def test_the_search_knows_nothing_of_the_promotion(tmp_path: Path) -> None:
    promotion = promotion_of(tmp_path, 2.0, 1.0)
    before = promotion.search.trials()
    for found in asked(promotion):
        end(promotion, found.number, 0.1)
    assert promotion.search.trials() == before
    again = Ledger(tmp_path / "study.db", promotion.search.config)
    assert again.trials() == before
    assert not again.has_work


def test_a_run_that_was_cut_comes_back_as_it_was(tmp_path: Path) -> None:
    promotion = promotion_of(tmp_path, 2.0, 1.0, promote_seeds=2)
    first, second = promotion.ask(), promotion.ask()
    assert first is not None
    assert second is not None
    end(promotion, first.number, 1.0)
    promotion.report(second.number, {"epoch": 1, "objective": 2.0}, "/kept/checkpoint")
    promotion.close()
    again = Promotion(promotion.search)
    (orphan,) = again.orphans()
    cut = (orphan.number, orphan.params, orphan.seed, orphan.origin)
    assert cut == (second.number, second.params, second.seed, second.origin)
    assert (orphan.checkpoint, orphan.epoch) == ("/kept/checkpoint", 1)
    assert [found.origin for found in asked(again)] == [
        f"trial 0000, seed {index} of 2" for index in (1, 2)
    ]


def test_a_run_whose_actor_died_while_it_took_it_is_asked_for_again(tmp_path: Path) -> None:
    promotion = promotion_of(tmp_path, 1.0, 2.0)
    first = promotion.ask()
    assert first is not None
    promotion.hand_back(first.number)
    assert promotion.ask() == first
    assert promotion.ask() != first


def test_a_larger_promotion_keeps_what_has_run(tmp_path: Path) -> None:
    promotion = promotion_of(tmp_path, 2.0, 1.0, 3.0, promote=1, promote_seeds=2)
    for found in asked(promotion):
        end(promotion, found.number, 1.0)
    assert not promotion.has_work
    promotion.close()
    changes = {"trials": 3, "promote": 2, "promote_seeds": 2, "full_epochs": 5}
    wider = tiny_study(tmp_path, search=changes)
    more = Promotion(Ledger(tmp_path / "study.db", wider))
    assert more.has_work
    assert [found.origin for found in asked(more)] == [
        f"trial 0000, seed {index} of 2" for index in (1, 2)
    ]


def test_seeds_that_have_run_count_where_fewer_are_asked_for_by_now(tmp_path: Path) -> None:
    promotion = promotion_of(tmp_path, 1.0, 2.0, 3.0, promote=1, promote_seeds=3)
    for found, objective in zip(asked(promotion), (0.5, 0.6, 0.7), strict=True):
        end(promotion, found.number, objective)
    promotion.close()
    changes = {"trials": 3, "promote": 3, "promote_seeds": 1, "full_epochs": 5}
    fewer = Promotion(Ledger(tmp_path / "study.db", tiny_study(tmp_path, search=changes)))
    more = asked(fewer)
    assert [found.origin for found in more] == [
        "trial 0001, seed 1 of 1",
        "trial 0002, seed 1 of 1",
    ]
    for found, objective in zip(more, (0.55, 0.65), strict=True):
        end(fewer, found.number, objective)
    ranked = fewer.configurations()
    assert [found.trial.number for found in ranked] == [1, 0, 2], "by mean: 0.55, 0.6, 0.65"
    assert [found.words.partition(";")[0] for found in ranked] == [
        "0.55000 (1 seed)",
        "0.60000 ± 0.10000 (3 seeds)",
        "0.65000 (1 seed)",
    ]
    assert fewer.going_on(2).origin == "trial 0000, seed 3 of 3"
    text = page(Material.read(RunFolder(tmp_path), fewer.search))
    assert "with 1 to 3 seeds each that the search never used" in text


def test_mean_and_spread_are_those_of_the_seeds() -> None:
    values = [0.31, 0.29, 0.4, 0.35]
    found = promoted(*values)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-15)
    assert found.std == pytest.approx(np.std(values, ddof=1), rel=1e-14)
    assert found.best is not None
    assert found.best.objective == 0.29
    assert found.words == "0.33750 ± 0.04856 (4 seeds); 0.50000 in the search"


def test_one_seed_has_no_spread_and_a_failed_one_is_told() -> None:
    assert promoted(0.3).std is None
    assert promoted(0.3).words == "0.30000 (1 seed); 0.50000 in the search"
    found = promoted(0.3, None, 0.5)
    assert found.mean == pytest.approx(0.4)
    assert found.words.startswith("0.40000 ± 0.14142 (2 of 3 seeds)")
    assert found.words.endswith("seed 1 failed: diverged")
    assert promoted(None).mean is None
    assert promoted(None).best is None


def test_a_failed_seed_ranks_below_all_without(tmp_path: Path) -> None:
    promotion = promotion_of(tmp_path, 1.0, 2.0, 3.0, 4.0, promote=4, promote_seeds=2)
    outcomes = [(0.1, None), (0.6, 0.4), (None, None), (0.2, 0.7)]
    flat = [value for pair in outcomes for value in pair]
    for found, objective in zip(asked(promotion), flat, strict=True):
        assert promotion.winner() is None, "a run is left"
        end(promotion, found.number, objective)
    ranked = promotion.configurations()
    assert [found.trial.number for found in ranked] == [3, 1, 0, 2]
    assert [found.mean for found in ranked] == pytest.approx([0.45, 0.5, 0.1, None])
    winner = promotion.winner()
    assert winner is not None
    assert winner.trial.number == 3
    assert winner.best is not None
    assert winner.best.objective == 0.2


def test_a_promotion_without_any_score_has_no_winner(tmp_path: Path) -> None:
    promotion = promotion_of(tmp_path, 1.0, promote_seeds=2)
    for found in asked(promotion):
        end(promotion, found.number, None)
    assert promotion.winner() is None
    assert promotion.summary()[-1] == "no promoted run has a score: best/ is the search's winner"


def test_the_report_tells_of_the_promotion(tmp_path: Path) -> None:
    promotion = promotion_of(tmp_path, 1.0, 2.0, promote_seeds=2)

    def text_of(ledger: Ledger) -> str:
        return page(Material.read(RunFolder(tmp_path), ledger))

    assert "Nothing has been promoted yet" in text_of(promotion.search)
    for found, objective in zip(asked(promotion), (0.5, None, 0.75), strict=False):
        end(promotion, found.number, objective)
    text = text_of(promotion.search)
    assert "Not all runs have ended" in text
    assert "diverged: no &lt;b&gt;luck&lt;/b&gt;" in text
    assert "<b>luck" not in text
    end(promotion, 3, 0.25)
    text = text_of(promotion.search)
    assert "Not all runs have ended" not in text
    assert "<tr class='best'><td>1<td class='text'>0.5<td class='text'>0.35" in text
    found = Material.read(RunFolder(tmp_path), promotion.search)
    run, measure = promotion.trial(3), "validation NMSE of R_pred"
    assert found.winner == run
    assert "The best in the search is trial 0000 with 1." in html.unescape(text)
    assert "that of trial 0001 is the best: 0.50000 ± 0.35355 (2 seeds)" in text
    assert f"The winner is its network of seed {run.seed}." in text
    assert f"<dt>Winner<dd>trial 0001, promoted with seed {run.seed}: {measure} 0.25" in text
    assert f"The fields of trial 0001, promoted with seed {run.seed} that differ" in text
    assert found.is_of_winner(promotion.trial_config(run).model_dump(mode="json"))
    of_search = promotion.search.trial_config(promotion.search.trial(0))
    assert not found.is_of_winner(of_search.model_dump(mode="json"))
    longer = promotion.search.config.replaced({"search.trials": 9})
    goes_on = Material.read(RunFolder(tmp_path), Ledger(tmp_path / "study.db", longer))
    assert goes_on.promoted is None, "of a search that goes on nothing has been decided"
    assert goes_on.winner == goes_on.best
    study = promotion.search.config.replaced({"search.promote": 0})
    assert "Promoted configurations" not in text_of(Ledger(tmp_path / "study.db", study))
