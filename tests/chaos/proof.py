"""What must hold in the database after a study was disturbed, read with plain SQL and Optuna."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import optuna
import sqlalchemy as sa
from crew import NAME, Place
from optuna.trial import FrozenTrial, TrialState

from tuner.engines import FROZEN_SECONDS

FINAL = ("complete", "pruned", "failed")


def trials_of(url: str) -> list[FrozenTrial]:
    """Trials as plain Optuna reads them."""
    return optuna.load_study(study_name=NAME, storage=url).trials


def rows(url: str, table: str) -> list[dict[str, Any]]:
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        found = connection.execute(sa.text(f"SELECT * FROM {table}"))
        return [dict(row._mapping) for row in found]


def violations(place: Place, expected: list[FrozenTrial]) -> Iterator[str]:
    """Everything that is not as it must be; ``expected`` are an undisturbed run's trials."""
    trials = trials_of(place.url)
    if len(trials) != place.trials:
        yield f"{len(trials)} trials, the budget is {place.trials}"
    attempts = defaultdict(list)
    for attempt in rows(place.url, "tuner_attempts"):
        attempts[attempt["trial_id"]].append(attempt)
    for trial in trials:
        yield from _ended_once(trial, attempts[trial._trial_id])
    yield from _written_with_lease(place.url)
    for trial, twin in zip(trials, expected, strict=False):
        yield from _equal(trial, twin)


def _ended_once(trial: FrozenTrial, attempts: list[dict[str, Any]]) -> Iterator[str]:
    ends = Counter(attempt["end"] for attempt in attempts)
    if not trial.state.is_finished():
        yield f"trial {trial.number} is left {trial.state.name}"
    if sum(ends[end] for end in FINAL) != 1:
        yield f"trial {trial.number} ended {dict(ends)}"
    if any(attempt["holds"] is not None for attempt in attempts):
        yield f"trial {trial.number} is still held"
    spans = sorted((a["claimed_at"], a["ended_at"] or float("inf")) for a in attempts)
    for (_, end), (start, _) in zip(spans, spans[1:], strict=False):
        if start < end:
            yield f"trial {trial.number} was held twice at once"


def _written_with_lease(url: str) -> Iterator[str]:
    attempts = {attempt["token"]: attempt for attempt in rows(url, "tuner_attempts")}
    claims = defaultdict(list)
    for attempt in attempts.values():
        claims[attempt["trial_id"]].append(attempt["claimed_at"])
    for row in rows(url, "tuner_epochs"):
        attempt = attempts[row["token"]]
        latest = attempt["ended_at"] or 0.0
        if attempt["end"] != "lost":
            # It wrote its last epoch in the transaction that ended it, which may have been put to
            # sleep in the middle, and which nobody can have overtaken.
            later = [at for at in claims[row["trial_id"]] if at > attempt["claimed_at"]]
            latest = min([latest + FROZEN_SECONDS, *later])
        if row["trial_id"] != attempt["trial_id"] or row["recorded_at"] > latest:
            yield f"epoch {row['epoch']} of trial id {row['trial_id']} came without a lease"


def _equal(trial: FrozenTrial, twin: FrozenTrial) -> Iterator[str]:
    if trial.state != TrialState.COMPLETE:
        yield f"trial {trial.number} ended {trial.state.name}: {trial.user_attrs.get('detail')}"
        return
    for what in ("params", "values", "intermediate_values"):
        if getattr(trial, what) != getattr(twin, what):
            yield f"trial {trial.number} has other {what} than when it is not disturbed"
    if trial.user_attrs["metrics"] != twin.user_attrs["metrics"]:
        yield f"trial {trial.number} has other metrics than when it is not disturbed"


def tally(url: str) -> Counter[str]:
    """Attempts by how they ended, and how many went on from a checkpoint."""
    found = rows(url, "tuner_attempts")
    counts = Counter(str(attempt["end"]) for attempt in found)
    counts["resumed"] = sum((attempt["first_epoch"] or 0) > 0 for attempt in found)
    counts["attempts"] = len(found)
    return counts
