"""Trials that are trained together are told of together, to whoever asks for that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import MakeSession

from tuner.cli.show import describe
from tuner.datasets import Data
from tuner.launch._view import View
from tuner.rungs.outcome import Outcome
from tuner.session import Session
from tuner.worker import work

HEADS = 5
LADDER = {"rungs": ["head", "full"], "head": {"trials": HEADS, "epochs": 1}}


@pytest.fixture
def session(make_session: MakeSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "features"))
    return make_session(budget={"trials": 2, "epochs": 1}, ladder=LADDER)


def test_worker_tells_of_a_cohort_at_once_and_of_full_trials_one_by_one(
    session: Session, digits: Data
) -> None:
    alone: list[Outcome] = []
    cohorts: list[Sequence[Outcome]] = []
    ended = work(
        session,
        digits,
        on_trial=alone.append,
        on_cohort=lambda outcomes, seconds: cohorts.append(outcomes if seconds > 0 else []),
    )
    assert [sorted(outcome.number for outcome in cohort) for cohort in cohorts] == [[1, 2, 3, 4, 5]]
    assert [outcome.number for outcome in alone] == [0, 6]
    assert ended == 7


def test_who_asks_for_trials_only_hears_of_each(session: Session, digits: Data) -> None:
    alone: list[Outcome] = []
    work(session, digits, on_trial=alone.append)
    assert sorted(outcome.number for outcome in alone) == list(range(7))


def test_launch_sees_trials_of_the_head_rung_together(session: Session, digits: Data) -> None:
    view = View(session, set())
    view.look()
    work(session, digits)
    view.look()
    heads, seconds = view.heads.get(timeout=1)
    assert [outcome.number for outcome in heads] == [1, 2, 3, 4, 5]
    assert seconds > 0
    assert [view.ended.get(timeout=1).number for _ in range(2)] == [0, 6]


def test_trial_at_the_end_of_a_lower_rung_is_done_and_not_pruned() -> None:
    assert describe(Outcome(3, "pruned", "deferred", value=0.5)) == "done 0.5000 (deferred rung)"
    assert describe(Outcome(3, "pruned", "behind")) == "pruned (behind)"
