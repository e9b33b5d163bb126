"""What a launch sees of its study: counts, and every trial that ends, once."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from queue import SimpleQueue

from optuna.trial import FrozenTrial, TrialState

from tuner.ladder import rung_of
from tuner.rungs.outcome import Outcome, State
from tuner.session import Session
from tuner.supervisor import Sight, Watch

STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


class View(Watch):
    """A watch that also puts the trials that ended since it began into ``ended``.

    Those of the head rung, many at a time, go into ``heads`` instead: what ended since the last
    look, with the seconds since then.
    """

    def __init__(self, session: Session, worker_ids: Collection[str]) -> None:
        super().__init__(session, worker_ids)
        self.ended: SimpleQueue[Outcome] = SimpleQueue()
        self.heads: SimpleQueue[tuple[list[Outcome], float]] = SimpleQueue()
        self._since = time.monotonic()
        self._told: set[int] | None = None
        self._shown: Sight | None = None

    def look(self) -> Sight:
        """Read the study now."""
        sight = super().look()
        ended = {t.number: t for t in self.session.trials(*STATES)}
        if self._told is not None:
            self._tell([ended[number] for number in sorted(ended.keys() - self._told)])
        self._told = set(ended)
        return sight

    def _tell(self, trials: Sequence[FrozenTrial]) -> None:
        heads = [outcome(trial) for trial in trials if rung_of(trial) == "head"]
        for trial in trials:
            if rung_of(trial) != "head":
                self.ended.put(outcome(trial))
        if heads:
            now = time.monotonic()
            self.heads.put((heads, now - self._since))
            self._since = now

    def news(self) -> Sight | None:
        """What was seen last, if it was not asked for before."""
        if self.sight is self._shown:
            return None
        self._shown = self.sight
        return self.sight


def outcome(trial: FrozenTrial) -> Outcome:
    """How a trial ended, from what is stored of it."""
    attrs = trial.user_attrs
    if "duplicate_of" in attrs:
        return Outcome(trial.number, "duplicate", value=trial.values[0])
    return Outcome(
        trial.number,
        STATES[trial.state],
        attrs.get("reason"),
        attrs.get("detail"),
        trial.values[0] if trial.values else None,
    )
