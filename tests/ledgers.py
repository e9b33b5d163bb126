"""Studies that have a ledger but no training: what workers do to the tables, and no more."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import Trial, TrialState

from tuner.engines import make_engine
from tuner.ledger import Changes, FencedStorage, Lease, Ledger, prepare
from tuner.ledger import _optuna as theirs
from tuner.ledger import _tables as ours
from tuner.pulse import facts
from tuner.storage import exclusive, open_storage

Worker = tuple[str, int]

KILL = {
    "postgresql": "SELECT pid FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid()",
    "mysql": "SELECT id FROM information_schema.processlist "
    "WHERE db = DATABASE() AND id <> CONNECTION_ID()",
}
KILL["mariadb"] = KILL["mysql"]

OF_A_TRIAL = [
    *(theirs.TRIALS, theirs.PARAMS, theirs.VALUES, theirs.STEPS, theirs.USER, theirs.SYSTEM),
    ours.epochs,
]


def make_tables(url: str) -> None:
    """Make Optuna's tables and ours, as the first worker does."""
    storage_at(url)
    engine = make_engine(url)
    with exclusive(url):
        prepare(engine)
    engine.dispose()


@cache
def storage_at(url: str) -> BaseStorage:
    """Optuna's storage, opened once."""
    return open_storage(url)


class Ledgers:
    """One study in a storage that has its tables; every ``open`` is another worker's view."""

    def __init__(self, url: str) -> None:
        self.url, self.name = url, f"study-{uuid.uuid4().hex[:8]}"
        self.study = optuna.create_study(
            study_name=self.name, storage=storage_at(url), direction="maximize"
        )
        self.opened: list[Ledger] = []
        self.first = self.open()
        self.first.prepare()

    def open(self, **options: Any) -> Ledger:
        """The ledger of the study with connections of its own."""
        ledger = Ledger(make_engine(self.url), self.study._study_id, **options)
        self.opened.append(ledger)
        return ledger

    def close(self) -> None:
        """Give all connections back."""
        for ledger in self.opened:
            ledger.engine.dispose()

    def enqueue(self, *attrs: dict[str, Any]) -> None:
        """Queue a ticket per mapping of user attributes."""
        expected = len(self.first.trials())
        assert self.first.enqueue([({}, attr) for attr in attrs], expected)

    def fenced(self, ledger: Ledger | None = None) -> FencedStorage:
        """The storage a worker hands to Optuna."""
        return FencedStorage(storage_at(self.url), ledger or self.first)

    def trial(self, fenced: FencedStorage, lease: Lease) -> Trial:
        """Optuna's trial of a lease."""
        fenced.take(lease)
        return Trial(optuna.Study(self.name, fenced), lease.trial_id)

    def plain(self) -> optuna.Study:
        """The study as a program sees it that knows Optuna and nothing of us."""
        return optuna.load_study(study_name=self.name, storage=RDBStorage(self.url))


def enter(ledger: Ledger, name: str = "worker") -> Worker:
    """Register a worker of this process."""
    return name, ledger.register(name, facts("cpu"))


def claimed(ledger: Ledger, worker: Worker) -> Lease:
    """A lease that is there to be had."""
    lease = ledger.claim(worker)
    assert lease is not None
    return lease


def epoch(number: int, value: float = 0.5) -> Changes:
    """The writes of one epoch."""
    facts = {"seconds": 1.0, "samples": 10, "metrics": {"value": value}}
    return Changes(steps={number: value}, epochs={number: facts})


def complete(ledger: Ledger, lease: Lease, value: float = 0.5, **options: Any) -> None:
    """End a trial well."""
    ledger.finish(
        lease, Changes(), state=TrialState.COMPLETE, values=[value], end="complete", **options
    )


def release(ledger: Ledger, lease: Lease, **options: Any) -> None:
    """Put a trial back."""
    ledger.finish(lease, Changes(), state=TrialState.WAITING, end="preempted", **options)


def expire(ledger: Ledger, worker: str | None = None) -> None:
    """Let the leases of a worker, or of all, have run out a second ago."""
    for table in (ours.attempts, ours.workers):
        own = table.c.study_id == ledger.study_id
        if worker is not None:
            own &= table.c.worker_id == worker
        past = sa.update(table).where(own).values(lease_until=table.c.heartbeat_at - 1)
        with ledger.engine.begin() as connection:
            connection.execute(past)


def rows_of(ledger: Ledger, trial_id: int) -> dict[str, list[Any]]:
    """Everything the database has about a trial, but for its attempts."""
    with ledger.engine.begin() as connection:
        return {
            table.name: [
                tuple(row)
                for row in connection.execute(
                    sa.select(table)
                    .where(table.c.trial_id == trial_id)
                    .order_by(*table.primary_key.columns)
                )
            ]
            for table in OF_A_TRIAL
        }


def at_once(action: Callable[[int], Any], count: int) -> list[Any]:
    """What ``action`` returns in threads that start together."""
    start = threading.Barrier(count)

    def run(number: int) -> Any:
        start.wait()
        return action(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def in_processes(action: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What ``action`` returns in processes that start together, one per tuple of arguments."""
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(len(arguments)), context.Queue()

    def run(number: int) -> None:
        start.wait()
        try:
            answers.put((number, action(*arguments[number]), None))
        except BaseException as error:
            answers.put((number, None, repr(error)))

    processes = [context.Process(target=run, args=(n,)) for n in range(len(arguments))]
    for process in processes:
        process.start()
    found = sorted((answers.get(timeout=90) for _ in processes), key=lambda answer: answer[0])
    for process in processes:
        process.join()
    assert [error for _, _, error in found if error] == []
    return [answer for _, answer, _ in found]


def end_connections(url: str) -> None:
    """End all connections to a database from the server's side."""
    engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for number in connection.exec_driver_sql(KILL[engine.dialect.name]).scalars().all():
            end = f"SELECT pg_terminate_backend({number})"
            with contextlib.suppress(sa.exc.OperationalError):
                connection.exec_driver_sql(
                    end if engine.dialect.name == "postgresql" else f"KILL {number}"
                )
    engine.dispose()
