"""Many trials at a time: claimed together, kept alive together, ended in one transaction."""

from __future__ import annotations

from ledgers import Ledgers, Worker, at_once, claimed, complete, enter, expire, rows_of
from optuna.trial import TrialState

from tuner.ledger import Changes, Ending, Lease, Ledger

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
