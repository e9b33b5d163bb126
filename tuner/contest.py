"""How fast a GPU trains a recipe, step by step or as graphs, alone, side by side, in groups."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tuner.augment import Standard
from tuner.compiled import is_wanted
from tuner.datasets import Data
from tuner.lane import Lane
from tuner.recipe import Recipe
from tuner.stacks import Stacks, is_groupable, kind_of
from tuner.steps import Execution, Steps, steps_of

STEPS = 16
COMPARED = 4
"""Lanes with which precisions and layouts are compared."""
MORE = (8, 16, 32)
GAIN = 1.05
"""How much more a doubling of lanes must give to be tried further."""
FULL_SECONDS = 0.05
"""A step that takes so long fills the device by itself."""

log = logging.getLogger(__name__)

Candidate = tuple[str, str, float, Execution, int]
ALONE: tuple[tuple[Execution, int], ...] = (("graph", 2), ("graph", 1), ("plain", 1))


def candidates(
    recipe: Recipe, data: Data, device: str, formats: Iterable[tuple[str, str]]
) -> Iterator[Candidate]:
    """Precision, layout, images per second, execution and lanes of what works on the device.

    Formats are pairs of precision and layout. All are tried plainly where a single training
    fills the device, else with a few lanes of graphs; then the best one with fewer and more
    lanes, plainly, and its precision in groups.
    """
    fills = _fills(recipe, data, device)
    formats, tried = list(formats), []
    for precision, layout in formats:
        training = replace(recipe.training, precision=precision, layout=layout)
        own = replace(recipe, training=training)
        ways: tuple[Execution, int] = ("plain", 1) if fills else ("graph", COMPARED)
        images = rate(own, data, device, *ways)
        if images is not None:
            tried.append((images, own))
            yield precision, layout, images, *ways
    if tried and not fills:
        images, best = max(tried, key=lambda pair: pair[0])
        yield from _around(best, data, device, images)
        # Side by side as channels, images lie otherwise than alone: the best layout may differ.
        for layout in dict.fromkeys(layout for _, layout in formats):
            training = replace(best.training, layout=layout)
            own = _as_in_groups(replace(best, training=training))
            yield from _more(own, data, device, "grouped", 0.0)


def _around(recipe: Recipe, data: Data, device: str, images: float) -> Iterator[Candidate]:
    """The same recipe with fewer and more lanes, without graphs, and compiled if wanted."""
    format_ = recipe.training.precision, recipe.training.layout
    for way, lanes in ALONE:
        found = rate(recipe, data, device, way, lanes)
        if found is not None:
            yield *format_, found, way, lanes
    execution: Execution = "graph"
    if is_wanted():
        found = rate(recipe, data, device, "compiled", COMPARED)
        if found is not None:
            yield *format_, found, "compiled", COMPARED
            execution = "compiled" if found > GAIN * images else "graph"
            images = max(images, found)
    yield from _more(recipe, data, device, execution, images)


def _more(
    recipe: Recipe, data: Data, device: str, execution: Execution, images: float
) -> Iterator[Candidate]:
    """More and more lanes, until that gives little more than so many images per second."""
    for lanes in MORE:
        found = rate(recipe, data, device, execution, lanes)
        if found is None:
            return
        yield recipe.training.precision, recipe.training.layout, found, execution, lanes
        if found < GAIN * images:
            return
        images = found


def _as_in_groups(recipe: Recipe) -> Recipe:
    """The recipe without what has seats of its own: other recipes of its model may do without."""
    augment = recipe.augment
    if isinstance(augment, Standard):
        augment = replace(augment, mixup=0.0, cutmix=0.0)
    return replace(recipe, loss=recipe.loss.plain(), augment=augment)


def _fills(recipe: Recipe, data: Data, device: str) -> bool:
    """Whether one training, plainly in float32, has the device busy for long at each step."""
    plain = replace(recipe, training=replace(recipe.training, precision="float32"))
    images = rate(plain, data, device, "plain", 1, steps=3)
    return images is None or recipe.training.batch_size / images > FULL_SECONDS


def rate(
    recipe: Recipe,
    data: Data,
    device: str,
    execution: Execution,
    lanes: int,
    *,
    steps: int = STEPS,
) -> float | None:
    """Images per second of so many equal trainings; None where that does not work."""
    try:
        return _rate(recipe, data, device, execution, lanes, steps)
    except (RuntimeError, NotImplementedError) as error:
        log.debug("%d lanes, %s: not possible here: %s", lanes, execution, error)
        return None
    finally:
        torch.cuda.empty_cache()


def _rate(
    recipe: Recipe, data: Data, device: str, execution: Execution, lanes: int, steps: int
) -> float:
    size = min(recipe.training.batch_size, len(data.train))
    batches = [torch.arange(size)] * steps
    made, stacks = [], Stacks()
    for _ in range(lanes):
        lane = Lane(recipe, data, device)
        lane.begin_epoch()
        _refuse_unlike(lane, execution)
        made.append(steps_of(lane, execution, stacks, lanes))
    _all(made, batches[:2], device)
    _refuse_unlike(lane, execution)
    took = _all(made, batches, device)
    return float(round(lanes * steps * size / took, 1))


def _refuse_unlike(lane: Lane, execution: Execution) -> None:
    """Do not measure something else where groups do not work, as is found out when they begin."""
    if execution == "grouped" and not is_groupable(lane, kind_of(lane)):
        raise NotImplementedError("its lanes cannot be trained in groups")


def _all(made: list[Steps], batches: list[Tensor], device: str) -> float:
    """Execute the batches in all lanes by turns; the seconds that it took."""
    began = time.perf_counter()
    running = [steps.run(batches, 0, None) for steps in made]
    while running:
        running = [one for one in running if next(one, StopIteration) is not StopIteration]
    torch.cuda.synchronize(device)
    return time.perf_counter() - began
