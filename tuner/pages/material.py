"""The input of a report: the ledger and other files in the run folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from model.config import OBJECTIVES
from tuner.pages.timing import Segment, segments_of, slots_of

if TYPE_CHECKING:
    import optuna

    from tuner.config import StudyConfig
    from tuner.folder import RunFolder
    from tuner.limits import Ended
    from tuner.promotion import Promoted, Promotion
    from tuner.records import State, TrialRecord
    from tuner.study import Ledger

STATES: tuple[State, ...] = ("done", "pruned", "failed", "running")


@dataclass(frozen=True)
class Material:
    """A study at one moment."""

    study: StudyConfig
    trials: list[TrialRecord]
    ranking: list[TrialRecord]
    seconds: float  # for which trials ran, over all sessions
    finished: Callable[[], optuna.Study] = field(repr=False)
    promotion: Promotion | None = field(default=None, repr=False)
    evaluation: dict[str, Any] | None = field(default=None, repr=False)  # evaluation.json
    scenes: dict[str, Any] | None = field(default=None, repr=False)  # scenes.json
    place: str = "RUN_DIR"  # the run folder, quoted for a shell
    mode: str = ""  # option of the resume command: " --local" or ""
    ended: Ended | None = None  # why there is nothing left to run; None if there is
    written: datetime = field(default_factory=lambda: datetime.now().astimezone())

    @classmethod
    def read(cls, folder: RunFolder, ledger: Ledger) -> Material:
        """Read the current state."""
        from tuner.ledger import mode_of
        from tuner.limits import Limits, why_ended
        from tuner.promotion import open_promotion
        from tuner.records import ranked

        study, trials = ledger.config, ledger.trials()
        return cls(
            study,
            trials,
            ranked(trials, study.training.epochs, study.search.cost),
            ledger.seconds,
            ledger.finished_study,
            open_promotion(ledger),
            _json(folder.evaluation),
            _json(folder.scenes),
            shlex.quote(str(folder.path)),
            mode_of(ledger),
            why_ended(ledger, Limits(ledger)),
        )

    @property
    def best(self) -> TrialRecord | None:
        """The best of the search, if any trial finished."""
        return self.ranking[0] if self.ranking else None

    @cached_property
    def promoted(self) -> Promoted | None:
        """The winning configuration of the promotion, once search and promotion have ended."""
        if self.promotion is None or self.ended is None:
            return None
        return self.promotion.winner()

    @property
    def winner(self) -> TrialRecord | None:
        """The trial or the promoted run whose network is in best/."""
        return self.best if self.promoted is None else self.promoted.best

    @property
    def winner_study(self) -> StudyConfig:
        """The study that the winner was trained in: the search, or its promotion."""
        won = self.promotion if self.promoted is not None else None
        return self.study if won is None else won.config

    @property
    def winner_name(self) -> str:
        """The winner's name: trial 0007, or the promoted trial and its seed."""
        if self.winner is None:
            return "none"
        if self.promoted is None:
            return f"trial {self.winner.number:04d}"
        return f"trial {self.promoted.trial.number:04d}, promoted with seed {self.winner.seed}"

    @property
    def measure(self) -> str:
        """The axis title of objectives."""
        return OBJECTIVES[self.study.objective]

    @cached_property
    def counts(self) -> dict[State, int]:
        """Trials by state."""
        return {state: sum(t.state == state for t in self.trials) for state in STATES}

    @cached_property
    def segments(self) -> list[Segment]:
        """When and where each trial trained."""
        return segments_of(self.trials)

    @property
    def busy(self) -> float | None:
        """Share of the time of all slots spent training; None if nothing was timed."""
        slots = len({(s.place, s.slot) for s in slots_of(self.segments)})
        if not slots or not self.seconds:
            return None
        return min(1.0, sum(s.busy for s in self.segments) / (slots * self.seconds))

    def is_of_winner(self, config: dict[str, Any]) -> bool:
        """Return whether a saved configuration is the winner's, regardless of file locations."""
        from model.adjustment import undivided
        from model.config import TrialConfig
        from tuner.records import config_of

        if self.winner is None:
            return False
        try:
            held = undivided(TrialConfig.model_validate(config))
        except ValidationError:  # of another version
            return False
        return held == undivided(config_of(self.winner_study, self.winner))


def _json(path: Any) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
