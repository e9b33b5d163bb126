"""A worker's heartbeat: it renews, hears orders, finds the dead, and never the merely silent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import pytest
from conftest import MakeSession
from fleet import lease
from ledgers import expire
from optuna.trial import TrialState

from tuner.ledger import Lease
from tuner.pulse import BEATS_PER_LEASE, Contact, Pulse, facts, is_gone
from tuner.session import Session


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that have passed, to be set by the test."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def beating(session: Session, held: Lease) -> Pulse:
    found = Pulse(session.ledger, (held.worker_id, held.generation))
    found.hold(held)
    return found


def member(session: Session, name: str, **told: Any) -> tuple[str, int]:
    """A worker that registered; what it told of itself may be made up."""
    return name, session.ledger.register(name, facts("cpu") | told)


def claimed(session: Session, worker: tuple[str, int]) -> Lease:
    found = session.ledger.claim(worker)
    assert found is not None
    return found


def test_contact_is_steady_after_a_lease_of_answers(clock: list[float]) -> None:
    contact = Contact(10.0)
    answers = []
    for _ in range(7):
        clock[0] += 2.5
        answers.append(contact.is_steady())
    assert answers == [False] * 4 + [True] * 3


def test_contact_begins_anew_after_an_outage_or_a_sleep(clock: list[float]) -> None:
    contact = Contact(10.0)
    for _ in range(8):
        clock[0] += 2.5
        contact.is_steady()
    clock[0] += 60
    answers = [contact.is_steady()]
    for _ in range(5):
        clock[0] += 2.5
        answers.append(contact.is_steady())
    assert answers == [False] * 5 + [True]


def test_overdue_lease_is_not_taken_before_its_worker_had_the_time_to_renew_it(
    make_session: MakeSession, clock: list[float]
) -> None:
    session = make_session()
    silent, other = member(session, "silent", machine="elsewhere"), member(session, "other")
    claimed(session, silent)
    expire(session.ledger)
    beats = Pulse(session.ledger, other)
    running = []
    for _ in range(6):
        beats.beat()
        running.append(len(session.trials(TrialState.RUNNING)))
        clock[0] += session.ledger.lease_seconds / BEATS_PER_LEASE
    assert running == [1] * 5 + [0]


def test_dead_process_of_this_machine_is_found_at_once(make_session: MakeSession) -> None:
    session = make_session()
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    dead = member(session, "dead", pid=int(gone.stdout), process=f"{gone.stdout.strip()} 1")
    alive = member(session, "alive")
    claimed(session, dead)
    kept = claimed(session, alive)
    beating(session, kept).beat()
    states = [t.state for t in session.study.trials[:2]]
    assert states == [TrialState.WAITING, TrialState.RUNNING]
    assert session.ledger.attempts()[0]["reason"] == "process gone"


def test_process_with_a_recycled_number_is_not_taken_for_the_worker() -> None:
    row = facts("cpu")
    assert not is_gone(row)
    assert is_gone(row | {"process": f"{os.getpid()} 1"})
    assert not is_gone(row | {"process": "1 1", "machine": "elsewhere"}), "nobody can know"


def test_beat_hears_the_order_and_the_loss_of_its_trial(make_session: MakeSession) -> None:
    session = make_session()
    worker = member(session, "one")
    held = claimed(session, worker)
    beats = beating(session, held)
    beats.beat()
    assert not beats.interrupts(held)
    session.ledger.give_order("pause")
    beats.beat()
    assert beats.order.state == "pause"
    assert beats.interrupts(held)
    session.ledger.give_order("run")
    session.ledger.reap([worker])
    beats.beat()
    assert beats.lost


def test_end_of_the_own_trial_is_no_loss(make_session: MakeSession) -> None:
    session = make_session()
    held = lease(session)
    assert held is not None
    session.ledger.register(held.worker_id, facts("cpu"))
    beats = beating(session, held)
    session.fenced.take(held)
    session.fenced.finish(held.trial_id, TrialState.COMPLETE, [0.5], end="complete")
    beats.drop()
    beats.beat()
    assert not beats.lost


def test_process_that_takes_over_the_name_is_noticed(make_session: MakeSession) -> None:
    session = make_session()
    first = member(session, "one")
    session.ledger.register("one", facts("cpu"), dead=True)
    beats = Pulse(session.ledger, first)
    beats.beat()
    assert beats.superseded
