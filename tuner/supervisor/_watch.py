"""What a supervisor knows of its study: read again and again by a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tuner.ledger import Order
from tuner.pulse import Contact, gone
from tuner.session import Session
from tuner.storage import CAUSES
from tuner.tickets import fill_queue
from tuner.worker import progress

SHORTEST, LONGEST = 1.0, 5.0
GROWTH = 1.5
WORKERS_PER_SECOND = 20
FINAL = ("complete", "pruned", "failed")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sight:
    """The study at one moment.

    ``counts`` are trials by state and the ``budget``, ``running`` those that a worker holds,
    ``mine`` the ledger's rows of this machine's slots that train, ``ended`` how many trials
    each of them ended (asked for after a crash), ``best`` its number and value, ``at`` the
    time when reading began (``time.monotonic``).
    """

    counts: Mapping[str, int]
    running: int
    order: Order
    mine: tuple[Mapping[str, Any], ...] = ()
    ended: Mapping[str, int] = field(default_factory=dict)
    best: tuple[int, float] | None = None
    workers: int = 0
    at: float = field(default=0.0, compare=False)

    @property
    def waiting(self) -> int:
        """Tickets in the queue."""
        return self.counts["waiting"]


class Watch:
    """Reads the study about once per second, less often in large fleets and when all is quiet.

    A thread does it: a storage that does not answer must not keep a supervisor from its slots.
    Each reading puts the trials of dead workers back into the queue, and fills it.
    """

    def __init__(self, session: Session, worker_ids: Collection[str]) -> None:
        self.session, self.worker_ids = session, worker_ids
        self.sight: Sight | None = None
        self.failure: Exception | None = None
        self.counts_ended = False
        self.contact = Contact(session.ledger.lease_seconds, gap=2 * LONGEST)
        self._hurried, self._over = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def close(self) -> None:
        """Read no more."""
        self._over = True
        self._hurried.set()
        # It may wait for a storage that does not answer.
        self._thread.join(SHORTEST)

    def hurry(self) -> None:
        """Read again now."""
        self._hurried.set()

    def _run(self) -> None:
        pause = SHORTEST
        while not self._over:
            before = self.sight
            try:
                self.look()
            except CAUSES:
                log.debug("the study could not be read", exc_info=True)
            except Exception as error:
                self.failure = error
                return
            pause = self._pause(pause, changed=self.sight != before)
            self._hurried.wait(pause)
            self._hurried.clear()

    def _pause(self, pause: float, *, changed: bool) -> float:
        fleet = 0 if self.sight is None else self.sight.workers
        shortest = max(SHORTEST, fleet / WORKERS_PER_SECOND)
        return min(LONGEST, shortest if changed else max(shortest, pause * GROWTH))

    def look(self) -> Sight:
        """Read the study now."""
        at, ledger = time.monotonic(), self.session.ledger
        ledger.rest()
        with contextlib.suppress(*CAUSES):
            ledger.reap(gone(ledger), overdue=self.contact.is_steady())
        order = ledger.order()
        # Running ones first: a trial that is put back meanwhile is then seen as waiting.
        running = ledger.running()
        counts = progress(self.session)
        if counts["waiting"] == 0 and order.state == "run" and fill_queue(self.session):
            counts = progress(self.session)
        best = self.session.best()
        rows = ledger.workers()
        sight = Sight(
            counts,
            running,
            order,
            mine=tuple(r for r in map(_slim, rows) if self._is_mine(r)),
            best=None if best is None else (best.number, best.values[0]),
            workers=sum(row["state"] not in ("left", "lost") for row in rows),
            at=at,
        )
        self.sight = replace(sight, ended=self._ended()) if self.counts_ended else sight
        return self.sight

    def _is_mine(self, row: Mapping[str, Any]) -> bool:
        return row["worker_id"] in self.worker_ids and row["trial_id"] is not None

    def _ended(self) -> Counter[str]:
        attempts = self.session.ledger.attempts()
        return Counter(str(a["worker_id"]) for a in attempts if a["end"] in FINAL)


def _slim(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of a worker's row what changes when something happens."""
    return {key: row[key] for key in ("worker_id", "trial_id", "epoch", "speed")}
