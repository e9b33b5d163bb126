"""Trials one after another on one device, until the budget is spent or somebody says stop."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from optuna.trial import TrialState

from tuner.compiled import is_wanted
from tuner.datasets import Data
from tuner.errors import NameTakenError, TunerError
from tuner.fit import check_data
from tuner.goals import stop_if_reached
from tuner.ledger import Lease, Ledger, Order, WorkerAliveError
from tuner.planned import all_planned
from tuner.pulse import Pulse, facts, is_gone
from tuner.rungs.full import run
from tuner.rungs.outcome import OnEpoch, Outcome, Slot
from tuner.rungs.peers import Peers
from tuner.rungs.shared import drop_unneeded
from tuner.rungs.turns import Entry, Turns
from tuner.session import Session
from tuner.slots import lanes_on
from tuner.tickets import next_lease

SHORTEST_WAIT, WAIT_SECONDS = 0.05, 1.0
"""Between two looks at an empty queue: first and at last. What ends a rung is often near."""
SAME_REQUEST = 1.0

OnCohort = Callable[[Sequence[Outcome], float], None]

log = logging.getLogger(__name__)


class StopRequest:
    """Whether somebody asked to stop: Ctrl-C or SIGTERM once; a second time stops at once.

    ``quiet`` leaves it to somebody else to say so. Service managers send SIGTERM to a whole group
    of processes, whose parent passes it on: what comes within a second is the same request.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.asked, self.since = False, 0.0
        self.quiet = quiet
        self.owner = os.getpid()

    def __call__(self) -> bool:
        """Whether to stop after the step at hand."""
        return self.asked

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self.owner:
            # A process that decodes images for this one: it ends with it, or when told to.
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self.asked:
            if number == signal.SIGTERM and time.monotonic() < self.since + SAME_REQUEST:
                return
            raise KeyboardInterrupt
        self.asked, self.since = True, time.monotonic()
        if not self.quiet:
            log.warning(
                "%s: finishing the step and keeping the trial; once more stops at once",
                signal.Signals(number).name,
            )

    @contextlib.contextmanager
    def installed(self) -> Iterator[StopRequest]:
        """Listen to SIGINT and SIGTERM inside the block."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def work(
    session: Session,
    data: Data,
    *,
    device: str = "cpu",
    name: str | None = None,
    threads: int = 1,
    lanes: int | None = None,
    wait: bool = True,
    stop: Callable[[], bool] = lambda: False,
    on_epoch: OnEpoch = lambda *_: None,
    on_trial: Callable[[Outcome], None] = lambda _: None,
    on_cohort: OnCohort | None = None,
) -> int:
    """Run trials until the study has none left or ``stop`` says so; the number that ended here.

    Args:
        session: The study.
        data: Its data, on ``device``.
        device: Where to train.
        name: Under which name to work; a worker that comes back under its name gets its trial
            back. By default one that nobody else has.
        threads: Threads for the processor. More make small models slower, up to 50-fold when
            processes share cores.
        lanes: Trials to train side by side at most; by default, on a GPU as ``TUNER_LANES`` says,
            else as many as the probe found to be worth it (see ``tuner.backends``), and one on
            a processor.
        wait: Whether to stay while others train the last trials, should they get lost.
        stop: Asked after every step.
        on_epoch: Called after every epoch with the trial, the result and the objective.
        on_trial: Called when a trial ended here.
        on_cohort: Called instead with the trials that ended here together, and the seconds
            that they took.

    Raises:
        DataError: The data are not the study's.
        TunerError: Three trials in a row failed with one error, or the name is taken, or
            ``TUNER_LANES`` or ``TUNER_COMPILE`` says nothing that is known.
    """
    most = lanes_on(device) if lanes is None else lanes
    is_wanted()  # what is no answer is refused before a trial is taken
    check_data(session.study.user_attrs, data, session.file.name)
    torch.set_num_threads(threads)
    worker = enter(session.ledger, name, device, stop)
    if worker is None:
        return 0
    with Pulse(session.ledger, worker) as pulse:
        slot = Slot(session, pulse, data, device, Peers(session), most=most)
        ended = _work(slot, wait, stop, on_epoch, _Telling(on_trial, on_cohort))
    if not stop():
        drop_unneeded(session)
    session.ledger.leave(worker)
    raise_if_broken(session, session.ledger.order())
    return ended


@dataclass(frozen=True)
class _Telling:
    """Whom to tell how trials ended, one by one or all of a cohort."""

    on_trial: Callable[[Outcome], None]
    on_cohort: OnCohort | None

    def __call__(self, outcomes: Sequence[Outcome], seconds: float) -> None:
        if len(outcomes) > 1 and self.on_cohort is not None:
            self.on_cohort(outcomes, seconds)
            return
        for outcome in outcomes:
            self.on_trial(outcome)


def _work(
    slot: Slot,
    wait: bool,
    stop: Callable[[], bool],
    on_epoch: OnEpoch,
    tell: _Telling,
) -> int:
    pulse, ended, turns, pause = slot.pulse, 0, Turns(slot), SHORTEST_WAIT

    def admit(lease: Lease) -> None:
        outcomes: list[Outcome] = []
        running = run(slot, lease, stop=stop, on_epoch=on_epoch, on_trial=outcomes.append)
        turns.admit(lease, running, outcomes)

    with contextlib.closing(turns):
        while not (leaving := stop() or pulse.superseded) or turns:
            if not leaving and turns.has_room:
                lease = _next(slot, turns)
                if lease is not None:
                    admit(lease)
                    pause = SHORTEST_WAIT
                elif not turns:
                    if _is_over(slot.session, wait):
                        break
                    time.sleep(pause)
                    pause = min(2 * pause, WAIT_SECONDS)
            for entry in turns.go_on():
                ended += _conclude(slot, entry, tell)
    if pulse.superseded:
        log.warning("another process works as %s now; this one leaves", pulse.worker[0])
    return ended


def _next(slot: Slot, turns: Turns) -> Lease | None:
    """The next trial to take in; an empty queue is not asked all the time while others train."""
    now = time.monotonic()
    if turns and now < slot.ask_again:
        return None
    beside = [entry.lease.token for entry in turns.entries]
    lease = next_lease(slot.session, slot.pulse.worker, beside)
    slot.ask_again = now + WAIT_SECONDS if lease is None else 0.0
    return lease


def _conclude(slot: Slot, entry: Entry, tell: _Telling) -> int:
    """Tell how a trial ended, and what ended beside it; how many did for good."""
    outcomes, slot.ask_again = entry.outcomes, 0.0
    if any(outcome.state == "complete" for outcome in outcomes):
        stop_if_reached(slot.session)
    tell(outcomes, time.monotonic() - entry.began)
    return sum(outcome.state not in ("interrupted", "lost") for outcome in outcomes)


def _is_over(session: Session, wait: bool) -> bool:
    """Whether there will be nothing to do, or somebody said so, once no ticket is to be had."""
    order = session.ledger.order()
    if order.state != "run":
        return order.state == "stop"
    return not (session.ledger.running() and wait)


def raise_if_broken(session: Session, order: Order) -> None:
    """Say so when the fleet was told to stop because every trial fails alike.

    Raises:
        TunerError: It was; the text holds the traceback.
    """
    if order.state == "stop" and order.reason == "code_error":
        raise TunerError(
            "three trials in a row failed with the same error, so the study is stopped; cure it, "
            f"then: tuner resume {session.file.name}\n{order.detail}"
        )


def enter(
    ledger: Ledger, name: str | None, device: str, stop: Callable[[], bool] = lambda: False
) -> tuple[str, int] | None:
    """Enter a worker into the ledger; its name and generation, None when told to ``stop``.

    A name whose process died is taken over. A name that is alive elsewhere may be about to
    leave: it is waited for until it shows a sign of life.

    Raises:
        NameTakenError: The name belongs to a worker that is alive.
    """
    worker_id = name or f"{socket.gethostname()}-{os.getpid()}-{os.urandom(2).hex()}"
    seen: float | None = None
    while True:
        try:
            return worker_id, ledger.register(worker_id, facts(device))
        except WorkerAliveError as error:
            row = error.row
        if is_gone(row):
            return worker_id, ledger.register(worker_id, facts(device), dead=True)
        if seen is not None and row["heartbeat_at"] > seen:
            raise NameTakenError(
                f"a worker {worker_id} is at work on {row['host']} (process {row['pid']}); "
                "give this one another --id, or stop that one"
            )
        if seen is None:
            log.warning("a worker %s was here a moment ago; waiting until it is gone", worker_id)
            seen = row["heartbeat_at"]
        if stop():
            return None
        time.sleep(WAIT_SECONDS)


def progress(session: Session) -> dict[str, Any]:
    """Counts of trials by state, and how many the budget allows."""
    found = Counter(trial.state for trial in session.trials())
    counts = {state.name.lower(): found[state] for state in TrialState}
    return {**counts, "budget": all_planned(session)}
