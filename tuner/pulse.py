"""A worker's heartbeat: keeps it and its lease alive from a thread, and hears orders."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from tuner.engines import boot_id
from tuner.errors import TunerError
from tuner.ledger import Lease, LeaseLostError, Ledger, Order, SupersededError

BEATS_PER_LEASE = 4

log = logging.getLogger(__name__)


class Contact:
    """Whether the storage has answered all through the last lease.

    After an outage everybody is overdue, and nobody is dead: they all get the time to say so.
    The same holds after this process was itself asleep.
    """

    def __init__(self, lease_seconds: float, gap: float = 0.0) -> None:
        self.lease_seconds, self.gap = lease_seconds, max(gap, lease_seconds / 2)
        self.since = self.last = time.monotonic()

    def is_steady(self) -> bool:
        """Note that the storage answered now; ``gap`` seconds without that are an outage."""
        now = time.monotonic()
        if now - self.last > self.gap:
            self.since = now
        self.last = now
        return now - self.since > self.lease_seconds


class Pulse:
    """Beats four times per lease until it is left; every beat also looks for dead workers.

    ``lost`` says that a trial at hand is another worker's, ``superseded`` that another process
    has this worker's name, ``order`` what the fleet was told last. Where several trials are at
    hand, who lost one hears of it when it writes.
    """

    def __init__(self, ledger: Ledger, worker: tuple[str, int]) -> None:
        self.ledger, self.worker = ledger, worker
        self.order = Order("run")
        self.leases: tuple[Lease, ...] = ()
        self.superseded = False
        self.taken: set[int] = set()
        self.state = "idle"
        self.contact = Contact(ledger.lease_seconds)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        # A database that hangs must not keep a worker from leaving.
        self._thread.join(self.ledger.lease_seconds / BEATS_PER_LEASE)

    def hold(self, *leases: Lease) -> None:
        """Keep these leases alive from now on, beside those that are held already."""
        self.leases += leases

    def drop(self, *leases: Lease) -> None:
        """These trials are about to end, or have ended; without any, all that are held."""
        gone = {lease.token for lease in leases or self.leases}
        self.leases = tuple(lease for lease in self.leases if lease.token not in gone)

    @property
    def lost(self) -> bool:
        """Whether a trial at hand is another worker's."""
        return any(self.has_lost(lease) for lease in self.leases)

    def has_lost(self, lease: Lease) -> bool:
        """Whether a beat found that this lease is not held any more."""
        return lease.token in self.taken

    def interrupts(self, lease: Lease) -> bool:
        """Whether the trial of this lease must not go on."""
        return self.has_lost(lease) or self.superseded or self.order.state != "run"

    def hear(self, order: Order) -> None:
        """Take an order that came with an answer to something else."""
        self.order = order

    def _run(self) -> None:
        half = self.ledger.lease_seconds / BEATS_PER_LEASE / 2
        while not self._over.wait(half):
            self.ledger.rest()
            if self._over.wait(half):
                return
            self.beat()

    def beat(self) -> None:
        """Renew everything, hear the order, and queue the trials of dead workers again."""
        held = self.leases
        lease = held[0] if len(held) == 1 else None
        others = held if lease is None else ()
        try:
            self.order = self.ledger.beat(self.worker, self.state, lease, others)
            self._say(self.ledger.reap(gone(self.ledger), overdue=self.contact.is_steady()))
        except LeaseLostError:
            # What ended while the beat was on its way is not lost: nobody asks for it.
            self.taken.update(lease.token for lease in held)
        except SupersededError:
            self.superseded = True
        except SQLAlchemyError:
            log.debug("a heartbeat did not reach the storage", exc_info=True)
        except TunerError as error:
            log.warning("a heartbeat was refused: %s", error)

    def _say(self, numbers: list[int]) -> None:
        for number in numbers:
            log.warning("trial %d lost its worker; it goes on from its last checkpoint", number)


def machine() -> str:
    """What processes that can see each other have in common: machine and process numbers."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{boot_id()} {socket.gethostname()} {space}"


def process(pid: int) -> str | None:
    """A process that is alive, told apart from later ones of its number; None if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None if Path("/proc/self/stat").exists() else f"{pid}"
    state, *rest = stat.rpartition(")")[2].split()
    return None if state in "ZX" else f"{pid} {rest[18]}"


def facts(device: str) -> dict[str, Any]:
    """What a worker tells of itself when it registers."""
    from tuner import __version__

    pid = os.getpid()
    return {
        "machine": machine(),
        "host": socket.gethostname(),
        "pid": pid,
        "process": process(pid) or "",
        "device": device,
        "version": __version__,
        "cores": os.cpu_count(),
        "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def is_gone(row: dict[str, Any]) -> bool:
    """Whether a worker of this machine has no process any more; of others it is not known."""
    return bool(row["machine"] == machine() and process(row["pid"]) != row["process"])


def gone(ledger: Ledger) -> list[tuple[str, int]]:
    """Workers of this machine that died without a word."""
    rows = ledger.alive()
    return [(row["worker_id"], row["generation"]) for row in rows if is_gone(row)]
