"""Disturbs a crew at random, by a seed: signals, dropped connections, restarts, full disks."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from crew import LEASE, NAME, Crew
from servers import OwnPostgres

# Workers whose trial was lost so often in a row, without a new epoch, that it may end for it: of
# five in a row the last two are left to what this machine does by itself.
FRAGILE = """
SELECT worker_id FROM tuner_attempts AS held WHERE holds IS NOT NULL AND 3 = (
  SELECT count(*) FROM (
    SELECT new_epochs FROM tuner_attempts AS lost
    WHERE lost.trial_id = held.trial_id AND "end" = 'lost' ORDER BY token DESC LIMIT 3
  ) AS latest WHERE new_epochs = 0
)
"""


@dataclass
class Monkey:
    """Does one thing after another; those of ``habits`` it knows on this storage."""

    crew: Crew
    seed: int
    server: OwnPostgres | None = None
    disk: Path | None = None
    pause: tuple[float, float] = (0.2, 0.9)
    done: Counter[str] = field(default_factory=Counter)
    asleep: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.habits: dict[str, Callable[[], None]] = {
            "SIGKILL": lambda: self.hit(signal.SIGKILL),
            "SIGTERM": lambda: self.hit(signal.SIGTERM),
            "SIGSTOP": self.put_to_sleep,
            "same id": self.double,
        }
        if self.server is not None:
            self.habits |= {"dropped": self.drop_connections, "restart": self.server.restart}
        if self.disk is not None:
            self.habits["full disk"] = self.fill_disk

    def anybody(self) -> str | None:
        """A worker that is training, if there is one; none on a trial that may end for it."""
        spared = set(self.query(FRAGILE))
        at_work = set(self.query("SELECT worker_id FROM tuner_attempts WHERE holds IS NOT NULL"))
        found = sorted(at_work - spared) or sorted(set(self.crew.names) - spared)
        return str(self.random.choice(found)) if found else None

    def query(self, text: str, **values: object) -> list[Any]:
        """First column of an answer; nothing when the storage does not answer."""
        engine = sa.create_engine(self.crew.place.url, poolclass=sa.NullPool)
        try:
            with engine.connect() as connection:
                return [row[0] for row in connection.execute(sa.text(text), values)]
        except sa.exc.DBAPIError:
            return []

    def hit(self, number: signal.Signals) -> None:
        if (name := self.anybody()) is not None:
            self.crew.hit(name, number)

    def double(self) -> None:
        if (name := self.anybody()) is not None:
            self.crew.double(name)

    def put_to_sleep(self) -> None:
        """Stop a worker for longer than its lease; ``wake`` lets it go on."""
        if (name := self.anybody()) is not None:
            self.crew.hit(name, signal.SIGSTOP)
            self.asleep[name] = time.monotonic() + LEASE * self.random.uniform(1.3, 2.0)

    def wake(self) -> None:
        for name in [n for n, until in self.asleep.items() if until < time.monotonic()]:
            self.crew.hit(name, signal.SIGCONT)
            del self.asleep[name]

    def drop_connections(self) -> None:
        assert self.server is not None
        drop = sa.text(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        engine = sa.create_engine(self.server.url, poolclass=sa.NullPool)
        with contextlib.suppress(sa.exc.DBAPIError), engine.connect() as connection:
            connection.execute(drop)

    def fill_disk(self) -> None:
        """Leave no byte for checkpoints for a moment."""
        assert self.disk is not None
        filler = self.disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(b"\0" * 65536)
                file.flush()
        time.sleep(0.5)
        filler.unlink()

    def trouble(self, seconds: float) -> None:
        """Make trouble until the study is done, or for ``seconds``; then let it come to its end."""
        self.crew.keep_up()
        while not self.query("SELECT token FROM tuner_attempts"):
            time.sleep(0.1)
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.is_over():
            self.crew.keep_up()
            self.wake()
            habit = self.random.choice(sorted(self.habits))
            self.habits[habit]()
            self.done[habit] += 1
            time.sleep(self.random.uniform(*self.pause))

    def calm(self, patience: float) -> None:
        """Let the crew finish, undisturbed."""
        until = time.monotonic() + patience
        while not self.is_over():
            assert time.monotonic() < until, self.crew.log.read_text()[-6000:]
            self.wake()
            self.crew.keep_up()
            time.sleep(0.1)

    def is_over(self) -> bool:
        """Whether every trial of the budget has ended."""
        ended = self.query(
            "SELECT trial_id FROM trials JOIN studies USING (study_id) "
            "WHERE study_name = :name AND state IN ('COMPLETE', 'PRUNED', 'FAIL')",
            name=NAME,
        )
        return len(ended) >= self.crew.place.trials


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int = 8) -> Iterator[Path | None]:
    """A disk of a few MiB at ``folder``; None where this user may not mount one."""
    import subprocess

    folder.mkdir(parents=True, exist_ok=True)
    options = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    mounted = subprocess.run(options, capture_output=True, check=False).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)
