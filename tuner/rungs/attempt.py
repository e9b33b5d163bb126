"""One try at a trial: what it reports is written with its lease, or not at all."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from optuna.trial import Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from tuner.engines import PATIENCE, passes
from tuner.ladder import rung_of
from tuner.ledger import Ending, Lease
from tuner.proposals import proposing
from tuner.pulse import Pulse
from tuner.session import Session
from tuner.trainer import EpochResult

LEAVING_SECONDS = 20.0

log = logging.getLogger(__name__)


class Attempt:
    """A claimed trial: Optuna's ``trial`` over a storage that collects what is written to it.

    Every method that writes raises ``LeaseLostError`` when the trial is another worker's by
    now; nothing is written then.
    """

    def __init__(
        self, session: Session, lease: Lease, pulse: Pulse, *, taken: bool = False
    ) -> None:
        self.session, self.lease, self.pulse = session, lease, pulse
        self.seconds = 0.0
        self.speed: float | None = None
        self.columns: dict[str, Any] = {}
        self.remarks: list[str] = []
        if not taken:
            session.fenced.take(lease)

    @cached_property
    def trial(self) -> Trial:
        """Optuna's trial; the algorithm begins to propose when it is asked for."""
        marks = {mark: mark in self.user_attrs for mark in ("plain", "unseen")}
        study = proposing(self.session, rung_of(self), self.number, **marks)
        return Trial(study, self.lease.trial_id)

    @property
    def user_attrs(self) -> dict[str, Any]:
        """The trial's user attributes, with what was collected."""
        return self.session.fenced.held[self.lease.trial_id].trial.user_attrs

    @property
    def number(self) -> int:
        """Number of the trial."""
        return self.lease.number

    def note(self, facts: dict[str, Any]) -> None:
        """Collect user attributes."""
        for key, value in facts.items():
            self.session.fenced.set_trial_user_attr(self.lease.trial_id, key, value)

    def remark(self, text: str) -> None:
        """Collect a note for the record of this attempt."""
        if text not in self.remarks:
            self.remarks.append(text)
        self.columns["note"] = "; ".join(self.remarks)

    def report(self, result: EpochResult, value: float, metrics: dict[str, Any]) -> None:
        """Collect an epoch: Optuna's intermediate value, and the metric vector."""
        self.session.fenced.set_trial_intermediate_value(self.lease.trial_id, result.epoch, value)
        row = {"seconds": result.seconds, "samples": result.samples, "metrics": metrics}
        self.session.fenced.note_epoch(self.lease.trial_id, result.epoch, row)
        if result.samples:
            self.speed = result.samples / max(result.seconds, 1e-9)

    def write(self, **columns: Any) -> None:
        """Write what was collected, and hear the order.

        A storage that does not answer is no reason to stop: what was not written is written
        with the next epoch.
        """
        self.columns |= columns
        try:
            order = self.session.fenced.flush(self.lease.trial_id, **self._progress())
        except SQLAlchemyError as error:
            if not passes(error):
                raise
            log.warning("trial %d: the storage does not answer; training goes on", self.number)
            return
        self.columns.clear()
        self.pulse.hear(order)

    def end(
        self,
        state: TrialState,
        end: str,
        *,
        value: float | None = None,
        reason: str | None = None,
        detail: str | None = None,
        patience: float = PATIENCE,
        **columns: Any,
    ) -> None:
        """Write everything and end the attempt; ``WAITING`` puts the trial back."""
        self.pulse.drop(self.lease)
        self.columns |= columns
        self.session.fenced.finish(
            self.lease.trial_id,
            state,
            None if value is None else [value],
            end=end,
            reason=reason,
            detail=detail,
            patience=patience,
            **self._progress(),
        )

    def give_back(self, end: str, reason: str, detail: str | None = None) -> None:
        """Put the trial back into the queue; it keeps its parameters and its checkpoint."""
        self.end(TrialState.WAITING, end, reason=reason, detail=detail, patience=LEAVING_SECONDS)

    def at_step(self, step: int, value: float) -> None:
        """Collect Optuna's intermediate value of a step."""
        self.session.fenced.set_trial_intermediate_value(self.lease.trial_id, step, value)

    def forget_writes(self) -> None:
        """Forget what was collected: the trial goes back as it was."""
        self.session.fenced.held[self.lease.trial_id].changes.clear()

    def ending(
        self, state: TrialState, end: str, reason: str | None, value: float | None = None
    ) -> Ending:
        """What ends this attempt together with others; see ``FencedStorage.finish_all``."""
        values = None if value is None else [value]
        changes = self.session.fenced.held[self.lease.trial_id].changes
        return Ending(self.lease, changes, state.name, end, values, reason, seconds=self.seconds)

    @property
    def is_lost(self) -> bool:
        """Whether a heartbeat found the trial to be another worker's."""
        return self.pulse.has_lost(self.lease)

    def why_stopped(self) -> str:
        """What made this worker stop before the end: a signal, or the fleet's order."""
        order = self.pulse.order
        return "signal" if order.state == "run" else f"{order.state}: {order.reason or 'asked for'}"

    def drop(self) -> None:
        """Forget the trial: it is another worker's."""
        self.pulse.drop(self.lease)
        self.session.fenced.drop(self.lease.trial_id)

    def _progress(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "speed": self.speed, **self.columns}


def attempts_at(session: Session, leases: Sequence[Lease], pulse: Pulse) -> list[Attempt]:
    """Attempts at the trials of leases, which are read together."""
    session.fenced.take(*leases)
    return [Attempt(session, lease, pulse, taken=True) for lease in leases]
