"""A real PostgreSQL of one's own: made, started, killed and started again on loopback."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.tuner.support import wait_for

USER, PASSWORD = "ristune", "so secret"
REQUIRED = os.environ.get("RISTUNE_REQUIRE_POSTGRESQL") == "1"


def binary(name: str) -> Path | None:
    """One of PostgreSQL's programs: Debian keeps them off PATH, a folder a version."""
    folders = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"),
        key=lambda folder: [int(part) for part in re.findall(r"\d+", str(folder))],
    )
    found = shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *map(str, folders[::-1])]))
    return Path(found) if found else None


def needed(name: str) -> Path:
    """The program, or the test is skipped (and where PostgreSQL is required, failed)."""
    found = binary(name)
    if found is None:
        why = f"no {name}: apt-get install postgresql"
        pytest.fail(why) if REQUIRED else pytest.skip(why)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server that asks for a password, and the folder that it keeps."""

    def __init__(self) -> None:
        self.port = free_port()
        self._home = Path(tempfile.mkdtemp(prefix="rpg", dir="/tmp"))
        self._process: subprocess.Popen[bytes] | None = None
        secret = self._home / "secret"
        secret.write_text(PASSWORD)
        if os.geteuid() == 0:  # as whom PostgreSQL refuses to run
            for path in (self._home, secret):
                os.chown(path, self._owner().pw_uid, self._owner().pw_gid)
        self._run(
            needed("initdb"), "-D", self._home / "data", "-U", USER, "--auth=scram-sha-256",
            f"--pwfile={secret}", "--encoding=UTF8", "--no-locale", "--no-sync",
        ).wait(timeout=60)  # fmt: skip
        self.start()

    @staticmethod
    def _owner() -> pwd.struct_passwd:
        try:
            return pwd.getpwnam("postgres")
        except KeyError:
            return pwd.getpwnam("nobody")

    def _run(self, *command: object) -> subprocess.Popen[bytes]:
        owner: dict[str, Any] = {}
        if os.geteuid() == 0:
            owner = {"user": self._owner().pw_uid, "group": self._owner().pw_gid,
                     "extra_groups": []}  # fmt: skip
        with (self._home / "log").open("ab") as log:
            return subprocess.Popen(
                [str(word) for word in command],
                stdout=log, stderr=subprocess.STDOUT, cwd="/", start_new_session=True, **owner,
            )  # fmt: skip

    def start(self) -> None:
        """Start it and wait until it answers."""
        # Processes are killed here, not machines: what was written needs no disk to survive.
        self._process = self._run(
            needed("postgres"), "-D", self._home / "data", "-p", self.port, "-h", "127.0.0.1",
            "-k", "", "-F",
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            try:
                self.connect("postgres").close()
                return
            except psycopg.OperationalError:
                log = (self._home / "log").read_text(errors="replace")
                assert self._process.poll() is None, log
                assert time.monotonic() < deadline, log
                time.sleep(0.05)

    def kill(self) -> None:
        """kill -9, and wait until the processes that it had are gone too."""
        assert self._process is not None
        children = _children(self._process.pid)
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children))

    def stop(self) -> None:
        """End it for good and remove what it kept."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(timeout=30)
        shutil.rmtree(self._home, ignore_errors=True)

    def connect(self, database: str) -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user=USER, password=PASSWORD, dbname=database,
            autocommit=True,
        )  # fmt: skip

    def fresh(self) -> str:
        """The URL of a new, empty database."""
        name = f"db{uuid.uuid4().hex[:12]}"
        with self.connect("postgres") as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def url(self, database: str, port: int | None = None) -> str:
        return f"postgresql://{USER}@127.0.0.1:{port or self.port}/{database}"

    def hang_up(self) -> None:
        """End every connection, as an administrator may."""
        with self.connect("postgres") as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )


def _children(parent: int) -> list[int]:
    """Its processes, each of which leads a session of its own."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            # After the name in brackets: state, parent.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(folder.name))
    return found


class LostAnswers:
    """A proxy before the server that cuts the line when a transaction has been written.

    While it is `cutting`, the answer to every second transaction is lost: the server has done what
    it was asked to, and the client cannot know.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.cutting = False
        self.cuts = 0
        self._armed = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        cut = threading.Event()
        with client, socket.create_connection(("127.0.0.1", self._server.port)) as server:
            back = threading.Thread(target=self._answer, args=(server, client, cut), daemon=True)
            back.start()
            while data := _received(client):
                if self.cutting and b"COMMIT" in data:
                    self._armed = not self._armed
                    if self._armed:
                        cut.set()
                server.sendall(data)
            server.shutdown(socket.SHUT_RDWR)
            back.join()

    def _answer(self, server: socket.socket, client: socket.socket, cut: threading.Event) -> None:
        while data := _received(server):
            if cut.is_set():  # this is what the server says to the COMMIT
                self.cuts += 1
                break
            client.sendall(data)
        client.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65536)
    except OSError:
        return b""


@contextmanager
def server() -> Iterator[Server]:
    """A server for the time of the block."""
    needed("initdb")
    running = Server()
    try:
        yield running
    finally:
        running.stop()
