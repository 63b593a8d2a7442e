"""Shared parts of the commands: one-line errors, exit codes and signals. Fast to import."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer

# A libgomp thread that waits for other threads spins, by default for milliseconds. On a busy
# machine it thereby occupies, in every loop, the core that another thread needs: see
# docs/performance.md. libgomp reads this setting once, when PyTorch is loaded; child processes
# inherit it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_AGAIN = 0.1  # seconds after which a lost interrupt is raised again
DONE, NOTHING_FINISHED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def complain(message: str) -> None:
    """Print one line to stderr."""
    typer.echo("error: " + " ".join(str(message).split()), err=True)


def execute(app: typer.Typer, arguments: list[str] | None = None) -> int:
    """Run a command and turn errors into a one-line message and an exit code."""
    from tuner.errors import StudyError

    command: Any = typer.main.get_command(app)
    command.context_settings["help_option_names"] = ["-h", "--help"]
    command.callback = _said(command.callback)
    try:
        code = command(args=arguments, standalone_mode=False)
        return code if isinstance(code, int) else DONE
    except typer.Exit as leaving:
        return leaving.exit_code
    except StudyError as error:
        complain(str(error))
        return error.code
    except Exception as error:
        line = usage_problem(error) or data_problem(error)
        if line is None:
            raise
        complain(line)
        return BAD_INPUT


def _said(work: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command so that an interrupt prints a message; typer only sets an exit code."""

    def said(*arguments: Any, **named: Any) -> Any:
        try:
            return work(*arguments, **named)
        except KeyboardInterrupt:
            complain("interrupted")
            return INTERRUPTED

    return said


def usage_problem(error: Exception) -> str | None:
    """Return what is wrong with the command line if the error is about that, else None."""
    describe = getattr(error, "format_message", None)
    if describe is None or getattr(error, "exit_code", None) is None:
        return None
    line = str(describe())
    context = getattr(error, "ctx", None)
    changes = context is not None and any("--set" in p.opts for p in context.command.params)
    if changes and "extra argument" in line:  # the extra argument was probably meant as a value
        line += "; a field is changed with --set a.b=VALUE, in one word"
    return f"{line} (see --help)"


def data_problem(error: Exception) -> str | None:
    """Return the message of an error in data, a checkpoint or a plug-in; None for other errors."""
    checkpoint = sys.modules.get("model.checkpoint")
    data = sys.modules.get("model.data")
    plugin = sys.modules.get("model.plugin")
    kinds = tuple(
        kind
        for kind in (
            getattr(data, "DataError", None),
            getattr(checkpoint, "CheckpointError", None),
            getattr(plugin, "PluginError", None),
        )
        if kind
    )
    return str(error) if kinds and isinstance(error, kinds) else None


class Interruption:
    """Handles SIGINT and SIGTERM, immediately or gracefully by setting `wished`."""

    def __init__(self) -> None:
        self.wished = False
        self._graceful = False
        self._again: threading.Timer | None = None

    @contextmanager
    def watched(self) -> Iterator[Interruption]:
        """Handle both signals while the block runs.

        Python drops exceptions that are raised in a destructor or a callback, so a signal that
        arrives there would be lost. It is raised again shortly after.
        """
        before: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}
        unraisable = sys.unraisablehook

        def raise_again(dropped: sys.UnraisableHookArgs) -> None:
            if not issubclass(dropped.exc_type, KeyboardInterrupt):
                unraisable(dropped)
                return
            self._again = threading.Timer(_AGAIN, self._interrupt)
            self._again.daemon = True
            self._again.start()

        self.take()
        sys.unraisablehook = raise_again
        try:
            yield self
        finally:
            self.settle()
            sys.unraisablehook = unraisable
            for number, handler in before.items():
                signal.signal(number, handler)

    def settle(self) -> None:
        """Cancel a pending interrupt, as the wish to stop has been noticed."""
        if self._again is not None:
            self._again.cancel()
            self._again = None

    def _interrupt(self) -> None:
        # A real signal, sent to the main thread, which may be blocked in a system call.
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)

    def take(self) -> None:
        """Install the signal handlers (repeatedly, as connecting to Ray installs its own)."""
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    @contextmanager
    def gracefully(self) -> Iterator[None]:
        """In the block, the first signal only sets `wished`; the second one interrupts."""
        self._graceful = True
        try:
            yield
        finally:
            self._graceful = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self.wished = not self.wished, True
        if not (self._graceful and first):
            raise KeyboardInterrupt
