"""Workers without training: claim trials, give them back, run the next one."""

from __future__ import annotations

import itertools
import os
from typing import Any

from optuna.trial import Trial, TrialState

from tuner.datasets import Data
from tuner.ledger import Lease
from tuner.pulse import Pulse
from tuner.rungs.attempt import Attempt
from tuner.rungs.full import run
from tuner.rungs.outcome import Outcome, Slot
from tuner.rungs.peers import Peers
from tuner.session import Session
from tuner.tickets import next_lease

_names = itertools.count()


def lease(session: Session) -> Lease | None:
    """A lease for a worker nobody heard of before."""
    return next_lease(session, (f"worker-{os.getpid()}-{next(_names)}", 1))


def claim(session: Session) -> Trial | None:
    """The next trial, claimed and ready to be written to."""
    claimed = lease(session)
    if claimed is None:
        return None
    return Attempt(session, claimed, Pulse(session.ledger, (claimed.worker_id, 1))).trial


def give_back(session: Session, trial: Trial) -> None:
    """Put a claimed trial back into the queue."""
    session.fenced.finish(trial._trial_id, TrialState.WAITING, None, end="preempted")


def slot(session: Session, data: Data, claimed: Lease) -> Slot:
    """A slot on the processor, its heart not beating."""
    pulse = Pulse(session.ledger, (claimed.worker_id, claimed.generation))
    return Slot(session, pulse, data, "cpu", Peers(session))


def run_alone(own: Slot, claimed: Lease, **options: Any) -> Outcome:
    """Run the trial of a lease to its end."""
    options.setdefault("stop", lambda: False)
    running = run(own, claimed, **options)
    while True:
        try:
            next(running)
        except StopIteration as end:
            outcome: Outcome = end.value
            return outcome


def run_next(session: Session, data: Data, **options: Any) -> Outcome:
    """Run the next trial to its end."""
    claimed = lease(session)
    assert claimed is not None
    return run_alone(slot(session, data, claimed), claimed, **options)
