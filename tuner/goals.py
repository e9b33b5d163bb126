"""What ends a study before its trials are spent: a value that is reached, or no progress."""

from __future__ import annotations

from tuner.climbing import is_over
from tuner.metrics import METRICS
from tuner.session import Session
from tuner.tickets import is_baseline_to_come


def reached(session: Session) -> tuple[str, str] | None:
    """The goal a study has reached, and how, in words; None while there is none."""
    budget = session.file.budget
    if budget.target is None and budget.plateau is None:
        return None
    best = session.best()
    if best is None or not session.keeps_floor(best) or _is_floor_to_come(session):
        return None
    if budget.target is not None and _at_least(session, best.values[0], budget.target):
        return "target", f"trial {best.number} reached {best.values[0]:.4f}"
    if budget.plateau is not None and _is_climbed(session):
        since = session.ended().complete_since(best)
        if since >= budget.plateau:
            more = "trial was" if since == 1 else "trials were"
            return "plateau", f"{since} complete {more} not better than trial {best.number}"
    return None


def _is_climbed(session: Session) -> bool:
    """Whether the rungs below the last one are over: until then it trains what compares them."""
    ladder = session.file.ladder
    return all(is_over(session, rung) for rung in ladder.searched if rung != ladder.last)


def _is_floor_to_come(session: Session) -> bool:
    """Whether it cannot be said yet who keeps the floor: plain cross-entropy is still trained."""
    if session.file.objective.floor is None or session.baseline() is not None:
        return False
    return is_baseline_to_come(session)


def _at_least(session: Session, value: float, target: float) -> bool:
    maximize = METRICS[session.file.objective.metric] == "maximize"
    return value >= target if maximize else value <= target


def stop_if_reached(session: Session) -> None:
    """Tell the fleet to stop when a goal is reached."""
    goal = reached(session)
    if goal is not None:
        session.ledger.give_order("stop", *goal, unless_given=True)
