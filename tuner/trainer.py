"""The training loop: recipe and data in, one result per epoch out; no Optuna, no database."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tuner.datasets import Data
from tuner.errors import NonFiniteError
from tuner.lane import Lane, Snapshot
from tuner.recipe import Recipe
from tuner.seeding import seeded


@dataclass(frozen=True)
class EpochResult:
    """What one epoch gave.

    ``logits`` are those of the validation part, (V, C) float32 on the CPU; ``train_loss`` is
    the mean over the epoch's samples; ``seconds`` cover training and validation.
    """

    epoch: int
    progress: float
    train_loss: float
    logits: Tensor
    samples: int
    seconds: float
    lane: Lane

    def snapshot(self) -> Snapshot:
        """Everything needed to go on after this epoch; take it before the next one starts."""
        return self.lane.snapshot()


def epochs(
    recipe: Recipe, data: Data, *, device: str = "cpu", resume: Snapshot | None = None
) -> Iterator[EpochResult]:
    """Train ``recipe`` on ``data``, epoch after epoch, from the start or from a snapshot.

    The same recipe, data and number of threads give the same numbers, bit for bit on the CPU,
    also when training was interrupted and resumed.

    Raises:
        NonFiniteError: The training loss became NaN or infinite.
    """
    lane = Lane(recipe, data, device)
    if resume is not None:
        lane.restore(resume)
    while lane.epoch < recipe.epochs:
        started = time.perf_counter()
        train_loss, samples = train_epoch(lane)
        logits = lane.logits(data.validation.images)
        if not torch.isfinite(logits).all():
            raise NonFiniteError(f"validation logits are not finite in epoch {lane.epoch}")
        lane.end_epoch()
        yield EpochResult(
            epoch=lane.epoch - 1,
            progress=lane.epoch / recipe.epochs,
            train_loss=train_loss,
            logits=logits,
            samples=samples,
            seconds=time.perf_counter() - started,
            lane=lane,
        )


def train_epoch(lane: Lane) -> tuple[float, int]:
    """One pass over the sampler's plan; mean training loss and number of samples.

    Raises:
        NonFiniteError: The mean training loss is not finite.
    """
    lane.begin_epoch()
    batches = lane.plan()
    total = torch.zeros((), dtype=torch.float64, device=lane.device)
    # Dropout draws from the global generator; a seed per epoch keeps training resumable.
    with seeded(lane.recipe.seed, "epoch", lane.epoch, device=lane.device):
        for step, (indices, images) in enumerate(lane.images(batches)):
            loss = lane.step(indices, images, share=step / len(batches))
            total += loss.double() * len(indices)
    samples = sum(len(batch) for batch in batches)
    mean = float(total) / samples
    if mean != mean or mean in (float("inf"), float("-inf")):
        raise NonFiniteError(f"training loss is {mean} in epoch {lane.epoch}")
    return mean, samples
