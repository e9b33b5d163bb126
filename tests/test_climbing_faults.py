"""Climbing while trials fail, diverge, go back and are tried again: every study ends exactly."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from climbers import CLIMBING, finish_with, merit
from conftest import MakeSession
from fleet import lease
from optuna.trial import TrialState

from tuner.datasets import Data
from tuner.ladder import rung_of
from tuner.ledger import Lease
from tuner.planned import at
from tuner.session import Session
from tuner.tickets import MAX_BASELINES, beyond_budget, is_done, ladder_state, retry_failed

LADDERS = (["head", "full"], ["deferred", "full"], ["head", "deferred", "full", "confirm"])
BUDGETS: dict[str, Any] = {
    "head": {"trials": 12},
    "deferred": {"trials": 8},
    "confirm": {"recipes": 3, "seeds": 2},
}


def end(session: Session, claimed: Lease, state: TrialState, reason: str) -> None:
    session.fenced.take(claimed)
    session.fenced.set_trial_user_attr(claimed.trial_id, "reason", reason)
    session.fenced.finish(claimed.trial_id, state, None, end=reason)


def end_somehow(session: Session, claimed: Lease, data: Data, chance: random.Random) -> None:
    """End a trial well in two of three cases."""
    fate = chance.random()
    if fate < 0.12:
        end(session, claimed, TrialState.FAIL, "failed")
    elif fate < 0.2:
        end(session, claimed, TrialState.WAITING, "preempted")
    elif fate < 0.3:
        end(session, claimed, TrialState.PRUNED, "not_finite")
    else:
        finish_with(session, claimed, data, merit, overall=chance.choice([0.9, 0.9, 0.5]))


@pytest.mark.parametrize("ladder", LADDERS, ids="-".join)
@pytest.mark.parametrize("seed", [2, 3])
def test_every_study_ends_with_exactly_its_budget_whatever_becomes_of_its_trials(
    seed: int, ladder: list[str], make_session: MakeSession, digits: Data
) -> None:
    chance = random.Random(seed)
    settings = CLIMBING | {
        "ladder": {"rungs": ladder, **BUDGETS},
        "budget": {"trials": chance.choice([3, 7, 14]), "epochs": 3},
    }
    sessions = [make_session(**settings), make_session(**settings)]
    held: list[tuple[Session, Lease]] = []
    for _ in range(2000):
        session = chance.choice(sessions)
        claimed = lease(session) if len(held) < 5 and chance.random() < 0.6 else None
        if claimed is not None:
            held.append((session, claimed))
        elif held:
            end_somehow(*held.pop(chance.randrange(len(held))), digits, chance)
            if chance.random() < 0.05:
                retry_failed(session)
        elif is_done(session):
            break
    assert all(map(is_done, sessions))
    one, other = (session.baseline() for session in sessions)
    assert one is not None
    assert other is not None
    assert one.number == other.number
    found = Counter(rung_of(t) for t in session.trials() if not beyond_budget(t))
    planned = {"full": session.file.trials(), "head": 12, "deferred": 8}
    assert {rung: found[rung] for rung in session.file.ladder.searched} == {
        rung: planned[rung] for rung in session.file.ladder.searched
    }


def test_ladder_that_waits_for_a_baseline_that_never_comes_says_so(
    make_session: MakeSession,
) -> None:
    session = make_session(**CLIMBING)
    for tried in range(MAX_BASELINES):
        assert not any("gave no result" in line for line in ladder_state(session)), tried
        claimed = lease(session)
        assert claimed is not None
        end(session, claimed, TrialState.PRUNED, "not_finite")
    assert is_done(session)
    assert not at(session, "head")
    assert any("plain cross-entropy gave no result" in line for line in ladder_state(session))
