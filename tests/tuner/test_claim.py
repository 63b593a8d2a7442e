"""One driver a study, in the database that it shares with others."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from sqlalchemy import Engine, event

from tests.tuner.postgres import Server
from tests.tuner.support import driver
from tuner import storage as storage_module
from tuner.claim import ServerClaim, claim_of
from tuner.config import load_study
from tuner.errors import LedgerLost, StudyError
from tuner.folder import RunFolder
from tuner.ledger import open_ledger, read_ledger
from tuner.storage import Outage, PatientStorage, parse_url
from tuner.study import Ledger

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("password")]


def elsewhere(folder: Path) -> Ledger:
    """The ledger of a driver on another machine, which does not see the folder that was copied."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("platform.node", lambda: "another-machine")
        return open_ledger(RunFolder(folder), load_study(folder / "config.yaml"))


def test_a_copy_of_a_run_folder_cannot_drive_the_study_at_the_same_time(
    tmp_path: Path, server: Server
) -> None:
    ledger = driver(tmp_path / "run", server.fresh())
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    copy = RunFolder(tmp_path / "copy")
    study = load_study(copy.config)
    with pytest.raises(StudyError, match=r"another run is at work on the study run-\w+ in post"):
        elsewhere(copy.path)
    read_ledger(copy, study).close()  # who reads is let in
    ledger.close()
    elsewhere(copy.path).close()


def test_the_claim_outlives_the_server(tmp_path: Path, server: Server) -> None:
    ledger = driver(tmp_path / "run", server.fresh())
    server.kill()
    server.start()
    assert ledger.ask() is not None  # finds the server anew, and takes the claim again
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with pytest.raises(StudyError, match="another run is at work"):
        elsewhere(tmp_path / "copy")
    ledger.close()


def test_a_claim_that_went_to_another_in_the_outage_ends_the_first_driver(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = driver(tmp_path / "run", server.fresh())
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    server.kill()
    server.start()
    second = elsewhere(tmp_path / "copy")
    monkeypatch.setattr(storage_module, "PATIENCE", 0.5)
    with pytest.raises(LedgerLost, match="claimed by another connection"):
        ledger.ask()
    assert second.ask() is not None
    second.close()
    ledger.close()


def test_a_driver_whose_study_another_has_driven_meanwhile_writes_no_more(
    tmp_path: Path, server: Server
) -> None:
    ledger = driver(tmp_path / "run", server.fresh())
    first = ledger.ask()
    assert first is not None
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    server.kill()
    server.start()
    # As of a machine that slept: its connections are gone, and another took its study over.
    second = elsewhere(tmp_path / "copy")
    second.finish(first.number, "failed", reason="taken over")
    second.close()
    with pytest.raises(LedgerLost, match="another run has driven the study"):
        ledger.report(first.number, {"epoch": 1, "objective": 1.0})
    with pytest.raises(LedgerLost, match="--resume"):
        ledger.ask()
    ledger.close()
    third = elsewhere(tmp_path / "copy")
    assert [(t.state, t.epoch) for t in third.trials()] == [("failed", 0)]
    third.close()


def test_a_claim_whose_connection_alone_was_ended_is_missed_within_a_minute(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(
        storage_module, "time", SimpleNamespace(monotonic=lambda: now, sleep=time.sleep)
    )
    ledger = driver(tmp_path / "run", server.fresh())
    first = ledger.ask()
    assert first is not None
    shutil.copytree(tmp_path / "run", tmp_path / "copy")

    def cut() -> None:
        """As an administrator may, or a firewall that forgets what is silent."""
        with server.connect("postgres") as connection:
            ended = connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
            )
            assert ended.fetchall() == [(True,)]

    cut()
    now += 61.0
    ledger.keep_seconds(1.0)  # takes it again, before anybody else has
    with pytest.raises(StudyError, match="another run is at work"):
        elsewhere(tmp_path / "copy")
    cut()
    second = elsewhere(tmp_path / "copy")
    second.finish(first.number, "failed", reason="taken over")
    second.close()
    now += 61.0
    with pytest.raises(LedgerLost, match="another run has driven the study"):
        ledger.keep_seconds(2.0)
    ledger.close()


def test_a_server_that_ends_idle_sessions_leaves_the_claim(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.claim._GRACE", 0.5)
    url = server.fresh()
    with server.connect("postgres") as connection:
        connection.execute(
            f"ALTER DATABASE {url.rpartition('/')[2]} SET idle_session_timeout = 400"
        )
    ledger = driver(tmp_path / "run", url)
    time.sleep(1.5)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with pytest.raises(StudyError, match="another run is at work"):
        elsewhere(tmp_path / "copy")
    assert ledger.ask() is not None
    ledger.close()


def test_a_claim_whose_connection_is_ended_amid_its_taking_is_taken_over_another(
    server: Server,
) -> None:
    url = parse_url(server.fresh())
    asked = 0
    end_at: int | None = None

    def end_it(*_: object) -> None:
        nonlocal asked
        if asked == end_at:
            server.hang_up()
        asked += 1

    event.listen(Engine, "before_cursor_execute", end_it)
    try:
        for statement in range(20):
            asked, end_at = 0, statement
            first, second = ServerClaim(url, "shared"), ServerClaim(url, "shared")
            first.take()
            needed, end_at = asked, None
            assert not second._got()
            first.release()
            second.release()
            if statement >= needed:
                break
    finally:
        event.remove(Engine, "before_cursor_execute", end_it)
    assert 5 <= statement < 20


class Flapping:
    """A claim that was gone in an outage, and is held from then on."""

    def __init__(self) -> None:
        self.gone = True

    def take(self) -> None: ...

    def renew(self) -> bool:
        gone, self.gone = self.gone, False
        return gone

    def release(self) -> None: ...


def test_no_outage_amid_the_look_at_who_drives_lets_an_old_driver_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage_module, "_FIRST_PAUSE", 0.01)
    backend = optuna.storages.InMemoryStorage()
    study = backend.create_new_study([optuna.study.StudyDirection.MINIMIZE], "shared")
    outages = {"set_study_user_attr": 1, "get_study_system_attrs": 2, "set_study_system_attr": 1}
    for name in outages:
        monkeypatch.setattr(backend, name, flapping(name, getattr(backend, name), outages))
    storage = PatientStorage(backend, "the server")  # type: ignore[abstract]
    claim = Flapping()
    storage.hold(claim, "go on with --resume")
    storage.sign(study)
    storage.set_study_user_attr(study, "mine", 1)
    assert set(outages.values()) == {0}, "the line was cut amid each of them"
    PatientStorage(backend, "the server").sign(study)  # type: ignore[abstract]
    outages |= {"set_study_user_attr": 1, "get_study_system_attrs": 2}
    claim.gone = True
    with pytest.raises(LedgerLost, match="another run has driven the study in the server"):
        storage.set_study_user_attr(study, "mine", 2)
    assert backend.get_study_user_attrs(study) == {"mine": 1}


def flapping(name: str, work: Any, outages: dict[str, int]) -> Any:
    """A method that is out as often as it is said there."""

    def method(*args: Any) -> Any:
        if outages[name]:
            outages[name] -= 1
            raise Outage(f"{name} is out")
        return work(*args)

    return method


def test_a_claim_that_was_asked_for_in_vain_is_not_taken_for_one(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = claim_of(parse_url(server.fresh()), "shared")
    failing = {"left": 1}
    asked = ServerClaim._asked

    def cut(asking: ServerClaim) -> bool:
        got = asked(asking)
        if failing["left"]:
            failing["left"] -= 1
            raise Outage("the answer was lost")
        return got

    monkeypatch.setattr(ServerClaim, "_asked", cut)
    with pytest.raises(Outage):
        claim.renew()
    assert claim.renew(), "it was not held meanwhile"
    assert not claim.renew()
    claim.release()


def test_a_claim_in_sqlite_is_a_locked_file(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'team.db'}"
    ledger = driver(tmp_path / "run", url)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    copy = RunFolder(tmp_path / "copy")
    with pytest.raises(
        StudyError, match=rf"another run \(process {os.getpid()} on .+\) is at work"
    ):
        elsewhere(copy.path)
    ledger.close()
    elsewhere(copy.path).close()
