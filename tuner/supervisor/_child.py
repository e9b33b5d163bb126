"""A slot's process: started, listened to, told to stop, killed; and how its lives ended."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import IO

from tuner.slots import SlotPlan

MARK = "tuner: "
"""How the message begins that a process ends with when the user can cure what is wrong."""
TEMPORARY = os.EX_TEMPFAIL
"""Exit code of a slot that could not begin, for a reason that may pass."""
TAKEN = os.EX_CANTCREAT
"""Exit code of a slot whose name another worker has, which is alive."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
REST = 1.0

Say = Callable[[str, str], None]
"""Takes the name of a slot and a line that it said."""


class Child:
    """One slot: its process, if one runs, and what is known of the earlier ones.

    Its standard input stays open as long as this process lives: a slot whose input ends knows
    that its supervisor is gone, however that happened. Its output is read line by line into
    ``lines``; from the line that begins with ``MARK`` on it is the ``message``.
    """

    def __init__(
        self,
        plan: SlotPlan,
        worker_id: str,
        command: Sequence[str],
        lines: SimpleQueue[tuple[str, str]],
    ) -> None:
        self.plan, self.worker_id, self.command, self.lines = plan, worker_id, command, lines
        self.process: subprocess.Popen[str] | None = None
        self.reader: threading.Thread | None = None
        self.message = ""
        self.crashes = 0
        self.ended_before = 0
        self.given_up = self.refused = False
        self.ended_at = self.not_before = float("-inf")

    @property
    def alive(self) -> bool:
        """Whether its process runs, as far as ``end`` was asked."""
        return self.process is not None

    def start(self, environment: Mapping[str, str]) -> None:
        """Start its process; in a session of its own, so that Ctrl-C does not reach it."""
        self.message = ""
        self.process = subprocess.Popen(
            self.command,
            env={**environment, **self.plan.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            errors="replace",
        )
        assert self.process.stdout is not None
        self.reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self.reader.start()

    def _read(self, output: IO[str]) -> None:
        for line in output:
            if self.message or line.startswith(MARK):
                self.message += line
            elif line.strip():
                self.lines.put((self.plan.name, line.rstrip()))

    def end(self) -> int | None:
        """The exit code, once, of a process that ended; minus the signal that killed it."""
        if self.process is None or self.process.poll() is None:
            return None
        assert self.reader is not None
        assert self.process.stdin is not None
        # Others may hold its output open: processes of its own that it left behind.
        self.reader.join(1.0)
        self.process.stdin.close()
        code = self.process.returncode
        self.process = None
        self.ended_at = time.monotonic()
        self.not_before = self.ended_at + REST
        return code

    def crashed(self) -> float:
        """Count a crash; seconds until the next start, longer each time and never the same."""
        self.crashes += 1
        longest: float = min(FIRST_PAUSE * 2 ** (self.crashes - 1), LONGEST_PAUSE)
        pause = longest * random.uniform(0.5, 1.5)
        self.not_before = time.monotonic() + pause
        return pause

    def tell(self) -> None:
        """Ask the process to stop: once to finish its step, twice to leave at once."""
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the process and those it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def words(code: int) -> str:
    """What an exit code says, for people."""
    if code >= 0:
        return f"ended with exit code {code}"
    known = {number.value: number.name for number in signal.Signals}
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"was killed by {known.get(-code, f'signal {-code}')}{hint}"
