"""The trained model of a trial: from its stored weights, else trained again."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from optuna.trial import FrozenTrial

from tuner import artifacts
from tuner.alone import Stop, Stopped, alone, cache_folder
from tuner.augment import MIXING, Augmenter
from tuner.confirm import fold_of
from tuner.datasets import Data, fold
from tuner.errors import TunerError
from tuner.heads import COHORT, Features, HeadResult, cached_features, holding, train_heads
from tuner.ladder import rung_of
from tuner.lane import Lane
from tuner.recipe import Recipe
from tuner.session import Session
from tuner.stores import StoreError
from tuner.trainer import Interrupted, epochs

WEIGHTS_SECONDS = 20.0

log = logging.getLogger(__name__)


def stored_recipe(trial: FrozenTrial) -> Recipe:
    """The recipe a trial was trained with, as the storage keeps it."""
    return Recipe.from_dict(trial.user_attrs["recipe"], where=f"trial {trial.number}")


def trained_lane(
    session: Session,
    trial: FrozenTrial,
    data: Data,
    device: str,
    stop: Stop = lambda: False,
) -> Lane:
    """The trained model of a trial: from its stored weights, else trained again.

    Weights are kept for the best trial and the baseline; training again from the same recipe,
    data and seed gives the same numbers. A trial of the confirm rung has its own fold of ``data``.

    Raises:
        Stopped: ``stop`` said so while it was trained again.
    """
    index = fold_of(trial)
    data = data if index is None else fold(data, index)
    number = trial.user_attrs.get("duplicate_of", trial.number)
    recipe = stored_recipe(trial)
    store = session.trial_store(number)
    identity = {**session.identity(), "digest": recipe.digest()}
    weights = artifacts.load_weights(store, identity)
    if weights is not None:
        lane = Lane(recipe, data, device)
        lane.model.load_state_dict(weights)
        return lane
    log.warning("trial %d has no usable stored weights; training it again", trial.number)
    if rung_of(trial) == "head":
        lane = head_lane(session, recipe, data, device, stop)
    else:
        lane = train(recipe, data, device, stop)
    try:
        artifacts.save_weights(store, lane.model, identity)
    except StoreError as error:
        log.warning("%s; the weights are used, but not kept", error)
    return lane


def train(recipe: Recipe, data: Data, device: str, stop: Stop = lambda: False) -> Lane:
    """Train a recipe from start to end.

    Raises:
        Stopped: ``stop`` said so before.
    """
    torch.set_num_threads(1)
    lane = None
    try:
        for result in epochs(recipe, data, device=device, stop=stop):
            lane = result.lane
    except Interrupted:
        raise Stopped from None
    assert lane is not None, "a recipe has at least one epoch"
    return lane


@dataclass(frozen=True, eq=False)
class Backbone:
    """The network whose features the head rung trains on: as a lane, and the features.

    Both are on the device where classifiers are trained.
    """

    lane: Lane
    features: Features


def backbone(
    session: Session, data: Data, device: str, folder: Path, stop: Stop = lambda: False
) -> Backbone:
    """The backbone of the head rung, and its features from ``folder`` or made and left there.

    It is the network of the baseline, or the model as it is built, as ``ladder.head.backbone``
    says. Only what acts on single images augments them: nothing is mixed.

    Raises:
        TunerError: The baseline is not complete, or the features cannot be had.
        Stopped: ``stop`` said so before all was there.
    """
    baseline = session.baseline()
    assert baseline is not None, "tickets of the head rung come after the baseline"
    settings = session.file.ladder.head
    with holding(len(data.train), settings.copies, device):
        if settings.backbone == "initial":
            lane = Lane(stored_recipe(baseline), data, device)
        else:
            lane = _lane_for_all(session, baseline, data, device, folder, stop)
        features = _features(lane, data, settings.copies, folder, stop)
        return Backbone(lane, features.to(device))


def _features(lane: Lane, data: Data, copies: int, folder: Path, stop: Stop) -> Features:
    augment, seed = _unmixed(lane.recipe, data), lane.recipe.seed
    with _kept_in(folder):
        return cached_features(
            lane.model, data, augment, copies=copies, seed=seed, folder=folder, stop=stop
        )


@contextlib.contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TunerError(
            f"features of the head rung cannot be kept in {folder} ({error.strerror or error}); "
            "make room there, or set TUNER_CACHE to a folder that this worker may write"
        ) from error


def _lane_for_all(
    session: Session, trial: FrozenTrial, data: Data, device: str, folder: Path, stop: Stop
) -> Lane:
    """See ``trained_lane``; of the processes of a machine only one trains it again.

    The others wait for what it keeps: weights may be lost for all at once, where a worker dies
    between the end of its trial and writing them.
    """
    _wait_for_weights(session, trial, stop)
    with contextlib.ExitStack() as held:
        with _kept_in(folder):
            name = f"{session.identity()['study']}-{trial.number}"
            held.enter_context(alone(folder / name, stop))
        return trained_lane(session, trial, data, device, stop)


def _wait_for_weights(session: Session, trial: FrozenTrial, stop: Stop) -> None:
    """Give the worker that ended a trial a moment to write its weights."""
    recipe = stored_recipe(trial)
    store = session.trial_store(trial.number)
    identity = {**session.identity(), "digest": recipe.digest()}
    deadline = time.monotonic() + WEIGHTS_SECONDS
    while artifacts.load_weights(store, identity) is None and time.monotonic() < deadline:
        if stop():
            raise Stopped
        time.sleep(0.5)


def _unmixed(recipe: Recipe, data: Data) -> Augmenter:
    names = [name for name in MIXING if getattr(recipe.augment, name, 0)]
    augment = replace(recipe.augment, **dict.fromkeys(names, 0.0)) if names else recipe.augment
    built: Augmenter = augment.build(
        data.image_shape,
        mean=data.mean,
        std=data.std,
        class_counts=data.class_counts,
        groups=data.groups,
    )
    return built


def head_lane(
    session: Session, recipe: Recipe, data: Data, device: str, stop: Stop = lambda: False
) -> Lane:
    """A recipe's classifier trained once more on the features, with the backbone before it."""
    found = backbone(session, data, device, features_folder(), stop)
    settings = session.file.ladder.head
    [(_, result)] = train_heads(
        [recipe], found.features, data, settings, lanes=COHORT, device=device
    )
    return assembled(recipe, found, result, data, device)


def assembled(recipe: Recipe, found: Backbone, result: HeadResult, data: Data, device: str) -> Lane:
    """The backbone and a classifier that was trained on its features, as one model."""
    lane = Lane(recipe, data, device)
    lane.model.backbone.load_state_dict(found.lane.model.backbone.state_dict())
    head = {"weight": result.weight, **({} if result.bias is None else {"bias": result.bias})}
    lane.model.head.load_state_dict(head)
    return lane


def features_folder() -> Path:
    """Where this machine keeps features."""
    return cache_folder() / "features"
