"""The curves of trials that ended, as pruning compares with them; each is made once."""

from __future__ import annotations

from optuna.trial import FrozenTrial, TrialState

from tuner.pruning import Curve
from tuner.session import Session


class Peers:
    """Curves of the trials that ended, but for copies and those that break the floor."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.curves: dict[int, Curve | None] = {}
        self.had_baseline = False

    def now(self) -> list[Curve]:
        """The curves there are at this moment."""
        if not self.had_baseline and self.session.baseline() is not None:
            # Without a baseline there was no floor to break.
            self.had_baseline = True
            self.curves.clear()
        for trial in self.session.trials(TrialState.COMPLETE, TrialState.PRUNED):
            if trial.number not in self.curves:
                self.curves[trial.number] = self._curve(trial)
        return [curve for curve in self.curves.values() if curve is not None]

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
            complete=trial.state == TrialState.COMPLETE,
        )
