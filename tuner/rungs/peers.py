"""The curves of trials that ended, as pruning compares with them; each is made once."""

from __future__ import annotations

from optuna.trial import FrozenTrial, TrialState

from tuner.ladder import Rung, is_judged, rung_of
from tuner.plain import is_plain
from tuner.pruning import Curve
from tuner.session import Session


class Peers:
    """Curves of the trials that ended, but for copies and those that break the floor."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.curves: dict[int, tuple[Rung, bool, Curve] | None] = {}
        self.had_baseline = False

    def now(self, rung: Rung, *, plain: bool = False) -> list[Curve]:
        """The curves there are at this moment of trials of a rung.

        Those that tune ``plain`` cross-entropy compete with each other alone: beside losses made
        for the tail most would be given up, the better ones too.
        """
        if not self.had_baseline and self.session.baseline() is not None:
            # Without a baseline there was no floor to break.
            self.had_baseline = True
            self.curves.clear()
        # The report of the epoch has said already which trials ended, where it could.
        ended = self.session.ledger.ended((TrialState.COMPLETE, TrialState.PRUNED))
        for trial in ended if len(ended) > len(self.curves) else ():
            if trial.number not in self.curves:
                self.curves[trial.number] = self._curve(trial)
        known = filter(None, self.curves.values())
        return [curve for at, is_it, curve in known if at == rung and (is_it or not plain)]

    def _curve(self, trial: FrozenTrial) -> tuple[Rung, bool, Curve] | None:
        attrs = trial.user_attrs
        if "metrics" not in attrs or "duplicate_of" in attrs:
            return None
        if not self.session.keeps_floor(trial):
            return None
        curve = Curve(
            loss=attrs["loss"],
            values=tuple(v for _, v in sorted(trial.intermediate_values.items())),
            first=min(trial.intermediate_values, default=0),
            epochs=attrs["epochs"],
            settled=attrs["settled"],
            complete=is_judged(trial),
        )
        return rung_of(trial), is_plain(trial), curve
