"""Who works on which trial: claimed once, written with the lease or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import sqlalchemy as sa
from ledgers import (
    Ledgers,
    at_once,
    claimed,
    complete,
    enter,
    epoch,
    expire,
    in_processes,
    release,
    rows_of,
)
from optuna.trial import TrialState

from tuner.engines import make_engine
from tuner.ledger import Changes, Lease, LeaseLostError, Ledger
from tuner.ledger._reap import MAX_LOST
from tuner.ledger._tables import attempts

# Claims


def claim_all(ledger: Ledger, name: str) -> list[int]:
    worker, numbers = enter(ledger, name), []
    while (lease := ledger.claim(worker)) is not None:
        numbers.append(lease.number)
        complete(ledger, lease)
    return numbers


def test_each_ticket_goes_to_exactly_one_of_many_threads(ledgers: Ledgers) -> None:
    ledgers.enqueue(*[{}] * 24)
    each = [ledgers.open() for _ in range(6)]
    found = at_once(lambda n: claim_all(each[n], f"worker {n}"), 6)
    assert sorted(sum(found, [])) == list(range(24))
    assert len(ledgers.first.attempts()) == 24


def _claim_all_in_a_process(url: str, study_id: int, name: str) -> list[int]:
    return claim_all(Ledger(make_engine(url), study_id), name)


def test_each_ticket_goes_to_exactly_one_of_many_processes(ledgers: Ledgers) -> None:
    ledgers.enqueue(*[{}] * 24)
    study_id = ledgers.first.study_id
    found = in_processes(
        _claim_all_in_a_process, [(ledgers.url, study_id, f"worker {n}") for n in range(4)]
    )
    assert sorted(sum(found, [])) == list(range(24))
    assert len(ledgers.first.attempts()) == 24


def test_a_worker_that_asks_twice_has_one_lease(ledgers: Ledgers) -> None:
    ledgers.enqueue({}, {})
    worker = enter(ledgers.first)
    assert claimed(ledgers.first, worker) == claimed(ledgers.first, worker)
    assert len(ledgers.first.attempts()) == 1


def test_a_restarted_worker_gets_its_own_trial_back(ledgers: Ledgers) -> None:
    ledgers.enqueue({}, {}, {})
    other, first = enter(ledgers.first, "other"), enter(ledgers.first)
    claimed(ledgers.first, other)
    lease = claimed(ledgers.first, first)
    ledgers.first.write(lease, Changes(user={"kept": True}))
    again = claimed(ledgers.first, enter(ledgers.first))
    assert (again.number, again.attempt, again.generation) == (lease.number, 2, 2)
    assert ledgers.first.trial(lease.trial_id).user_attrs == {"kept": True}
    assert [a["reason"] for a in ledgers.first.attempts(lease.trial_id)] == [
        "worker restarted",
        None,
    ]


def test_a_worker_whose_name_another_process_has_gets_no_trial(ledgers: Ledgers) -> None:
    ledgers.enqueue({}, {})
    old, new = enter(ledgers.first), enter(ledgers.first)
    lease = claimed(ledgers.first, new)
    assert ledgers.first.claim(old) is None
    assert claimed(ledgers.first, new) == lease, "the new one keeps its trial"


def test_the_baseline_is_claimed_first_and_the_others_by_number(ledgers: Ledgers) -> None:
    ledgers.enqueue({}, {"preset": "x"}, {"baseline": True})
    workers = [enter(ledgers.first, f"worker {n}") for n in range(4)]
    leases = [ledgers.first.claim(worker) for worker in workers]
    assert [lease and lease.number for lease in leases] == [2, 0, 1, None]


def test_a_ticket_brings_its_parameters_and_attributes(ledgers: Ledgers) -> None:
    tickets = [({"lr": 0.25, "loss": "focal"}, {"preset": "focal", "rung": 2})]
    assert ledgers.first.enqueue(tickets, 0)
    fenced = ledgers.fenced()
    trial = ledgers.trial(fenced, claimed(ledgers.first, enter(ledgers.first)))
    assert trial.suggest_float("lr", 0.001, 1.0, log=True) == 0.25
    assert trial.suggest_categorical("loss", ["focal", "ldam"]) == "focal"
    assert trial.user_attrs == {"preset": "focal", "rung": 2}


def test_tickets_are_queued_by_exactly_one_of_all_who_know_the_same_trials(
    ledgers: Ledgers,
) -> None:
    each = [ledgers.open() for _ in range(6)]
    told = at_once(lambda n: each[n].enqueue([({}, {"by": n})] * 3, 0), 6)
    assert sorted(told) == [False] * 5 + [True]
    trials = ledgers.first.trials()
    assert [t.number for t in trials] == [0, 1, 2]
    assert {t.user_attrs["by"] for t in trials} == {told.index(True)}


def test_a_budget_that_everybody_fills_up_is_exact(ledgers: Ledgers) -> None:
    each = [ledgers.open() for _ in range(4)]

    def fill(number: int) -> None:
        while (have := len(each[number].trials())) < 21:
            each[number].enqueue([({}, {})] * min(2, 21 - have), have)

    at_once(fill, 4)
    assert [t.number for t in ledgers.first.trials()] == list(range(21))


# A lease that is not held any more


def _ran_out(ledgers: Ledgers, lease: Lease) -> None:
    expire(ledgers.first)
    assert ledgers.first.reap() == [lease.number]


def _went_to_another(ledgers: Ledgers, lease: Lease) -> None:
    _ran_out(ledgers, lease)
    assert claimed(ledgers.first, enter(ledgers.first, "another")).number == lease.number


def _went_to_the_successor(ledgers: Ledgers, lease: Lease) -> None:
    assert claimed(ledgers.first, enter(ledgers.first)).number == lease.number


def _was_ended_by_the_successor(ledgers: Ledgers, lease: Lease) -> None:
    complete(ledgers.first, claimed(ledgers.first, enter(ledgers.first)), 0.75)


def _was_ended_through_optuna(ledgers: Ledgers, lease: Lease) -> None:
    ledgers.plain().tell(lease.number, 0.75)


@pytest.mark.parametrize(
    "lose",
    [
        _ran_out,
        _went_to_another,
        _went_to_the_successor,
        _was_ended_by_the_successor,
        _was_ended_through_optuna,
    ],
)
def test_a_worker_that_lost_its_lease_cannot_write_anything(
    ledgers: Ledgers, lose: Callable[[Ledgers, Lease], None]
) -> None:
    ledgers.enqueue({})
    old = ledgers.open()
    worker = enter(old)
    lease = claimed(old, worker)
    old.write(lease, epoch(0))
    lose(ledgers, lease)
    before = rows_of(ledgers.first, lease.trial_id)
    changes = Changes(
        params={"lr": (0.5, '{"name": "FloatDistribution", "attributes": {}}')},
        user={"metrics": 1},
        system={"constraints": [1.0]},
        steps={0: 0.9, 1: 0.9},
        epochs={1: {"seconds": 1.0, "samples": 1, "metrics": {}}},
    )
    with pytest.raises(LeaseLostError):
        old.write(lease, changes, seconds=99.0)
    for state, end in [(TrialState.COMPLETE, "complete"), (TrialState.FAIL, "failed")]:
        with pytest.raises(LeaseLostError):
            old.finish(lease, changes, state=state, values=[0.9], end=end, seconds=99.0)
    with pytest.raises(LeaseLostError):
        release(old, lease)
    assert rows_of(ledgers.first, lease.trial_id) == before
    assert all(a["seconds"] < 99 for a in ledgers.first.attempts())
    assert changes.steps, "what was not written is still there"


def test_the_heartbeat_of_a_lost_lease_says_so_but_the_worker_counts_as_alive(
    ledgers: Ledgers,
) -> None:
    ledgers.enqueue({})
    worker = enter(ledgers.first)
    lease = claimed(ledgers.first, worker)
    _went_to_another(ledgers, lease)
    assert {w["worker_id"]: w["state"] for w in ledgers.first.workers()}["worker"] == "lost"
    with pytest.raises(LeaseLostError):
        ledgers.first.beat(worker, "idle", lease)
    assert {w["worker_id"]: w["state"] for w in ledgers.first.workers()}["worker"] == "idle"


def test_the_heartbeat_of_a_lease_cannot_bring_back_a_trial_that_ended(ledgers: Ledgers) -> None:
    ledgers.enqueue({})
    worker = enter(ledgers.first)
    lease = claimed(ledgers.first, worker)
    complete(ledgers.first, lease)
    with pytest.raises(LeaseLostError):
        ledgers.first.beat(worker, "idle", lease)
    assert ledgers.first.running() == 0
    assert ledgers.first.trial(lease.trial_id).state == TrialState.COMPLETE


# Leases that run out


def test_a_lease_runs_out_in_its_time_and_the_trial_waits_again(ledgers: Ledgers) -> None:
    ledgers.enqueue({})
    ledger = ledgers.open(lease_seconds=0.5)
    worker = enter(ledger)
    began = time.monotonic()
    lease = claimed(ledger, worker)
    while not (reaped := ledger.reap()):
        assert time.monotonic() - began < 30
        time.sleep(0.02)
    assert reaped == [lease.number]
    assert time.monotonic() - began >= 0.5
    assert ledger.trial(lease.trial_id).state == TrialState.WAITING
    assert ledger.attempts()[0]["reason"] == "lease ran out"


def test_every_write_and_heartbeat_renews_the_lease(ledgers: Ledgers) -> None:
    ledgers.enqueue({})
    ledger = ledgers.open(lease_seconds=100)
    worker = enter(ledger)
    lease = claimed(ledger, worker)
    ends = [ledger.attempts()[0]["lease_until"]]
    for kind in ("heartbeat", "write"):
        time.sleep(0.02)
        if kind == "heartbeat":
            ledger.beat(worker, "idle", lease)
        else:
            ledger.write(lease, Changes())
        ends.append(ledger.attempts()[0]["lease_until"])
        row = ledger.attempts()[0]
        assert row["lease_until"] - row["heartbeat_at"] == pytest.approx(100, abs=0.5)
    assert ends == sorted(set(ends))


def test_only_leases_that_ran_out_are_reaped(ledgers: Ledgers) -> None:
    ledgers.enqueue({}, {})
    silent = claimed(ledgers.first, enter(ledgers.first, "silent"))
    alive = claimed(ledgers.first, enter(ledgers.first, "alive"))
    expire(ledgers.first, "silent")
    assert ledgers.first.reap() == [silent.number]
    assert ledgers.first.reap() == []
    ledgers.first.write(alive, Changes())


def test_a_worker_known_to_be_dead_is_reaped_at_once(ledgers: Ledgers) -> None:
    ledgers.enqueue({}, {})
    dead, alive = enter(ledgers.first, "dead"), enter(ledgers.first, "alive")
    lease = claimed(ledgers.first, dead)
    claimed(ledgers.first, alive)
    earlier = (dead[0], dead[1] - 1)
    assert ledgers.first.reap([earlier]) == [], "another process of that name"
    assert ledgers.first.reap([dead]) == [lease.number]
    assert ledgers.first.attempts(lease.trial_id)[0]["reason"] == "process gone"
    assert {w["worker_id"]: w["state"] for w in ledgers.first.workers()} == {
        "alive": "training",
        "dead": "lost",
    }


def test_many_reapers_put_a_trial_back_once(ledgers: Ledgers) -> None:
    ledgers.enqueue({}, {}, {})
    for number in range(3):
        claimed(ledgers.first, enter(ledgers.first, f"worker {number}"))
    expire(ledgers.first)
    each = [ledgers.open() for _ in range(4)]
    found = at_once(lambda n: each[n].reap(), 4)
    assert sorted(sum(found, [])) == [0, 1, 2]
    assert [a["end"] for a in ledgers.first.attempts()] == ["lost"] * 3


def test_a_trial_that_kills_its_workers_ends(ledgers: Ledgers) -> None:
    ledgers.enqueue({})
    worker = enter(ledgers.first)
    for _ in range(MAX_LOST):
        lease = claimed(ledgers.first, worker)
        expire(ledgers.first)
        ledgers.first.reap()
    assert ledgers.first.claim(worker) is None
    trial = ledgers.first.trial(lease.trial_id)
    assert (trial.state, trial.values, trial.user_attrs["reason"]) == (
        TrialState.FAIL,
        None,
        "lost",
    )
    assert trial.datetime_complete is not None
    assert lease.attempt == MAX_LOST


def test_a_restarted_worker_does_not_get_back_a_trial_that_killed_it_too_often(
    ledgers: Ledgers,
) -> None:
    ledgers.enqueue({}, {})
    numbers = [claimed(ledgers.first, enter(ledgers.first)).number for _ in range(MAX_LOST + 1)]
    assert numbers == [0] * MAX_LOST + [1]
    assert ledgers.first.trials()[0].user_attrs["reason"] == "lost"


def test_a_trial_that_makes_progress_may_lose_more_workers(ledgers: Ledgers) -> None:
    ledgers.enqueue({})
    worker = enter(ledgers.first)
    for number in range(MAX_LOST + 3):
        lease = claimed(ledgers.first, worker)
        ledgers.first.write(lease, epoch(number))
        expire(ledgers.first)
        assert ledgers.first.reap() == [0]
    assert claimed(ledgers.first, worker).attempt == MAX_LOST + 4


def test_epochs_trained_again_are_no_progress(ledgers: Ledgers) -> None:
    ledgers.enqueue({})
    worker = enter(ledgers.first)
    for _ in range(MAX_LOST + 1):
        lease = claimed(ledgers.first, worker)
        for number in range(3):
            ledgers.first.write(lease, epoch(number))
        expire(ledgers.first)
        ledgers.first.reap()
    assert ledgers.first.claim(worker) is None
    assert ledgers.first.trials()[0].state == TrialState.FAIL


# What an earlier attempt left


def test_epochs_trained_again_take_the_place_of_those_of_the_lost_attempt(
    ledgers: Ledgers,
) -> None:
    ledgers.enqueue({})
    worker = enter(ledgers.first)
    first = claimed(ledgers.first, worker)
    for number in range(4):
        ledgers.first.write(first, epoch(number, 0.1))
    expire(ledgers.first)
    ledgers.first.reap()
    second = claimed(ledgers.first, worker)
    for number in range(2, 4):
        ledgers.first.write(second, epoch(number, 0.2))
    found = ledgers.first.epochs(second.trial_id)
    assert [(e["epoch"], e["token"]) for e in found] == [
        (0, first.token),
        (1, first.token),
        (2, second.token),
        (3, second.token),
    ]
    trial = ledgers.first.trial(second.trial_id)
    assert trial.intermediate_values == {0: 0.1, 1: 0.1, 2: 0.2, 3: 0.2}


def test_epochs_that_only_a_lost_attempt_reached_do_not_count_in_the_end(
    ledgers: Ledgers,
) -> None:
    ledgers.enqueue({})
    worker, fenced = enter(ledgers.first), ledgers.fenced()
    first = claimed(ledgers.first, worker)
    for number in range(5):
        ledgers.first.write(first, epoch(number, 0.9))
    expire(ledgers.first)
    ledgers.first.reap()
    second = claimed(ledgers.first, worker)
    fenced.take(second)
    for number in range(1, 3):
        fenced.set_trial_intermediate_value(second.trial_id, number, 0.2)
        fenced.note_epoch(second.trial_id, number, epoch(number).epochs[number])
        fenced.flush(second.trial_id)
    fenced.finish(second.trial_id, TrialState.PRUNED, None, end="pruned")
    ended = ledgers.first.trials()[0]
    assert ended.intermediate_values == {0: 0.9, 1: 0.2, 2: 0.2}
    assert ended.value == 0.2
    assert [e["epoch"] for e in ledgers.first.epochs(second.trial_id)] == [0, 1, 2]


def test_a_trial_put_back_keeps_what_it_has_and_its_first_start(ledgers: Ledgers) -> None:
    ledgers.enqueue({})
    fenced, worker = ledgers.fenced(), enter(ledgers.first)
    lease = claimed(ledgers.first, worker)
    trial = ledgers.trial(fenced, lease)
    rate = trial.suggest_float("lr", 0.0, 1.0)
    trial.set_user_attr("seconds", 2.5)
    trial.report(0.5, 0)
    fenced.finish(lease.trial_id, TrialState.WAITING, None, end="preempted", reason="signal")
    waiting = ledgers.first.trials()[0]
    assert waiting.state == TrialState.WAITING
    assert (waiting.params, waiting.values) == ({"lr": rate}, None)
    again = claimed(ledgers.first, worker)
    assert (again.number, again.attempt) == (0, 2)
    resumed = ledgers.trial(fenced, again)
    assert resumed.suggest_float("lr", 0.0, 1.0) == rate
    assert resumed.user_attrs == {"seconds": 2.5}
    assert resumed.datetime_start == waiting.datetime_start is not None
    assert ledgers.first.attempts()[0]["reason"] == "signal"


def test_a_trial_of_another_worker_cannot_be_written_through_optuna(ledgers: Ledgers) -> None:
    ledgers.enqueue({})
    lease = claimed(ledgers.first, enter(ledgers.first))
    with pytest.raises(RuntimeError, match="no lease"):
        ledgers.fenced().set_trial_user_attr(lease.trial_id, "key", 1)
    with pytest.raises(RuntimeError, match="tickets"):
        ledgers.fenced().create_new_trial(ledgers.first.study_id)


def test_one_trial_cannot_have_two_holders_whatever_the_program_does(ledgers: Ledgers) -> None:
    ledgers.enqueue({})
    lease = claimed(ledgers.first, enter(ledgers.first))
    row = {k: v for k, v in ledgers.first.attempts()[0].items() if k != "token"}
    with (
        pytest.raises(sa.exc.IntegrityError),
        ledgers.first.engine.begin() as connection,
    ):
        connection.execute(sa.insert(attempts).values(row | {"worker_id": "second"}))
    ledgers.first.write(lease, Changes())


def test_studies_in_one_storage_do_not_meet(tables: str) -> None:
    one, two = Ledgers(tables), Ledgers(tables)
    one.enqueue({}, {})
    two.enqueue({})
    here, there = enter(one.first), enter(two.first)
    lease = claimed(one.first, here)
    other = claimed(two.first, there)
    expire(one.first)
    assert two.first.reap() == []
    assert one.first.reap() == [lease.number]
    two.first.write(other, Changes())
    two.first.give_order("stop")
    assert claimed(one.first, here).number == lease.number
    for ledgers in (one, two):
        ledgers.close()
