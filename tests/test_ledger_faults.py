"""A storage that drops connections, hangs or forgets to answer: nothing is lost or doubled."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pymysql
import pytest
import sqlalchemy as sa
from conftest import SERVERS
from ledgers import (
    Ledgers,
    claimed,
    complete,
    end_connections,
    enter,
    epoch,
    expire,
    in_processes,
    make_tables,
    release,
)
from optuna.trial import TrialState
from relay import Relay

from tuner import engines
from tuner.engines import insist, make_engine
from tuner.ledger import Changes, Lease, Ledger, Order, _clock, _reads, prepare
from tuner.ledger._clock import read_now
from tuner.ledger._tables import controls
from tuner.pulse import Pulse, facts

only_servers = pytest.mark.parametrize("tables", SERVERS[1:], indirect=True)

LOST = {
    "sqlite": sqlite3.OperationalError("disk I/O error"),
    "postgresql": psycopg.OperationalError("server closed the connection unexpectedly"),
    "mysql": pymysql.err.OperationalError(2013, "Lost connection to MySQL server during query"),
}
LOST["mariadb"] = LOST["mysql"]


@contextlib.contextmanager
def answer_lost(ledger: Ledger) -> Iterator[None]:
    """The next transaction is committed, but the connection breaks before anybody hears of it."""
    dialect: Any = ledger.engine.dialect
    commit, execute = dialect.do_commit, dialect.do_execute
    happened: list[bool] = []

    def lose(connection: Any) -> None:
        if not happened:
            happened.append(True)
            connection.close()
            raise LOST[dialect.name]

    def do_commit(connection: Any) -> None:
        commit(connection)
        lose(connection.dbapi_connection)

    def do_execute(cursor: Any, statement: str, *given: Any) -> None:
        execute(cursor, statement, *given)
        if statement.startswith("WITH held"):
            # A report to PostgreSQL is a transaction by itself.
            lose(cursor.connection)

    dialect.do_commit, dialect.do_execute = do_commit, do_execute
    try:
        yield
    finally:
        dialect.do_commit, dialect.do_execute = commit, execute
    assert happened


# The answer to a commit is lost


def test_a_claim_whose_answer_is_lost_claims_one_trial(ledgers: Ledgers) -> None:
    ledgers.enqueue({}, {})
    worker = enter(ledgers.first)
    with answer_lost(ledgers.first):
        lease = claimed(ledgers.first, worker)
    (attempt,) = ledgers.first.attempts()
    assert (attempt["token"], attempt["holds"]) == (lease.token, lease.trial_id)
    states = [t.state for t in ledgers.first.trials()]
    assert states == [TrialState.RUNNING, TrialState.WAITING]


def test_an_end_whose_answer_is_lost_happens_once(ledgers: Ledgers) -> None:
    ledgers.enqueue({})
    lease = claimed(ledgers.first, enter(ledgers.first))
    with answer_lost(ledgers.first):
        complete(ledgers.first, lease, 0.25, seconds=7.0)
    (trial,) = ledgers.first.trials()
    assert (trial.state, trial.values) == (TrialState.COMPLETE, [0.25])
    (attempt,) = ledgers.first.attempts()
    assert (attempt["end"], attempt["seconds"], attempt["holds"]) == ("complete", 7.0, None)
    own = sa.select(controls.c.spent).where(controls.c.study_id == ledgers.first.study_id)
    with ledgers.first.engine.begin() as connection:
        assert connection.execute(own).scalar_one() == 7.0


def test_a_release_whose_answer_is_lost_does_not_take_the_trial_from_the_next_worker(
    ledgers: Ledgers,
) -> None:
    ledgers.enqueue({})
    lease = claimed(ledgers.first, enter(ledgers.first))
    with answer_lost(ledgers.first):
        release(ledgers.first, lease)
    next_one = claimed(ledgers.first, enter(ledgers.first, "next"))
    release(ledgers.first, lease)
    ledgers.first.write(next_one, Changes())
    assert [a["end"] for a in ledgers.first.attempts()] == ["preempted", None]


def test_an_epoch_whose_answer_is_lost_is_one_epoch(ledgers: Ledgers) -> None:
    ledgers.enqueue({})
    lease = claimed(ledgers.first, enter(ledgers.first))
    for number in range(3):
        with answer_lost(ledgers.first):
            ledgers.first.write(lease, epoch(number), seconds=float(number))
    assert len(ledgers.first.epochs(lease.trial_id)) == 3
    (attempt,) = ledgers.first.attempts()
    assert (attempt["new_epochs"], attempt["epoch"], attempt["seconds"]) == (3, 2, 2.0)


def test_tickets_whose_answer_is_lost_are_queued_once(ledgers: Ledgers) -> None:
    with answer_lost(ledgers.first):
        assert not ledgers.first.enqueue([({}, {})] * 3, 0), "who asks reads the trials again"
    assert [t.number for t in ledgers.first.trials()] == [0, 1, 2]


def test_a_registration_whose_answer_is_lost_leaves_one_worker_that_can_work(
    ledgers: Ledgers,
) -> None:
    ledgers.enqueue({})
    with answer_lost(ledgers.first):
        worker = enter(ledgers.first)
    assert len(ledgers.first.workers()) == 1
    ledgers.first.beat(worker, "idle", claimed(ledgers.first, worker))


def test_a_reaper_whose_answer_is_lost_puts_a_trial_back_once(ledgers: Ledgers) -> None:
    ledgers.enqueue({})
    lease = claimed(ledgers.first, enter(ledgers.first))
    expire(ledgers.first)
    with answer_lost(ledgers.first):
        ledgers.first.reap()
    assert ledgers.first.trial(lease.trial_id).state == TrialState.WAITING
    assert [a["end"] for a in ledgers.first.attempts()] == ["lost"]


# Connections that end


@contextlib.contextmanager
def again_and_again(action: Callable[[], None], pause: float) -> Iterator[list[float]]:
    """Do something in a thread with pauses until the block ends."""
    over = threading.Event()
    done: list[float] = []

    def run() -> None:
        while not over.wait(pause):
            action()
            done.append(time.monotonic())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


@pytest.mark.database
@only_servers
def test_all_writes_arrive_though_all_connections_are_ended_meanwhile(ledgers: Ledgers) -> None:
    ledgers.enqueue({}, {})
    lease = claimed(ledgers.first, enter(ledgers.first))
    number = 0
    with again_and_again(lambda: end_connections(ledgers.url), 0.15) as ends:
        while len(ends) < 4 or number < 20:
            ledgers.first.write(lease, epoch(number, number / 10), patience=60.0)
            number += 1
        complete(ledgers.first, lease)
        assert len(ledgers.first.trials()) == 2
    trial = ledgers.first.trial(lease.trial_id)
    assert trial.state == TrialState.COMPLETE
    assert trial.intermediate_values == {n: n / 10 for n in range(number)}
    assert [e["epoch"] for e in ledgers.first.epochs(lease.trial_id)] == list(range(number))
    assert ledgers.first.attempts()[0]["new_epochs"] == number


@pytest.mark.database
@only_servers
def test_the_heartbeat_survives_connections_that_are_dropped(ledgers: Ledgers) -> None:
    ledgers.enqueue({})
    ledger = ledgers.open(lease_seconds=2.0)
    worker = enter(ledger)
    lease = claimed(ledger, worker)
    with Pulse(ledger, worker) as pulse:
        pulse.hold(lease)
        for _ in range(3):
            end_connections(ledgers.url)
            before = ledgers.first.attempts()[0]["heartbeat_at"]
            deadline = time.monotonic() + 30
            while ledgers.first.attempts()[0]["heartbeat_at"] == before:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert not pulse.lost
        ledgers.first.give_order("pause", "lunch")
        while pulse.order != Order("pause", "lunch"):
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.database
@only_servers
def test_who_claims_while_the_server_is_away_waits_until_it_is_back(ledgers: Ledgers) -> None:
    ledgers.enqueue({}, {})
    with Relay(ledgers.url) as relay, ThreadPoolExecutor() as pool:
        ledger = Ledger(make_engine(relay.url), ledgers.first.study_id)
        ledgers.opened.append(ledger)
        worker = enter(ledger)
        relay.cut()
        claim = pool.submit(ledger.claim, worker)
        time.sleep(0.5)
        assert not claim.done()
        relay.mend()
        assert claim.result(timeout=30) is not None
    assert len(ledgers.first.attempts()) == 1


@pytest.mark.database
@only_servers
def test_an_epoch_that_cannot_be_written_soon_is_kept_for_the_next_one(ledgers: Ledgers) -> None:
    ledgers.enqueue({})
    with Relay(ledgers.url) as relay:
        ledger = Ledger(make_engine(relay.url), ledgers.first.study_id)
        ledgers.opened.append(ledger)
        lease, changes = claimed(ledger, enter(ledger)), epoch(0)
        relay.cut()
        with pytest.raises(sa.exc.DBAPIError):
            ledger.write(lease, changes, patience=0.2)
        relay.mend()
        changes.steps |= {1: 0.75}
        ledger.write(lease, changes, patience=30)
        assert not changes
    assert ledgers.first.trial(lease.trial_id).intermediate_values == {0: 0.5, 1: 0.75}


@pytest.mark.database
@only_servers
def test_a_process_that_froze_in_the_middle_does_not_hold_up_the_fleet(
    ledgers: Ledgers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "FROZEN_SECONDS", 1)
    frozen = ledgers.open().engine.connect()
    own = controls.c.study_id == ledgers.first.study_id
    frozen.execute(sa.update(controls).where(own).values(reason="frozen"))
    began = time.monotonic()
    assert ledgers.first.give_order("pause", "lunch") == Order("pause", "lunch")
    assert time.monotonic() - began < 20
    with pytest.raises(sa.exc.DBAPIError):
        frozen.commit()
    frozen.invalidate()
    frozen.close()
    assert ledgers.first.order() == Order("pause", "lunch")


@pytest.mark.database
@only_servers
def test_a_worker_that_rests_holds_no_connection(
    ledgers: Ledgers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_reads, "IDLE_SECONDS", 0.0)
    ledger = ledgers.open()
    ledger.order()
    assert ledger.engine.pool.checkedin() == 1  # type: ignore[attr-defined]
    time.sleep(0.01)
    ledger.rest()
    assert ledger.engine.pool.checkedin() == 0  # type: ignore[attr-defined]
    assert ledger.order() == Order("run")


# Errors that do not pass


@pytest.mark.parametrize(
    "statement",
    ["SELECT * FROM no_such_table", "SELECT no_such_column FROM studies", "SELEKT 1"],
)
def test_a_mistake_is_not_tried_again_and_again(ledgers: Ledgers, statement: str) -> None:
    calls = []

    def action() -> None:
        calls.append(1)
        with ledgers.first.engine.begin() as connection:
            connection.exec_driver_sql(statement)

    with pytest.raises(sa.exc.DBAPIError):
        insist(action, patience=5.0)
    assert len(calls) == 1


def test_what_does_not_fit_into_the_database_is_not_tried_again_and_again(
    ledgers: Ledgers,
) -> None:
    ledgers.enqueue({})
    lease = claimed(ledgers.first, enter(ledgers.first))
    began = time.monotonic()
    strange: Any = {"lr": (object(), "{}")}
    with pytest.raises((sa.exc.SQLAlchemyError, TypeError)):
        ledgers.first.finish(
            lease, Changes(params=strange), state=TrialState.FAIL, end="failed", patience=60
        )
    assert time.monotonic() - began < 30
    ledgers.first.write(lease, Changes())


@pytest.mark.database
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("postgres", {"database": "no_such_database"}),
        ("postgres", {"username": "no_such_role"}),
        ("mariadb", {"database": "no_such_database"}),
        ("mariadb", {"username": "no_such_user", "password": "wrong"}),
    ],
)
def test_a_server_that_will_not_have_us_is_not_asked_again_and_again(
    kind: str, changes: dict[str, str], request: pytest.FixtureRequest
) -> None:
    engine = make_engine(
        sa.make_url(request.getfixturevalue(kind)).set(**changes).render_as_string(False)  # type: ignore[arg-type]
    )
    began = time.monotonic()
    with pytest.raises(sa.exc.OperationalError):
        insist(engine.connect, patience=60)
    assert time.monotonic() - began < 30


# Clocks


def _claim_with_a_wrong_clock(
    url: str, study_id: int, seconds: float
) -> tuple[Lease | None, list[int], float]:
    """A worker whose machine has the wrong time: what it claims, reaps, and takes for now."""
    right = time.time
    time.time = lambda: right() + seconds
    ledger = Ledger(make_engine(url), study_id, lease_seconds=60)
    lease = ledger.claim(("wrong", ledger.register("wrong", facts("cpu"))))
    reaped = ledger.reap()
    with ledger.engine.begin() as connection:
        return lease, reaped, read_now(connection)


@pytest.mark.parametrize("seconds", [3600.0, -3600.0])
def test_the_time_on_a_workers_machine_ends_no_lease(ledgers: Ledgers, seconds: float) -> None:
    ledgers.enqueue({}, {})
    ledger = ledgers.open(lease_seconds=60)
    mine = claimed(ledger, enter(ledger))
    arguments = (ledgers.url, ledger.study_id, seconds)
    ((theirs, reaped, their_now),) = in_processes(_claim_with_a_wrong_clock, [arguments])
    assert theirs is not None
    assert reaped == []
    with ledger.engine.begin() as connection:
        assert 0 <= read_now(connection) - their_now < 60
    assert ledger.reap([]) == []
    row = ledger.attempts(theirs.trial_id)[0]
    assert row["claimed_at"] <= their_now <= row["lease_until"]
    ledger.write(mine, Changes())
    expire(ledger, "wrong")
    assert ledger.reap() == [theirs.number]


@pytest.mark.database
def test_a_server_may_be_in_any_time_zone(mariadb: str) -> None:
    there = sa.make_url(mariadb).update_query_dict({"init_command": "SET time_zone = '+05:30'"})
    engine = make_engine(there.render_as_string(False))
    with engine.connect() as connection:
        assert read_now(connection) == pytest.approx(time.time(), abs=60)
        local = connection.exec_driver_sql("SELECT TIMEDIFF(NOW(), UTC_TIMESTAMP())").scalar()
    assert str(local) == "5:30:00"
    engine.dispose()


def test_after_a_start_of_the_machine_with_its_clock_set_back_leases_still_run_out(
    sqlite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tables(sqlite)
    ledgers = Ledgers(sqlite)
    ledgers.enqueue({})
    claimed(ledgers.first, enter(ledgers.first))
    monkeypatch.setattr(_clock, "boot_id", lambda: "the next start")
    monkeypatch.setattr(time, "time", lambda: 1e9)
    _clock.by_dialect.cache_clear()
    reader = ledgers.open()
    assert reader.workers()[0]["silent"] == 0.0, "nobody has prepared this start yet"
    prepare(reader.engine)
    with reader.engine.begin() as connection:
        at = _clock.read_now(connection)
    _clock.by_dialect.cache_clear()
    assert 0 <= at - reader.alive()[0]["heartbeat_at"] < 30
    ledgers.close()
