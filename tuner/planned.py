"""How many trials of a rung there are, and how many there will be: the head rung's are limited."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from optuna.trial import FrozenTrial

from tuner.ladder import FEWEST_HEADS, Rung, rung_of
from tuner.shares import budget

if TYPE_CHECKING:
    from tuner.session import Session

NEARLY = 0.1
"""Of the head rung's time; where less is left, no small cohort is trained to use it up."""


def at(session: Session, rung: Rung) -> list[FrozenTrial]:
    """Trials of a rung but for those beyond the budget."""
    return [t for t in everyone(session, rung) if is_planned(t)]


def everyone(session: Session, rung: Rung) -> list[FrozenTrial]:
    """Trials of a rung, those beyond the budget too: what they found counts like any other's."""
    return [t for t in session.trials() if rung_of(t) == rung]


def is_planned(trial: FrozenTrial) -> bool:
    """Whether a trial is one of the budget, and takes no other's place."""
    return not {"retry_of", "again"} & trial.user_attrs.keys()


def planned(session: Session, rung: Rung) -> int:
    """How many trials a rung will have, as far as that is known.

    A head rung of ``auto`` trials ends when it has taken its ``share`` of what training those of
    ``full`` takes, each as long as the baseline. What its own trials take is seen as they end, so
    the number changes on the way. It is over for good when recipes of it were promoted.
    """
    most = budget(session.file, rung)
    seconds = _time_of_heads(session) if rung == "head" else None
    if seconds is None:
        return most
    own = at(session, rung)
    more = 0 if _has_promoted(session) else _affordable(own, seconds)
    return min(most, max(FEWEST_HEADS, len(own), more))


def all_planned(session: Session) -> int:
    """How many trials the study will have at all its rungs, as far as that is known."""
    file = session.file
    spared = budget(file, "head") - planned(session, "head")
    return file.all_trials() - spared * ("head" in file.ladder.rungs)


def _time_of_heads(session: Session) -> float | None:
    """Seconds of slots that the head rung may take; None where nothing limits it."""
    ladder, baseline = session.file.ladder, session.baseline()
    each = baseline and baseline.user_attrs.get("seconds")
    if not each or not ladder.may_end_before("head"):
        return None
    return float(ladder.head.share * budget(session.file, "full") * each)


def _has_promoted(session: Session) -> bool:
    return any("promoted_from" in trial.user_attrs for trial in session.trials())


def _affordable(own: Sequence[FrozenTrial], seconds: float) -> int:
    """How many trials take that time, if the others take as long as those that ended."""
    ended = sum(trial.state.is_finished() for trial in own)
    known: list[float] = [t.user_attrs["seconds"] for t in own if t.user_attrs.get("seconds")]
    left = seconds - sum(known)
    if not known or left <= NEARLY * seconds:
        return ended
    return ended + math.ceil(left * len(known) / sum(known))
