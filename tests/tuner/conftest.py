"""What the tests of databases share: a server, its password, and trials in no time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tuner import postgres
from tests.tuner.postgres import Server
from tests.tuner.support import FakeRun


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A PostgreSQL of the module's own."""
    with postgres.server() as running:
        yield running


@pytest.fixture
def password(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its password, where the driver looks for it."""
    monkeypatch.setenv("PGPASSWORD", postgres.PASSWORD)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials in no time, in this process."""
    monkeypatch.setattr("tuner.local.TrialRun", FakeRun)
    monkeypatch.setattr("tuner.conclusion._score_winner", lambda folder, study, progress: None)
    monkeypatch.setattr("tuner.conclusion.write_report", lambda folder, ledger: None)
