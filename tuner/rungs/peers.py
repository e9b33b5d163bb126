"""The curves of trials that ended, as pruning compares with them; each is made once."""

from __future__ import annotations

from collections import defaultdict

from optuna.trial import FrozenTrial, TrialState

from tuner.ended import fresh
from tuner.ladder import Rung, is_judged, rung_of
from tuner.plain import is_plain
from tuner.pruning import Curve, Curves
from tuner.session import Session


class Peers:
    """Curves of the trials that ended, but for copies and those that break the floor."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.seen: set[int] = set()
        self.curves: dict[tuple[Rung, bool], Curves] = defaultdict(Curves)
        self.had_baseline = False

    def now(self, rung: Rung, *, plain: bool = False) -> Curves:
        """The curves there are at this moment of trials of a rung.

        Those that tune ``plain`` cross-entropy compete with each other alone: beside losses made
        for the tail most would be given up, the better ones too.
        """
        if not self.had_baseline and self.session.baseline() is not None:
            # Without a baseline there was no floor to break.
            self.had_baseline = True
            self.seen.clear()
            self.curves.clear()
        # The report of the epoch has said already which trials ended, where it could.
        ended = self.session.ledger.ended((TrialState.COMPLETE, TrialState.PRUNED))
        for trial in fresh(ended, self.seen):
            self.seen.add(trial.number)
            curve = self._curve(trial)
            if curve is not None:
                for only_plain in (False, True) if is_plain(trial) else (False,):
                    self.curves[rung_of(trial), only_plain].add(curve)
        return self.curves[rung, plain]

    def _curve(self, trial: FrozenTrial) -> Curve | None:
        attrs = trial.user_attrs
        if "metrics" not in attrs or "duplicate_of" in attrs:
            return None
        if not self.session.keeps_floor(trial):
            return None
        return Curve(
            loss=attrs["loss"],
            values=tuple(v for _, v in sorted(trial.intermediate_values.items())),
            first=min(trial.intermediate_values, default=0),
            epochs=attrs["epochs"],
            settled=attrs["settled"],
            complete=is_judged(trial),
        )
