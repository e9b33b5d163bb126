"""Trains the classifiers of many recipes on cached features, in stacks of like lanes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tuner.datasets import Data
from tuner.heads._features import Features
from tuner.heads._own import train_own
from tuner.heads._plans import is_by_class, sampler_of
from tuner.heads._settings import HeadTraining
from tuner.heads._shared import train_shared
from tuner.heads._work import HeadResult, Material, Order, Stop
from tuner.models import Head
from tuner.recipe import Recipe
from tuner.rows import Kind, row_of

__all__ = ["HeadResult", "train_heads"]


@dataclass(frozen=True)
class _Like:
    """What recipes have in common whose lanes may stand in one stack."""

    shared: bool
    head: Head
    kind: Kind | None
    focal: bool
    seed: int | None


def train_heads(
    recipes: Sequence[Recipe],
    features: Features,
    data: Data,
    settings: HeadTraining,
    *,
    lanes: int = 64,
    stop: Stop = lambda: False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[int, HeadResult]]:
    """Train a classifier per recipe; yields index and result of each, in any order.

    Of a recipe act: all that its loss says, its sampler (that of the last stage of its
    training), its kind of head and its seed. Model, optimizer, schedule, augmentation and
    epochs do not: the features and ``settings`` stand for them. An epoch is as many samples
    as the training part has, whatever the sampler.

    A recipe's numbers depend on nothing but the recipe, the features and the settings: not on
    the other recipes, nor, on the CPU, on ``lanes``. One that diverges says so in its result.

    Args:
        recipes: What to train; parts that cannot act here are not looked at.
        features: Of one backbone, see ``cached_features``.
        data: The data they are made of.
        settings: How to train.
        lanes: How many recipes are trained at once at most; memory grows with it. On a GPU
            stacks have that size however few recipes there are, and another one may round
            otherwise.
        stop: Asked after every step; when it says so, no more results come.
        dtype: Of the computation; float64 is for tests.
        device: Where to compute; features that are there already are not copied again. What
            is drawn is the same on every device, and results come on the CPU.
    """
    settings = settings.for_images(len(features.train_targets))
    material = Material(features, data, settings, dtype, torch.device(device))
    orders = [Order.of(index, recipe, data) for index, recipe in enumerate(recipes)]
    for like, alike in _partition(orders, settings).items():
        train = train_shared if like.shared else train_own
        yield from train(alike, material, head=like.head, kind=like.kind, lanes=lanes, stop=stop)
        if stop():
            return


def _partition(orders: Sequence[Order], settings: HeadTraining) -> dict[_Like, list[Order]]:
    """Recipes by what they have in common; which, depends on each recipe alone."""
    parts: dict[_Like, list[Order]] = {}
    for order in orders:
        parts.setdefault(_like(order, settings), []).append(order)
    return parts


def _like(order: Order, settings: HeadTraining) -> _Like:
    recipe, row = order.recipe, row_of(order.loss)
    kind = None if row is None else row.kind
    # Those that are not focal need half the operations, as long as nobody beside them is.
    focal = row is not None and row.gamma != 0
    shared = settings.batches == "shared" and kind is not None and is_by_class(sampler_of(recipe))
    return _Like(shared, recipe.loss.head, kind, focal, recipe.seed if shared else None)
