"""The ledger of a study behind the proxy: every read and write is a call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from tuner.engines import PATIENCE, insist
from tuner.ledger import (
    LEASE_SECONDS,
    Changes,
    Ending,
    Lease,
    Ledger,
    Limits,
    Order,
    SupersededError,
)
from tuner.ledger._history import History, by_number
from tuner.proxy import _wire

SHORT = 2.0
QUICK_SECONDS = 5.0
# What one message may hold at the most.
ENDINGS = 32

T = TypeVar("T")


class RemoteLedger(Ledger):
    """``Ledger`` through the proxy at ``url``: the same methods, the same errors.

    Calls are tried again while the proxy or its database does not answer; where ``Ledger``
    raises an error of the database, this raises ``SQLAlchemyError``.
    """

    def __init__(
        self,
        url: str,
        study_id: int,
        *,
        limits: Limits = Limits(),  # noqa: B008  (frozen)
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        # Not the parent's: there is no engine here.
        self.url, self.study_id, self.limits = url, study_id, limits
        self.lease_seconds, self.patience = lease_seconds, PATIENCE
        self.history = History(study_id)
        self._reading = threading.Lock()

    def _call(
        self, method: str, *arguments: Any, patience: float = PATIENCE, **options: Any
    ) -> Any:
        content = _wire.dumps(
            {
                "protocol": _wire.PROTOCOL,
                "study": self.study_id,
                "limits": [self.limits.gpu_hours, self.limits.hours],
                "lease": self.lease_seconds,
                "method": method,
                "arguments": arguments,
                "options": options,
            }
        )
        seconds = QUICK_SECONDS if patience < QUICK_SECONDS else None
        return insist(
            lambda: self._once(content, seconds),
            patience=min(patience, self.patience),
            what="proxy",
        )

    def _once(self, content: bytes, seconds: float | None) -> Any:
        import grpc

        from tuner.remote._channel import channel_to

        call: Callable[..., bytes] = channel_to(self.url).unary_unary(_wire.CALL)
        try:
            return _wire.loads(call(content, timeout=seconds))
        except grpc.RpcError as error:
            details = str(error.details())
            _wire.raise_error(details)
            raise SQLAlchemyError(f"the proxy at {self.url} failed: {details}") from None

    def prepare(self) -> None:
        """See ``Ledger``."""
        self._call("prepare")

    def rest(self) -> None:
        """Do nothing: a call holds nothing once it is answered."""

    def enqueue(
        self, tickets: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], expected: int
    ) -> bool:
        """See ``Ledger``."""
        return bool(self._call("enqueue", tickets, expected))

    def claim(self, worker: tuple[str, int], beside: Sequence[int] = ()) -> Lease | None:
        """See ``Ledger``."""
        lease: Lease | None = self._call("claim", worker, list(beside))
        return lease

    def write(
        self, lease: Lease, changes: Changes, *, patience: float = SHORT, **progress: Any
    ) -> Order:
        """See ``Ledger``."""
        order: Order = self._call("write", lease, changes, patience=patience, **progress)
        changes.clear()
        return order

    def finish(
        self,
        lease: Lease,
        changes: Changes,
        *,
        state: TrialState,
        values: Sequence[float] | None = None,
        end: str,
        reason: str | None = None,
        detail: str | None = None,
        patience: float = PATIENCE,
        **progress: Any,
    ) -> None:
        """See ``Ledger``."""
        told = {"state": state.name, "end": end, "reason": reason, "detail": detail}
        exact = None if values is None else list(values)
        self._call("finish", lease, changes, patience=patience, values=exact, **told, **progress)
        changes.clear()

    def claim_alike(self, worker: tuple[str, int], rung: str, most: int) -> list[Lease]:
        """See ``Ledger``."""
        return list(self._call("claim_alike", worker, rung, most))

    def finish_all(self, endings: Sequence[Ending], *, patience: float = PATIENCE) -> list[Lease]:
        """See ``Ledger``."""
        lost: list[Lease] = []
        for begin in range(0, len(endings), ENDINGS):
            page = endings[begin : begin + ENDINGS]
            lost += self._call("finish_all", page, patience=patience)
        for ending in endings:
            ending.changes.clear()
        return lost

    def reap(self, dead: Sequence[tuple[str, int]] = (), *, overdue: bool = True) -> list[int]:
        """See ``Ledger``."""
        return list(self._call("reap", dead, overdue=overdue, patience=SHORT))

    def register(self, worker_id: str, facts: dict[str, Any], *, dead: bool = False) -> int:
        """See ``Ledger``."""
        return int(self._call("register", worker_id, facts, dead=dead))

    def beat(
        self,
        worker: tuple[str, int],
        state: str,
        lease: Lease | None = None,
        others: Sequence[Lease] = (),
    ) -> Order:
        """See ``Ledger``."""
        told = (worker, state, lease, list(others))
        order: Order = self._call("beat", *told, patience=self.lease_seconds)
        return order

    def leave(self, worker: tuple[str, int]) -> None:
        """See ``Ledger``."""
        try:
            self._call("leave", worker, patience=SHORT)
        except (SupersededError, SQLAlchemyError):
            return

    def workers(self) -> list[dict[str, Any]]:
        """See ``Ledger``."""
        return list(self._call("workers"))

    def running(self) -> int:
        """See ``Ledger``."""
        return int(self._call("running"))

    def alive(self) -> list[dict[str, Any]]:
        """See ``Ledger``."""
        return list(self._call("alive"))

    def ready(self) -> bool:
        """See ``Ledger``."""
        return bool(self._call("ready"))

    def standing(self) -> Order:
        """See ``Ledger``."""
        order: Order = self._call("standing")
        return order

    def order(self) -> Order:
        """See ``Ledger``."""
        order: Order = self._call("order")
        return order

    def give_order(
        self,
        state: str,
        reason: str | None = None,
        detail: str | None = None,
        *,
        unless_given: bool = False,
    ) -> Order:
        """See ``Ledger``."""
        order: Order = self._call("give_order", state, reason, detail, unless_given=unless_given)
        return order

    def trials(self, states: tuple[TrialState, ...] | None = None) -> list[FrozenTrial]:
        """See ``Ledger``."""
        wanted = tuple(TrialState) if states is None else states
        waiting = [state for state in wanted if not state.is_finished()]
        with self._reading:
            # As the ledger itself reads: what ends between the two calls is in both of them.
            rest = self.unfinished(waiting) if waiting else []
            self._read_ended()
            found = self.history.known_in(tuple(s for s in wanted if s.is_finished()))
            found += [trial for trial in rest if trial._trial_id not in self.history.known]
        return sorted(found, key=by_number) if rest else found

    def ended(self, states: tuple[TrialState, ...]) -> list[FrozenTrial]:
        """See ``Ledger``."""
        return self.trials(states)

    def _read_ended(self) -> None:
        """Take in the trials that ended since the last time, page by page."""
        history, whole = self.history, False
        while not whole:
            have = history.beyond(history.mark)
            page, history.mark = self.ended_after(history.mark, have, _wire.PAGE)
            history.add(page)
            whole = len(page) < _wire.PAGE

    def ended_after(
        self, mark: int, have: Sequence[int], most: int
    ) -> tuple[list[FrozenTrial], int]:
        """See ``Ledger``."""
        trials, last = self._call("ended_after", mark, have, most)
        return trials, last

    def unfinished(self, states: Sequence[TrialState]) -> list[FrozenTrial]:
        """See ``Ledger``."""
        return list(self._call("unfinished", [state.name for state in states]))

    def trial(self, trial_id: int) -> FrozenTrial:
        """See ``Ledger``."""
        if trial_id in self.history.known:
            return self.history.known[trial_id]
        trial: FrozenTrial = self._call("trial", trial_id)
        return trial

    def by_ids(self, trial_ids: Sequence[int]) -> list[FrozenTrial]:
        """See ``Ledger``."""
        return list(self._call("by_ids", list(trial_ids)))

    def attempts(self, trial_id: int | None = None) -> list[dict[str, Any]]:
        """See ``Ledger``."""
        return list(self._call("attempts", trial_id))

    def epochs(self, trial_id: int) -> list[dict[str, Any]]:
        """See ``Ledger``."""
        return list(self._call("epochs", trial_id))
