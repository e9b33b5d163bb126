"""Stage one of deferred trainings: one trial trains it, others with the same one branch from it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from tuner import artifacts
from tuner.checkpoint import Snapshot
from tuner.recipe import Recipe
from tuner.session import Session
from tuner.stores import Store
from tuner.tickets import is_done
from tuner.trainer import EpochResult
from tuner.training import Deferred, SingleStage


def stage_store(session: Session, key: str) -> Store:
    """Where a study keeps the state at the switch of all recipes with this key."""
    return session.store.within(f"stage-{key}")


def branch(session: Session, recipe: Recipe) -> tuple[Snapshot | None, str | None]:
    """The state to branch from, and why not if there is one that cannot be used.

    Both are None when nobody has shared one yet, and for a recipe that shares nothing. Whoever
    finds none trains the stage: trials that begin at the same time all train it.
    """
    key = recipe.stage_one_key()
    if key is None:
        return None, None
    return artifacts.load_checkpoint(stage_store(session, key), _identity(session, key))


def share(session: Session, recipe: Recipe, result: EpochResult) -> bool:
    """Leave the state for others if the recipe's switch comes after this epoch; whether it does.

    Who trained the same stage at the same time leaves the same. Plain cross-entropy is stage one
    of the deferred rung, if the study has that.

    Raises:
        StoreError: It cannot be kept.
    """
    branched = _as_deferred(session, recipe)
    key = branched.stage_one_key() if result.epoch + 1 == branched.switch_epoch() else None
    if key is None:
        return False
    identity = _identity(session, key)
    artifacts.save_checkpoint(stage_store(session, key), result.snapshot(), identity)
    return True


def drop_unneeded(session: Session) -> None:
    """Remove all shared states once the study is done: no trial waits, runs or is due.

    Every worker that leaves asks, so the last one does. Whoever takes the study up again, with a
    larger budget, and comes in between, trains its stage again.
    """
    shares = "deferred" in session.file.ladder.rungs or "deferred" in _trainings(session)
    if shares and session.ledger.order().state == "run" and is_done(session):
        artifacts.drop_stages(session.store)


def _trainings(session: Session) -> Collection[str]:
    return session.file.space.parts["training"]


def _as_deferred(session: Session, recipe: Recipe) -> Recipe:
    """The recipe as the deferred rung trains it, where it is the same training."""
    ladder = session.file.ladder
    if "deferred" not in ladder.rungs or not isinstance(recipe.training, SingleStage):
        return recipe
    training = recipe.training
    deferred = Deferred(
        batch_size=training.batch_size,
        precision=training.precision,
        layout=training.layout,
        switch=ladder.deferred.switch,
    )
    same = replace(recipe, training=deferred)
    return same if same.digest() == recipe.digest() else recipe


def _identity(session: Session, key: str) -> dict[str, str]:
    return {**session.identity(), "stage_one": key}
