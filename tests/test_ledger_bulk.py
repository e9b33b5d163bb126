"""Many trials at a time: claimed together, kept alive together, ended in one transaction."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from ledgers import (
    OF_A_TRIAL,
    Ledgers,
    Worker,
    at_once,
    claimed,
    complete,
    enter,
    epoch,
    expire,
    rows_of,
)
from optuna.distributions import FloatDistribution, distribution_to_json
from optuna.trial import TrialState

from tuner.ledger import Changes, Ending, Lease, LeaseLostError, Ledger, _cohort
from tuner.ledger import _tables as ours
from tuner.ledger._optuna import STEPS, TRIALS

KIND = distribution_to_json(FloatDistribution(0.0, 1.0))
HEAD = {"fidelity": "head"}


def ending(lease: Lease, value: float = 0.5, state: str = "PRUNED", **facts: str) -> Ending:
    changes = Changes(user={"seen": lease.number}, params={}, steps={0: value})
    told = {"end": "pruned", "reason": "head", **facts}
    return Ending(lease, changes, state=state, values=[value], seconds=2.0, **told)


def cohort(ledger: Ledger, worker: Worker, most: int) -> list[Lease]:
    """A trial, and others of its rung."""
    first = claimed(ledger, worker)
    return [first, *ledger.claim_alike(worker, "head", most - 1)]


def test_only_waiting_trials_of_the_rung_are_claimed_and_no_more_than_asked_for(
    ledgers: Ledgers,
) -> None:
    ledgers.enqueue({}, HEAD, {"fidelity": "deferred"}, HEAD, HEAD, HEAD)
    worker = enter(ledgers.first)
    assert [lease.number for lease in ledgers.first.claim_alike(worker, "head", 3)] == [1, 3, 4]
    assert [lease.number for lease in ledgers.first.claim_alike(worker, "head", 3)] == [5]
    assert ledgers.first.claim_alike(worker, "head", 3) == []
    assert claimed(ledgers.first, enter(ledgers.first, "other")).number == 0


def test_workers_that_claim_at_once_share_no_trial(ledgers: Ledgers) -> None:
    ledgers.enqueue(*[HEAD] * 40)
    each = [ledgers.open() for _ in range(4)]
    workers = [enter(ledger, f"worker {n}") for n, ledger in enumerate(each)]
    found = at_once(lambda n: each[n].claim_alike(workers[n], "head", 16), 4)
    numbers = [lease.number for leases in found for lease in leases]
    assert sorted(numbers) == sorted(set(numbers))
    rest = ledgers.first.claim_alike(enter(ledgers.first, "late"), "head", 40)
    assert sorted(numbers + [lease.number for lease in rest]) == list(range(40))


def test_all_endings_are_written_and_their_seconds_counted(ledgers: Ledgers) -> None:
    ledgers.enqueue(*[HEAD] * 5)
    leases = cohort(ledgers.first, enter(ledgers.first), 5)
    assert ledgers.first.finish_all([ending(each, each.number / 10) for each in leases]) == []
    trials = ledgers.first.trials()
    assert {t.state for t in trials} == {TrialState.PRUNED}
    assert [t.values for t in trials] == [[n / 10] for n in range(5)]
    assert [t.user_attrs["seen"] for t in trials] == list(range(5))
    assert {(a["end"], a["reason"], a["seconds"]) for a in ledgers.first.attempts()} == {
        ("pruned", "head", 2.0)
    }
    limited = ledgers.open(limits=type(ledgers.first.limits)(gpu_hours=10 / 3600))
    assert limited.order().reason == "gpu_hours"


def test_trials_that_went_to_others_are_left_alone_and_the_rest_is_written(
    ledgers: Ledgers,
) -> None:
    ledgers.enqueue(*[HEAD] * 4)
    slow, quick = enter(ledgers.first, "slow"), enter(ledgers.first, "quick")
    leases = cohort(ledgers.first, slow, 4)
    expire(ledgers.first, "slow")
    ledgers.first.reap()
    taken = claimed(ledgers.first, quick)
    complete(ledgers.first, taken, 0.9)
    again = [lease for lease in leases if lease.number != taken.number]
    kept = ledgers.first.claim_alike(slow, "head", 2)
    before = rows_of(ledgers.first, taken.trial_id)
    assert ledgers.first.finish_all([ending(each) for each in (leases[0], *kept)]) == [leases[0]]
    assert rows_of(ledgers.first, taken.trial_id) == before
    states = {t.number: t.state for t in ledgers.first.trials()}
    assert states[taken.number] == TrialState.COMPLETE
    assert [states[lease.number] for lease in kept] == [TrialState.PRUNED] * 2
    assert [states[lease.number] for lease in again].count(TrialState.WAITING) == 1


def test_endings_whose_answer_was_lost_are_written_once(ledgers: Ledgers) -> None:
    ledgers.enqueue(*[HEAD] * 3)
    leases = cohort(ledgers.first, enter(ledgers.first), 3)
    for _ in range(2):
        assert ledgers.first.finish_all([ending(each) for each in leases]) == []
    limits = type(ledgers.first.limits)(gpu_hours=6.5 / 3600)
    assert ledgers.open(limits=limits).order().state == "run", "three times 2 s were spent"


def test_a_claim_whose_answer_was_lost_is_answered_again_one_by_one(ledgers: Ledgers) -> None:
    ledgers.enqueue(*[HEAD] * 3)
    worker = enter(ledgers.first)
    unheard = ledgers.first.claim_alike(worker, "head", 2)
    assert claimed(ledgers.first, worker) in unheard


def test_a_heartbeat_keeps_the_whole_cohort_alive(ledgers: Ledgers) -> None:
    ledgers.enqueue(*[HEAD] * 4)
    worker = enter(ledgers.first)
    first, *others = cohort(ledgers.first, worker, 4)
    expire(ledgers.first)
    ledgers.first.beat(worker, "idle", first, others)
    assert ledgers.first.reap() == []
    expire(ledgers.first)
    ledgers.first.beat(worker, "idle", first)
    assert ledgers.first.reap() == [lease.number for lease in others]


def test_what_is_put_back_waits_with_its_rung(ledgers: Ledgers) -> None:
    ledgers.enqueue(*[HEAD] * 2)
    worker = enter(ledgers.first)
    leases = cohort(ledgers.first, worker, 2)
    back = [Ending(lease, Changes(), state="WAITING", end="preempted") for lease in leases]
    assert ledgers.first.finish_all(back) == []
    again = ledgers.first.claim_alike(worker, "head", 9)
    assert [(lease.number, lease.attempt) for lease in again] == [(0, 2), (1, 2)]


# As one by one, but in few statements


@contextlib.contextmanager
def statements(ledger: Ledger) -> Iterator[list[str]]:
    """What is sent to the database; psycopg sends as many statements as there are rows."""
    found: list[str] = []
    alone = ledger.engine.dialect.name == "postgresql"

    def note(_: Any, __: Any, text: str, given: Any, *___: Any) -> None:
        found.extend([text] * (len(given) if isinstance(given, list) and alone else 1))

    sa.event.listen(ledger.engine, "before_cursor_execute", note)
    yield found
    sa.event.remove(ledger.engine, "before_cursor_execute", note)


def statements_of_a_cohort(ledgers: Ledgers, size: int) -> int:
    ledgers.enqueue(*[HEAD] * size)
    worker, fenced = enter(ledgers.first, f"worker of {size}"), ledgers.fenced()
    first = claimed(ledgers.first, worker)
    with statements(ledgers.first) as found:
        leases = [first, *ledgers.first.claim_alike(worker, "head", size - 1)]
        fenced.take(*leases)
        ledgers.first.beat(worker, "idle", None, leases)
        assert fenced.finish_all([ending(each, each.number / 100) for each in leases]) == []
    ended = ledgers.first.trials()[-size:]
    assert [t.value for t in ended] == [t.number / 100 for t in ended]
    return len(found)


def test_many_trials_take_as_many_statements_as_few(ledgers: Ledgers) -> None:
    few, many = statements_of_a_cohort(ledgers, 8), statements_of_a_cohort(ledgers, 64)
    assert few == many < 30


def end_one_by_one(ledger: Ledger, endings: list[Ending]) -> list[Lease]:
    lost = []
    for each in endings:
        try:
            ledger.finish(
                each.lease,
                each.changes,
                state=TrialState[each.state],
                values=each.values,
                end=each.end,
                reason=each.reason,
                detail=each.detail,
                seconds=each.seconds,
            )
        except LeaseLostError:
            lost.append(each.lease)
    return lost


def end_together(ledger: Ledger, endings: list[Ending]) -> list[Lease]:
    return ledger.finish_all(endings)


def lose(ledger: Ledger, lease: Lease) -> None:
    """Let another worker have the trial, and end it."""
    past = sa.update(ours.attempts).where(ours.attempts.c.token == lease.token)
    with ledger.engine.begin() as connection:
        connection.execute(past.values(lease_until=0.0))
    assert ledger.reap() == [lease.number]
    complete(ledger, claimed(ledger, enter(ledger, "another")), 0.9)


def every_way_to_end(ledgers: Ledgers) -> list[Ending]:
    """A cohort that ends in every way at once; two of its leases are lost."""
    ledgers.enqueue(*[HEAD] * 9)
    ledger, worker = ledgers.first, enter(ledgers.first)
    earlier = claimed(ledger, worker)
    for number in range(5):
        ledger.write(earlier, epoch(number))
    assert ledger.reap([worker]) == [0]
    leases = cohort(ledger, worker, 9)
    full = Changes(
        params={"b": (0.5, KIND), "a": (0.25, KIND)},
        user={"text": "ünïcode ✓ %s", "long": "x" * 5000},
        system={"constraints": [1.0]},
        steps={0: math.inf, 3: math.nan},
        epochs={0: epoch(0).epochs[0], 3: epoch(3).epochs[3]},
    )
    ends: list[tuple[Changes, str, str, list[float] | None]] = [
        (epoch(1), "PRUNED", "pruned", [0.5]),
        (full, "COMPLETE", "complete", [-math.inf]),
        (Changes(user={"reason": "not_finite"}), "FAIL", "failed", None),
        (Changes(user={"kept": True}), "WAITING", "preempted", [0.5]),
        (epoch(0), "PRUNED", "pruned", [0.5]),
        (epoch(0), "PRUNED", "pruned", [0.5]),
        (epoch(0), "COMPLETE", "complete", [0.25]),
        (Changes(), "COMPLETE", "complete", [0.125]),
        (Changes(system={"b": 1}), "PRUNED", "pruned", []),
    ]
    endings = [
        Ending(lease, *facts, reason=f"reason {n}", detail="d" * n or None, seconds=1.0 + n)
        for n, (lease, facts) in enumerate(zip(leases, ends, strict=True))
    ]
    ledgers.plain().tell(4, 0.75)
    lose(ledger, leases[5])
    end_one_by_one(ledger, [endings[6]])
    return endings


def left_by(ledger: Ledger) -> list[Any]:
    """What all tables have of a study; of ids and times, whether they are there."""
    found: list[Any] = []
    with ledger.engine.begin() as connection:
        trials = connection.execute(
            sa.select(TRIALS.c.trial_id)
            .where(TRIALS.c.study_id == ledger.study_id)
            .order_by(TRIALS.c.number)
        )
        for trial_id in trials.scalars().all():
            for table in (*OF_A_TRIAL, ours.attempts):
                own = sa.select(table).where(table.c.trial_id == trial_id)
                rows = connection.execute(own.order_by(*table.primary_key.columns))
                found += [(table.name, without_fleeting(row._asdict())) for row in rows]
        spent = sa.select(ours.controls.c.spent)
        found += connection.execute(spent.where(ours.controls.c.study_id == ledger.study_id)).all()
    return found


def without_fleeting(row: dict[str, Any]) -> dict[str, Any]:
    fleeting = re.compile("_id$|_at$|^datetime|^token$|^holds$|^lease_until$")
    return {k: v is not None if fleeting.search(k) else v for k, v in row.items()}


@pytest.mark.parametrize("chunk", [2, _cohort.CHUNK])
def test_a_cohort_leaves_what_its_trials_leave_that_end_one_by_one(
    ledgers: Ledgers, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cohort, "CHUNK", chunk)
    found = []
    for ends in (end_one_by_one, end_together):
        with contextlib.closing(Ledgers(ledgers.url)) as own:
            endings = every_way_to_end(own)
            lost = [lease.number for lease in ends(own.first, endings)]
            found.append((lost, [bool(each.changes) for each in endings], left_by(own.first)))
    assert found[0] == found[1]
    assert found[0][0] == [4, 5]
    steps = [row["step"] for table, row in found[0][2][:-1] if table == STEPS.name]
    assert steps[:3] == [0, 1, 0], "beyond is what the attempt that was lost reached"
