"""Trials one after another on one device, until the budget is spent or somebody says stop."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from optuna.trial import Trial, TrialState

from tuner.datasets import Data
from tuner.errors import TunerError
from tuner.rungs.full import Outcome, run
from tuner.session import Session, check_data
from tuner.storage import exclusive
from tuner.tickets import claim, fill_queue, requeue_orphans
from tuner.trainer import EpochResult

MAX_CODE_ERRORS = 3
WAIT_SECONDS = 1.0

log = logging.getLogger(__name__)


class StopRequest:
    """Whether somebody asked to stop: Ctrl-C or SIGTERM once; a second time stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self.owner = os.getpid()

    def __call__(self) -> bool:
        """Whether to stop after the epoch at hand."""
        return self.asked

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self.owner:
            # A process that decodes images for this one: it ends with it, or when told to.
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        log.warning(
            "%s: finishing the epoch and keeping the trial; once more stops at once",
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
    url: str,
    data: Data,
    *,
    device: str = "cpu",
    stop: Callable[[], bool] = lambda: False,
    on_epoch: Callable[[Trial, EpochResult, float], None] = lambda *_: None,
    on_trial: Callable[[Outcome], None] = lambda _: None,
) -> int:
    """Run trials until no ticket is left or ``stop`` says so; the number that ended here.

    Raises:
        DataError: The data are not the study's.
        TunerError: Three trials in a row failed with an error in the code.
    """
    check_data(session, data)
    _put_orphans_back(session, url)
    # More threads make these small models slower, up to 50-fold when processes share cores.
    torch.set_num_threads(1)
    ended, code_errors = 0, 0
    while not stop():
        trial = next_ticket(session, url, stop)
        if trial is None:
            break
        outcome = run(session, trial, data, device=device, stop=stop, on_epoch=on_epoch)
        on_trial(outcome)
        ended += outcome.state not in ("interrupted", "lost")
        code_errors = code_errors + 1 if outcome.reason == "code_error" else 0
        if code_errors == MAX_CODE_ERRORS:
            raise TunerError(f"three trials in a row failed; the last one with:\n{outcome.detail}")
    return ended


def next_ticket(session: Session, url: str, stop: Callable[[], bool]) -> Trial | None:
    """Claim a ticket; None when the study is done.

    A strategy that queues its tickets rung by rung waits for the trials other workers run.
    """
    while True:
        trial = claim(session)
        if trial is not None:
            return trial
        with exclusive(url):
            filled = fill_queue(session)
        if filled:
            continue
        if _put_orphans_back(session, url):
            continue
        others = session.trials(TrialState.RUNNING)
        if session.file.search.strategy == "plain" or not others or stop():
            return None
        time.sleep(WAIT_SECONDS)


def _put_orphans_back(session: Session, url: str) -> list[int]:
    with exclusive(url):
        numbers = requeue_orphans(session)
    for number in numbers:
        log.warning("trial %d lost its worker; it goes on from its last checkpoint", number)
    return numbers


def progress(session: Session) -> dict[str, Any]:
    """Counts of trials by state, and how many the budget allows."""
    trials = session.trials()
    counts = {state.name.lower(): sum(t.state == state for t in trials) for state in TrialState}
    return {**counts, "budget": session.file.trials()}
