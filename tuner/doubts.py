"""What is doubtful about a whole study as it stands, for people."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from optuna.trial import FrozenTrial

from tuner.augment import MIXING
from tuner.climbing import is_over
from tuner.imbalance import class_entropy
from tuner.ladder import Rung, rung_of
from tuner.planned import at
from tuner.pruning import is_at_chance
from tuner.session import Session

LITTLE = 1 / 3
"""A share of what class frequencies leave open; trainings that explain less are called short."""


def cautions(session: Session) -> Iterator[str]:
    """That nothing keeps the floor, plain cross-entropy learnt little, or a rung was too dear."""
    best, baseline = session.best_found(), session.baseline()
    if best is not None and not session.keeps_floor(best):
        floor = session.file.objective.floor
        yield f"no complete trial keeps the floor: {floor}; the best breaks it least"
    if baseline is None:
        return
    if _guesses(session, baseline):
        yield (
            "plain cross-entropy does no better than guessing; the floor excludes next to "
            "nothing then, and recipes can hardly be told apart: train longer "
            "(budget.epochs), or with other learning rates"
        )
    else:
        yield from _little_learnt(session, baseline)
    yield from _dear_head(session)


def _guesses(session: Session, baseline: FrozenTrial) -> bool:
    attrs, raw = session.study.user_attrs, baseline.user_attrs["metrics"]["raw"]
    balanced, counts = raw.get("balanced_accuracy"), attrs["validation_counts"]
    images, classes = sum(counts), sum(count > 0 for count in counts)
    return balanced is not None and is_at_chance(balanced, classes, images, progress=1.0)


def _little_learnt(session: Session, baseline: FrozenTrial) -> Iterator[str]:
    """By the R² of McFadden (1974) on the training images, 1 - loss / entropy of the classes.

    Mixed images have a loss that no model can avoid, and features were learnt before.
    """
    loss = baseline.user_attrs.get("train_loss")
    augment = baseline.user_attrs.get("recipe", {}).get("augment", {})
    if loss is None or rung_of(baseline) == "head" or any(augment.get(name) for name in MIXING):
        return
    alone = class_entropy(torch.tensor(session.study.user_attrs["class_counts"]))
    if loss > (1 - LITTLE) * alone:
        yield (
            "plain cross-entropy has learnt little: its loss on the training images ends at "
            f"{loss:.2f}, and knowing class frequencies alone gives {alone:.2f}; longer trainings "
            "(budget.epochs) or a larger model may rank the recipes otherwise"
        )


def _dear_head(session: Session) -> Iterator[str]:
    """That the cheap rung was not: where networks are small or classes many."""
    if not {"head", "full"} <= set(session.file.ladder.rungs) or not is_over(session, "full"):
        return
    head, full = (_seconds(session, rung) for rung in ("head", "full"))
    if head > full:
        yield (
            f"the head rung took {head:.0f} s of slots and the full rung {full:.0f} s: where "
            "trainings are this short, fewer trials of the head rung (ladder.head.trials), or "
            "none, leave more time to full"
        )


def _seconds(session: Session, rung: Rung) -> float:
    return sum(t.user_attrs.get("seconds") or 0.0 for t in at(session, rung))
