"""The queue of a study: tickets, who works on which, and what goes back into it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from tuner.search import algorithm
from tuner.seeding import derive_seed
from tuner.study import PROGRESSIVE, distinct_grid

if TYPE_CHECKING:
    from tuner.session import Session

Ticket = tuple[dict[str, Any], dict[str, Any]]
"""Optuna parameters that are fixed beforehand, and user attributes."""

AHEAD = 64
GRACE_SECONDS = 60
MAX_BASELINES = 3
CALMER = 0.3


def fill_queue(session: Session) -> int:
    """Put tickets for the trials of the budget that are due and not there yet; their number.

    First the plain cross-entropy baseline, then one published default per loss, then the grid
    or free tickets for the algorithm. The progressive strategy's tickets are due rung by rung.
    At most ``AHEAD`` are put at a time: Optuna reads all waiting trials whenever it reads any.
    Call it under ``storage.exclusive``, so that nothing is queued twice.
    """
    trials = [t for t in session.trials() if "again" not in t.user_attrs]
    have = Counter(t.user_attrs.get("rung") for t in trials)
    due = []
    for params, attrs in _tickets(session):
        have[attrs.get("rung")] -= 1
        if have[attrs.get("rung")] < 0:
            due.append((params, attrs))
    due = due[:AHEAD] + _another_baseline(session)
    for params, attrs in due:
        session.study.enqueue_trial(params, user_attrs=attrs)
    return len(due)


def _another_baseline(session: Session) -> list[Ticket]:
    """A further baseline, beyond the budget, while those there are ended without a result.

    Without a baseline there is no floor and no answer. Each further one learns more slowly,
    where the space leaves the learning rate open.
    """
    tried = [t for t in session.trials() if t.user_attrs.get("baseline")]
    ended = (TrialState.PRUNED, TrialState.FAIL)
    if not 0 < len(tried) < MAX_BASELINES or any(t.state not in ended for t in tried):
        return []
    params = session.file.space.defaults(**_plain_loss(session))
    rates = {key: value for key, value in params.items() if key.endswith(".lr")}
    calmer = {
        key: session.file.space.within(key, value * CALMER ** len(tried))
        for key, value in rates.items()
    }
    return [(params | calmer, {"baseline": True, "again": len(tried)})]


def _plain_loss(session: Session) -> dict[str, str]:
    """The part that makes a default ticket the baseline's, if the space has it."""
    offered = "cross_entropy" in session.file.space.parts["loss"]
    return {"loss": "cross_entropy"} if offered else {}


def _tickets(session: Session) -> Iterator[Ticket]:
    file = session.file
    space, losses, budget = file.space, list(file.space.parts["loss"]), file.trials()
    yield space.defaults(**_plain_loss(session)), {"baseline": True}
    if file.search.algorithm == "grid":
        yield from ((params, {}) for params in distinct_grid(space)[: budget - 1])
        return
    if file.search.strategy == "progressive":
        yield from _progressive_tickets(session)
        return
    presets = [loss for loss in losses if loss != "cross_entropy"][: budget - 1]
    yield from ((space.defaults(loss=loss), {"preset": loss}) for loss in presets)
    yield from (({}, {}) for _ in range(budget - 1 - len(presets)))


def _progressive_tickets(session: Session) -> Iterator[Ticket]:
    """A quarter of the budget for every rung that is reached, its published default first."""
    file, space = session.file, session.file.space
    budget, size = divmod(file.trials() - 1, len(PROGRESSIVE))
    for rung, loss in enumerate(PROGRESSIVE):
        if rung > 0 and not _climbs(session, rung - 1, budget + (rung - 1 < size)):
            return
        natural = "natural" if "natural" in space.parts["sampler"] else "class_aware"
        names = {"loss": loss, "sampler": natural if rung < 3 else "class_aware"}
        open_ = {part: name for part, name in names.items() if len(space.parts[part]) > 1}
        for position in range(budget + (rung < size)):
            # The baseline is the published default of the first rung already.
            first = position == 0 and rung > 0
            params = space.defaults(**names) if first else open_
            yield params, {"rung": rung, **({"preset": loss} if first else {})}


def _climbs(session: Session, rung: int, size: int) -> bool:
    """Whether the progressive strategy goes on after a rung: its trials ended below the gate."""
    own = [t for t in session.trials() if t.user_attrs.get("rung") == rung]
    if len(own) < size or any(not t.state.is_finished() for t in own):
        return False
    return _best_tail(session) < session.file.search.gate


def _best_tail(session: Session) -> float:
    kind = "adjusted" if session.file.objective.adjusted else "raw"
    tails = [
        t.user_attrs["metrics"][kind]["tail_accuracy"] or 0.0
        for t in session.trials(TrialState.COMPLETE)
        if "metrics" in t.user_attrs and session.keeps_floor(t)
    ]
    return max(tails, default=0.0)


def ladder_state(session: Session) -> str | None:
    """Where the progressive strategy stands, in words; None for another strategy."""
    search = session.file.search
    if search.strategy != "progressive":
        return None
    rungs = {t.user_attrs["rung"] for t in session.trials() if "rung" in t.user_attrs}
    rung = max(rungs, default=0)
    passed = "reached" if _best_tail(session) >= search.gate else "not reached"
    return (
        f"rung {rung + 1} of {len(PROGRESSIVE)} ({PROGRESSIVE[rung]}), "
        f"gate {search.gate:.2f} {passed}"
    )


def claim(session: Session) -> Trial | None:
    """Take the next ticket, a baseline first; None when none is waiting.

    Exactly one process gets a ticket. It signs it before anything that takes time.
    """
    storage, study = session.study._storage, session.study
    tickets = session.trials(TrialState.WAITING)
    for waiting in sorted(tickets, key=lambda t: (not t.user_attrs.get("baseline"), t.number)):
        with contextlib.suppress(UpdateFinishedTrialError):
            if storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING):
                storage.set_trial_user_attr(waiting._trial_id, "worker", worker_name())
                seed = derive_seed(session.file.search.seed, "search", waiting.number)
                study.sampler = algorithm(session.file.search.algorithm, seed % 2**32)
                return Trial(study, waiting._trial_id)
    return None


def requeue(session: Session, trial_id: int) -> None:
    """Put a running trial back in the queue; it keeps its parameters and its checkpoint.

    Its signature goes first, so that the next worker's claim is not taken for the old one's. A
    trial that ended meanwhile stays ended.
    """
    storage = session.study._storage
    with contextlib.suppress(UpdateFinishedTrialError):
        storage.set_trial_user_attr(trial_id, "worker", None)
        storage.set_trial_state_values(trial_id, TrialState.WAITING)


def requeue_orphans(session: Session) -> list[int]:
    """Put back the running trials of workers of this machine that are gone; their numbers.

    Call it under ``storage.exclusive``.
    """
    gone = [t for t in session.trials(TrialState.RUNNING) if _is_orphan(t)]
    for trial in gone:
        requeue(session, trial._trial_id)
    return [trial.number for trial in gone]


def worker_name() -> str:
    """This process: host, process number and the moment it started, as JSON text."""
    pid = os.getpid()
    return json.dumps([socket.gethostname(), pid, _started(pid)])


def _is_orphan(trial: FrozenTrial) -> bool:
    """Whether the worker of a running trial, if it was one of this machine, is gone.

    A worker killed before it could sign its trial is taken for gone after a minute.
    """
    worker = trial.user_attrs.get("worker")
    if worker is None:
        started = trial.datetime_start
        return started is None or (datetime.now() - started).total_seconds() > GRACE_SECONDS
    host, pid, started_at = json.loads(worker)
    return bool(host == socket.gethostname() and _started(pid) != started_at)


def _started(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot; None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]
