"""What a fleet is told and what it says of itself: orders, limits, workers."""

from __future__ import annotations

import time
from typing import Any

import pytest
import sqlalchemy as sa
from ledgers import Ledgers, at_once, claimed, complete, enter, epoch, expire, release
from optuna.trial import TrialState

from tuner.ledger import Changes, Ledger, Limits, Order, SupersededError, WorkerAliveError
from tuner.ledger._tables import controls
from tuner.pulse import facts

# Orders


def test_a_study_runs_until_somebody_says_otherwise(ledgers: Ledgers) -> None:
    ledger = ledgers.open()
    assert ledger.order() == ledger.standing() == Order("run")


@pytest.mark.parametrize("state", ["stop", "pause"])
def test_nobody_claims_while_the_fleet_is_told_not_to_work(ledgers: Ledgers, state: str) -> None:
    ledgers.enqueue({})
    worker = enter(ledgers.first)
    told = ledgers.first.give_order(state, "asked", "by the night watch")
    assert told == Order(state, "asked", "by the night watch") == ledgers.open().order()
    assert ledgers.open().claim(worker) is None
    ledgers.first.give_order("run")
    assert ledgers.open().order() == Order("run")
    claimed(ledgers.first, worker)


def test_who_works_hears_the_order_with_every_write_and_heartbeat(ledgers: Ledgers) -> None:
    ledgers.enqueue({})
    worker = enter(ledgers.first)
    lease = claimed(ledgers.first, worker)
    assert ledgers.first.write(lease, epoch(0)).state == "run"
    ledgers.open().give_order("pause", "lunch")
    assert ledgers.first.write(lease, epoch(1)) == Order("pause", "lunch")
    assert ledgers.first.beat(worker, "idle", lease) == Order("pause", "lunch")
    assert len(ledgers.first.epochs(lease.trial_id)) == 2, "what is done is still written"
    complete(ledgers.first, lease)


def test_an_order_that_was_given_is_not_replaced_by_one_that_yields(ledgers: Ledgers) -> None:
    ledgers.first.give_order("pause", "lunch")
    assert ledgers.first.give_order("stop", "goal", unless_given=True) == Order("pause", "lunch")
    assert ledgers.first.give_order("stop", "goal") == Order("stop", "goal")


def test_preparing_a_study_again_leaves_its_order_and_its_hours(ledgers: Ledgers) -> None:
    ledgers.first.give_order("stop", "asked")
    each = [ledgers.open() for _ in range(4)]
    at_once(lambda n: each[n].prepare(), 4)
    assert ledgers.first.order() == Order("stop", "asked")


# Limits


def spent(ledger: Ledger) -> float:
    own = sa.select(controls.c.spent).where(controls.c.study_id == ledger.study_id)
    with ledger.engine.begin() as connection:
        return float(connection.execute(own).scalar_one())


def test_training_hours_are_those_of_trials_that_ended_and_of_those_that_run(
    ledgers: Ledgers,
) -> None:
    ledgers.enqueue({}, {}, {}, {})
    ledger = ledgers.open(limits=Limits(gpu_hours=1.0))
    workers = [enter(ledger, f"worker {n}") for n in range(4)]
    ended, returned, lost, running = (claimed(ledger, worker) for worker in workers)
    complete(ledger, ended, seconds=1000.0)
    ledger.write(returned, epoch(0), seconds=900.0)
    release(ledger, returned)
    ledger.write(lost, epoch(0), seconds=600.0)
    expire(ledger, workers[2][0])
    ledger.reap()
    assert spent(ledger) == 2500.0
    assert ledger.write(running, epoch(0), seconds=1099.0) == Order("run")
    assert ledger.write(running, epoch(1), seconds=1100.0) == Order("stop", "gpu_hours")
    assert ledger.claim(workers[0]) is None
    complete(ledger, running, seconds=1101.0)
    assert spent(ledger) == 3601.0


def test_hours_are_counted_once_when_the_answer_to_the_end_is_asked_for_again(
    ledgers: Ledgers,
) -> None:
    ledgers.enqueue({})
    lease = claimed(ledgers.first, enter(ledgers.first))
    for _ in range(2):
        complete(ledgers.first, lease, seconds=10.0)
    assert spent(ledgers.first) == 10.0


def test_wall_clock_hours_begin_with_the_first_claim(ledgers: Ledgers) -> None:
    ledgers.enqueue({}, {})
    ledger = ledgers.open(limits=Limits(hours=0.5 / 3600))
    worker = enter(ledger)
    time.sleep(0.6)
    assert ledger.order() == Order("run"), "nobody began yet"
    lease = claimed(ledger, worker)
    deadline = time.monotonic() + 30
    while ledger.beat(worker, "idle", lease) == Order("run"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert ledger.order() == Order("stop", "hours")


def test_a_limit_stops_again_at_once_when_the_study_is_told_to_run_beyond_it(
    ledgers: Ledgers,
) -> None:
    ledgers.enqueue({}, {})
    ledger = ledgers.open(limits=Limits(gpu_hours=1.0))
    worker = enter(ledger)
    complete(ledger, claimed(ledger, worker), seconds=3600.0)
    assert ledger.claim(worker) is None
    ledger.give_order("run")
    assert ledger.order() == Order("stop", "gpu_hours")
    larger = ledgers.open(limits=Limits(gpu_hours=2.0))
    larger.give_order("run")
    claimed(larger, worker)


def test_who_only_reads_does_not_give_the_order_a_limit_calls_for(ledgers: Ledgers) -> None:
    ledgers.enqueue({})
    ledger = ledgers.open(limits=Limits(gpu_hours=1.0))
    complete(ledger, claimed(ledger, enter(ledger)), seconds=9999.0)
    assert ledger.standing() == Order("run")
    assert ledger.order() == Order("stop", "gpu_hours")
    assert ledger.standing() == Order("stop", "gpu_hours")


# Errors in a row


def fail(ledger: Ledger, worker: tuple[str, int], note: str | None, reason: str) -> None:
    lease = claimed(ledger, worker)
    state = TrialState.COMPLETE if note is None else TrialState.FAIL
    values, end = ([0.5], "complete") if note is None else (None, "failed")
    ledger.finish(
        lease,
        Changes(),
        state=state,
        values=values,
        end=end,
        reason=reason,
        detail=f"traceback of {note}",
        note=note,
    )


def test_the_same_error_three_times_in_a_row_stops_the_study(ledgers: Ledgers) -> None:
    ledgers.enqueue(*[{}] * 4)
    worker = enter(ledgers.first)
    for _ in range(2):
        fail(ledgers.first, worker, "KeyError in loss.py:3", "code_error")
        assert ledgers.first.order().state == "run"
    fail(ledgers.first, worker, "KeyError in loss.py:3", "code_error")
    assert ledgers.first.order() == Order(
        "stop", "code_error", "traceback of KeyError in loss.py:3"
    )
    assert ledgers.first.claim(worker) is None


@pytest.mark.parametrize(
    "notes",
    [
        [("a", "code_error"), ("a", "code_error"), ("b", "code_error"), ("a", "code_error")],
        [("a", "code_error"), ("a", "code_error"), (None, ""), ("a", "code_error")],
        [("a", "out_of_memory")] * 4,
    ],
)
def test_other_endings_in_a_row_do_not(ledgers: Ledgers, notes: list[tuple[Any, str]]) -> None:
    ledgers.enqueue(*[{}] * len(notes))
    worker = enter(ledgers.first)
    for note, reason in notes:
        fail(ledgers.first, worker, note, reason)
    assert ledgers.first.order() == Order("run")


def test_trials_that_only_went_back_do_not_break_the_row(ledgers: Ledgers) -> None:
    ledgers.enqueue(*[{}] * 4)
    worker, other = enter(ledgers.first), enter(ledgers.first, "other")
    interrupted = claimed(ledgers.first, other)
    for _ in range(2):
        fail(ledgers.first, worker, "a", "code_error")
    release(ledgers.first, interrupted)
    fail(ledgers.first, worker, "a", "code_error")
    assert ledgers.first.order().reason == "code_error"


def test_errors_of_several_workers_at_once_are_a_row_too(ledgers: Ledgers) -> None:
    ledgers.enqueue(*[{}] * 3)
    each = [ledgers.open() for _ in range(3)]
    workers = [enter(ledger, f"worker {n}") for n, ledger in enumerate(each)]
    leases = [claimed(each[n], workers[n]) for n in range(3)]
    at_once(
        lambda n: each[n].finish(
            leases[n],
            Changes(),
            state=TrialState.FAIL,
            end="failed",
            reason="code_error",
            note="a",
        ),
        3,
    )
    assert ledgers.first.order().reason == "code_error"


# Workers


def test_the_list_of_workers_says_what_each_is_doing(ledgers: Ledgers) -> None:
    ledgers.enqueue({}, {})
    ledger = ledgers.first
    names = ["idle", "left", "lost", "training", "waiting"]
    workers = {name: enter(ledger, name) for name in names}
    lease = claimed(ledger, workers["training"])
    ledger.write(lease, epoch(3), speed=123.5)
    claimed(ledger, workers["lost"])
    ledger.beat(workers["waiting"], "waiting")
    ledger.leave(workers["left"])
    expire(ledger, "lost")
    listed = {row["worker_id"]: row for row in ledgers.open().workers()}
    assert {name: row["state"] for name, row in listed.items()} == {name: name for name in names}
    row = listed["training"]
    assert (row["trial_id"], row["epoch"], row["speed"]) == (lease.trial_id, 3, 123.5)
    assert 0 <= row["silent"] < 30
    assert row["device"] == "cpu"
    assert row["facts"]["version"]
    assert [row["worker_id"] for row in ledger.alive()] == ["idle", "lost", "training", "waiting"]
    assert ledger.running() == 2


def strangers(**changes: Any) -> dict[str, Any]:
    """What a worker in another process says of itself."""
    return facts("cpu") | {"process": "1 1"} | changes


def test_the_name_of_a_worker_that_is_alive_is_refused_with_who_it_is(ledgers: Ledgers) -> None:
    enter(ledgers.first)
    with pytest.raises(WorkerAliveError) as caught:
        ledgers.first.register("worker", strangers())
    assert caught.value.row["host"] == facts("cpu")["host"]
    assert caught.value.row["pid"] == facts("cpu")["pid"]
    assert [w["generation"] for w in ledgers.first.workers()] == [1]


@pytest.mark.parametrize("how", ["left", "silent", "dead"])
def test_the_name_of_a_worker_that_is_gone_is_taken_over(ledgers: Ledgers, how: str) -> None:
    first = enter(ledgers.first)
    if how == "left":
        ledgers.first.leave(first)
    if how == "silent":
        expire(ledgers.first)
    assert ledgers.first.register("worker", strangers(pid=1), dead=how == "dead") == 2
    with pytest.raises(SupersededError):
        ledgers.first.beat(first, "idle")
    ledgers.first.leave(first)
    (row,) = ledgers.first.workers()
    assert (row["state"], row["pid"]) == ("idle", 1), "the first one's goodbye is not the second's"


def test_two_processes_that_start_under_one_new_name_get_it_once(ledgers: Ledgers) -> None:
    each = [ledgers.open() for _ in range(4)]

    def register(number: int) -> int | None:
        try:
            return each[number].register("worker", strangers(process=f"{number} 1"))
        except WorkerAliveError:
            return None

    assert sorted(at_once(register, 4), key=str) == [1, None, None, None]


def test_a_worker_that_was_given_up_says_that_it_is_there(ledgers: Ledgers) -> None:
    worker = enter(ledgers.first)
    expire(ledgers.first)
    ledgers.first.reap()
    assert [w["state"] for w in ledgers.first.workers()] == ["lost"]
    assert ledgers.first.beat(worker, "idle") == Order("run")
    assert [w["state"] for w in ledgers.first.workers()] == ["idle"]
