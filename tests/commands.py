"""``tuner`` as a real process, forked from one that has the large libraries already."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

forks = multiprocessing.get_context("forkserver")
"""Processes that begin without the seconds that torch takes to load."""
# The first process that is asked for settles this for all.
forks.set_forkserver_preload(["optuna", "torch._dynamo", "tuner.worker", "tuner.supervisor"])


def _main(arguments: Sequence[str], log: Path, folder: Path, environment: dict[str, str]) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    # As ``python -m tuner`` has it.
    sys.path.insert(0, str(folder))
    sys.argv = ["tuner", *arguments]
    from tuner.cli import main

    main()


class Command:
    """A ``tuner`` with these arguments in a session of its own, which adds what it says to a log.

    Used as a ``subprocess.Popen``. It differs from a ``python -m tuner`` by how it begins alone.
    """

    def __init__(
        self, *arguments: str, log: Path, folder: Path, environment: Mapping[str, str] = os.environ
    ) -> None:
        self._process = forks.Process(target=_main, args=(arguments, log, folder, {**environment}))
        self._process.start()
        atexit.register(self.kill)
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Its exit code, minus the signal that killed it; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Wait until it ends; its exit code."""
        self._process.join(timeout)
        code = self.poll()
        assert code is not None, f"it has not ended after {timeout:g} s"
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to stop."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it without a word."""
        self.send_signal(signal.SIGKILL)
