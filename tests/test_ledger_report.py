"""What an epoch costs: a report in one statement on PostgreSQL, which also says what ended."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa
from conftest import SERVERS
from ledgers import Ledgers, claimed, complete, enter, epoch, expire, rows_of
from optuna.distributions import FloatDistribution, distribution_to_json
from optuna.trial import TrialState

from tuner.ledger import Changes, LeaseLostError, Ledger, Limits, Order, _reads
from tuner.ledger._tables import attempts, controls
from tuner.pools import check_idle

on_postgres = pytest.mark.parametrize("tables", SERVERS[1:2], indirect=True)
ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
UNIT = distribution_to_json(FloatDistribution(0.0, 1.0))
EVERYTHING = Changes(
    params={"b": (0.5, UNIT), "a": (0.25, UNIT)},
    user={"note": {"deep": [1, None]}, "other": "it's %(odd)s"},
    system={"seen": True},
    steps={0: 0.5, 1: float("inf"), 2: float("nan"), 3: -float("inf")},
    epochs={n: {"seconds": 1.5, "samples": n, "metrics": {"value": n}} for n in range(4)},
)


@contextlib.contextmanager
def sent(ledger: Ledger) -> Iterator[list[str]]:
    """The statements that go to the database meanwhile."""
    found: list[str] = []

    def seen(*given: Any) -> None:
        found.append(given[2])

    sa.event.listen(ledger.engine, "before_cursor_execute", seen)
    yield found
    sa.event.remove(ledger.engine, "before_cursor_execute", seen)


def copy_of(changes: Changes) -> Changes:
    return Changes(*(dict(part) for part in vars(changes).values()))


@pytest.mark.database
@on_postgres
def test_a_report_is_one_statement_and_reading_for_pruning_is_none(ledgers: Ledgers) -> None:
    ledgers.enqueue({})
    lease = claimed(ledgers.first, enter(ledgers.first))
    ledgers.first.trials()
    with sent(ledgers.first) as found:
        ledgers.first.write(lease, epoch(0), seconds=1.0, speed=10.0)
        assert ledgers.first.ended(ENDED) == []
    assert len(found) == 1


def test_a_report_writes_everything_and_once_more_changes_nothing(ledgers: Ledgers) -> None:
    ledgers.enqueue({})
    lease = claimed(ledgers.first, enter(ledgers.first))
    for _ in range(2):
        changes = copy_of(EVERYTHING)
        assert ledgers.first.write(lease, changes, seconds=6.0, note="n") == Order("run")
        assert not changes
    trial = ledgers.first.trial(lease.trial_id)
    assert repr(trial.intermediate_values) == "{0: 0.5, 1: inf, 2: nan, 3: -inf}"
    assert list(trial.params.items()) == [("b", 0.5), ("a", 0.25)]
    assert trial.user_attrs == EVERYTHING.user
    assert trial.system_attrs["seen"] is True
    rows = ledgers.first.epochs(lease.trial_id)
    assert [(r["epoch"], r["token"], r["seconds"], r["metrics"]) for r in rows] == [
        (n, lease.token, 1.5, {"value": n}) for n in range(4)
    ]
    assert all(abs(row["recorded_at"] - time.time()) < 3600 for row in rows)
    (attempt,) = ledgers.first.attempts()
    reached = {"epoch": 3, "new_epochs": 4, "seconds": 6.0, "note": "n"}
    assert attempt | reached == attempt


def test_a_lost_lease_writes_nothing_of_anything(ledgers: Ledgers) -> None:
    ledgers.enqueue({})
    lease = claimed(ledgers.first, enter(ledgers.first))
    expire(ledgers.first)
    ledgers.open().reap()
    before, changes = rows_of(ledgers.first, lease.trial_id), copy_of(EVERYTHING)
    with pytest.raises(LeaseLostError, match=f"^trial {lease.number} "):
        ledgers.first.write(lease, changes, seconds=6.0)
    assert changes == EVERYTHING
    assert rows_of(ledgers.first, lease.trial_id) == before


@pytest.mark.database
@pytest.mark.parametrize("tables", SERVERS[1:], indirect=True)
def test_a_report_waits_for_who_takes_the_trial_away_and_then_writes_nothing(
    ledgers: Ledgers,
) -> None:
    ledgers.enqueue({})
    lease = claimed(ledgers.first, enter(ledgers.first))
    before = rows_of(ledgers.first, lease.trial_id)
    own = sa.update(attempts).where(attempts.c.token == lease.token)
    with ThreadPoolExecutor() as pool:
        with ledgers.open().engine.begin() as connection:
            connection.execute(own.values(holds=None, ended_at=1.0, end="lost"))
            report = pool.submit(ledgers.first.write, lease, copy_of(EVERYTHING))
            time.sleep(0.3)
            assert not report.done()
        with pytest.raises(LeaseLostError):
            report.result(timeout=30)
    assert rows_of(ledgers.first, lease.trial_id) == before


def test_a_report_counts_what_it_spends_itself_and_what_others_spend(ledgers: Ledgers) -> None:
    ledgers.enqueue({}, {})
    ledger = ledgers.open(limits=Limits(gpu_hours=1.0))
    one, two = (claimed(ledger, enter(ledger, name)) for name in ("one", "two"))
    assert ledger.write(one, epoch(0), seconds=1800.0) == Order("run")
    assert ledger.write(two, epoch(0), seconds=1799.0) == Order("run")
    assert ledger.write(two, epoch(1), seconds=1800.0) == Order("stop", "gpu_hours")


def test_a_report_without_a_row_of_orders_goes_on(ledgers: Ledgers) -> None:
    ledgers.enqueue({})
    lease = claimed(ledgers.first, enter(ledgers.first))
    with ledgers.first.engine.begin() as connection:
        own = controls.c.study_id == ledgers.first.study_id
        connection.execute(sa.delete(controls).where(own))
    assert ledgers.first.write(lease, epoch(0)) == Order("run")
    ledgers.first.prepare()


def test_what_ended_elsewhere_is_known_after_a_report(ledgers: Ledgers) -> None:
    ledgers.enqueue({}, {}, {}, {})
    other, own = ledgers.open(), ledgers.first
    mine = claimed(own, enter(own))
    for number in range(1, 4):
        lease = claimed(other, enter(other, f"other {number}"))
        complete(other, lease, float(number))
        own.write(mine, epoch(number))
        assert [t.values for t in own.ended(ENDED)] == [[float(n)] for n in range(1, number + 1)]
        assert own.ended((TrialState.FAIL,)) == []
    complete(own, mine, 0.0)
    assert [t.number for t in own.trials(ENDED)] == [0, 1, 2, 3]
    assert own.history.mark == mine.trial_id + 3


def test_news_that_are_old_are_not_relied_on(
    ledgers: Ledgers, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledgers.enqueue({}, {})
    other, own = ledgers.open(), ledgers.first
    mine, theirs = claimed(own, enter(own)), claimed(other, enter(other, "other"))
    own.write(mine, epoch(0))
    complete(other, theirs)
    monkeypatch.setattr(_reads, "NEWS_SECONDS", 0.0)
    assert [t.number for t in own.ended(ENDED)] == [theirs.number]


# Connections


@pytest.mark.database
@on_postgres
def test_only_a_connection_that_was_idle_is_asked_whether_it_lives(
    tables: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = sa.create_engine(tables)
    check_idle(engine)
    asked: list[Any] = []
    ping = engine.dialect.do_ping

    def do_ping(connection: Any) -> bool:
        asked.append(connection)
        return ping(connection)

    monkeypatch.setattr(engine.dialect, "do_ping", do_ping)
    for _ in range(3):
        with engine.connect() as connection:
            raw: Any = connection.connection.dbapi_connection
    assert asked == []
    monkeypatch.setattr("tuner.pools.FRESH_SECONDS", 0.0)
    raw.close()
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
    assert asked[0] is raw
    engine.dispose()
