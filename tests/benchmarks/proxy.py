"""Many workers behind one ``tuner proxy``: how long their calls take, and what it costs.

Run it with a PostgreSQL server at TUNER_TEST_POSTGRES:

    python tests/benchmarks/proxy.py [WORKERS [SECONDS]]

Each worker writes an epoch every five seconds, reads the trials that ended, as pruning does,
and beats every third time. None trains.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import threading
import time
from multiprocessing.queues import Queue
from pathlib import Path

import sqlalchemy as sa
from optuna.trial import TrialState

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import new_postgres
from ledgers import Ledgers, claimed, complete, enter, epoch, make_tables

from tuner.proxy import RemoteLedger
from tuner.proxy._server import CONNECTIONS, listen

EPOCH_SECONDS = 5.0
PROCESSES = 4
ENDED = 50


def one_worker(ledger: RemoteLedger, name: str, seconds: float, times: list[float]) -> None:
    worker = enter(ledger, name)
    lease = claimed(ledger, worker)
    over, number = time.monotonic() + seconds, 0
    time.sleep(random.uniform(0, EPOCH_SECONDS))
    while time.monotonic() < over:
        begin = time.perf_counter()
        ledger.write(lease, epoch(number), seconds=1.0, speed=1.0)
        ledger.trials((TrialState.COMPLETE, TrialState.PRUNED))
        times.append(time.perf_counter() - begin)
        number += 1
        if number % 3 == 0:
            ledger.beat(worker, "idle", lease)
        time.sleep(random.uniform(0.8, 1.2) * EPOCH_SECONDS)
    ledger.leave(worker)


def some_workers(
    url: str, study: int, names: list[str], seconds: float, answers: Queue[list[float]]
) -> None:
    times: list[float] = []
    threads = [
        threading.Thread(target=one_worker, args=(RemoteLedger(url, study), name, seconds, times))
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers.put(times)


def serve(url: str, port: Queue[str]) -> None:
    server, own = listen(url, port=0)
    port.put(own)
    server.wait_for_termination()


def most_connections(url: str, seconds: float) -> int:
    """The most connections to the database in that time, but for the one that counts."""
    count = "SELECT count(*) - 1 FROM pg_stat_activity WHERE datname = current_database()"
    engine, most, over = sa.create_engine(url), 0, time.monotonic() + seconds
    while time.monotonic() < over:
        with engine.connect() as connection:
            most = max(most, int(connection.execute(sa.text(count)).scalar_one()))
        time.sleep(0.5)
    engine.dispose()
    return most


def main(workers: int = 200, seconds: float = 30.0) -> None:
    context = multiprocessing.get_context("spawn")
    with new_postgres() as url:
        make_tables(url)
        study = Ledgers(url)
        study.enqueue(*[{}] * (workers + ENDED))
        first = enter(study.first, "first")
        for _ in range(ENDED):
            complete(study.first, claimed(study.first, first))
        study.close()
        ports, answers = context.Queue(), context.Queue()
        proxy = context.Process(target=serve, args=(url, ports), daemon=True)
        proxy.start()
        own = ports.get()
        names = [f"worker {number}" for number in range(workers)]
        for part in range(PROCESSES):
            arguments = (own, study.first.study_id, names[part::PROCESSES], seconds, answers)
            context.Process(target=some_workers, args=arguments, daemon=True).start()
        most = most_connections(url, seconds + 10)
        times = sorted(sum((answers.get() for _ in range(PROCESSES)), []))
        ticks = Path(f"/proc/{proxy.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        proxy.kill()
    spent = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    print(
        f"{workers} workers, an epoch each {EPOCH_SECONDS:g} s: {len(times)} epochs, p50 "
        f"{1000 * times[len(times) // 2]:.1f} ms, p95 {1000 * times[int(0.95 * len(times))]:.1f} "
        f"ms; {most} connections with --connections {CONNECTIONS}; the proxy took {spent:.1f} s "
        f"of one core in {seconds:g} s"
    )


if __name__ == "__main__":
    main(*(kind(text) for kind, text in zip((int, float), sys.argv[1:], strict=False)))
