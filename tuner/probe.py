"""How much memory of a GPU the largest trials of a study take, measured by training them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from optuna.trial import FixedTrial

from tuner.backends import chosen
from tuner.chunks import EVALUATION_BATCH
from tuner.datasets import Data, with_images
from tuner.entries import Choice, Entry, Fixed, Range
from tuner.lane import Lane
from tuner.recipe import Recipe
from tuner.rungs.memory import is_out_of_memory
from tuner.space import Space

STEPS = 3


class Gauge(Protocol):
    """Reads a device's memory; bytes throughout."""

    def reset(self) -> None:
        """Give back what is not in use, and forget the peak."""

    def peak(self) -> int:
        """Most that this process had reserved since ``reset``."""

    def total_and_beside(self) -> tuple[int, int]:
        """The device's memory, and how much is taken but for what this process reserves."""


@dataclass
class CudaGauge:
    """Reads the memory of a CUDA device.

    Beside what torch reserves there is the context of this process, a few hundred MB, and
    whatever other processes take.
    """

    device: str

    def reset(self) -> None:
        """Give back what is not in use, and forget the peak."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Most that was reserved since ``reset``."""
        return torch.cuda.max_memory_reserved(self.device)

    def total_and_beside(self) -> tuple[int, int]:
        """The device's memory, and what is taken of it beside this process's reserve."""
        free, total = torch.cuda.mem_get_info(self.device)
        return total, total - free - torch.cuda.memory_reserved(self.device)


@dataclass(frozen=True)
class Need:
    """What one slot needs of a device of ``total`` bytes."""

    per_slot: int
    total: int


def measure(space: Space, data: Data, device: str, gauge: Gauge | None = None) -> Need:
    """Train a few steps of the largest recipes of a space; the memory that a slot needs.

    Where there is room for the images of one slot, those of so many others find theirs.

    On a device that others use too it is an upper bound: what they take counts as needed.
    One that is too small for a recipe counts as taken up by it.

    Args:
        space: What the study searches.
        data: Its data, on ``device``.
        device: Where to train.
        gauge: Reads the memory; by default that of a CUDA device.
    """
    gauge = gauge or CudaGauge(device)
    images = data.resident_bytes
    peak = 0
    for recipe in largest(space):
        gauge.reset()
        try:
            _train(recipe, data, device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            total, _ = gauge.total_and_beside()
            return Need(total, total)
        # Each of the trials that a slot trains side by side takes as much, beside the images.
        taken = max(0, gauge.peak() - images)
        peak = max(peak, images + taken * chosen(recipe, data, device).lanes)
    total, beside = gauge.total_and_beside()
    return Need(max(peak + beside, with_images(images)), total)


def _train(recipe: Recipe, data: Data, device: str) -> None:
    lane = Lane(recipe, data, device)
    lane.begin_epoch()
    for indices, images in lane.images(lane.plan()[:STEPS]):
        lane.step(indices, images, share=0.0)
    some = torch.arange(min(EVALUATION_BATCH, len(data.validation)))
    lane.logits(data.validation.images.select(some))


def largest(space: Space) -> Iterator[Recipe]:
    """Every model of a space and every choice inside it, with each optimizer and training.

    Batches are as large as the space allows, the precision the wider one, the rest defaults.
    """
    for variant in space.variants("model"):
        model = {k: v for k, v in variant.items() if k == "model" or k.startswith("model.")}
        for optimizer in space.parts["optimizer"]:
            for training, entries in space.parts["training"].items():
                params = space.defaults(optimizer=optimizer, training=training) | model
                recipe = space.suggest(FixedTrial(params))
                sizes = _upper(entries, "batch_size"), _upper(entries, "precision")
                yield _with(recipe, *sizes)


def _upper(entries: dict[str, Entry], key: str) -> Any:
    """The value that takes most memory; None where the space leaves it at its default."""
    match entries.get(key):
        case Fixed(value):
            return value
        case Choice(values):
            return max(values)  # "float32" comes after "bfloat16"
        case Range(high=high):
            return int(high)
    return None


def _with(recipe: Recipe, batch_size: int | None, precision: str | None) -> Recipe:
    given = {"batch_size": batch_size, "precision": precision or "float32"}
    known = {key: value for key, value in given.items() if value is not None}
    return replace(recipe, training=replace(recipe.training, **known))
