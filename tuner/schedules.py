"""Learning rate schedules, and when deferred parts of a recipe begin to act."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated

from pydantic import Field

from tuner.registry import Registry, component

WarmupEpochs = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]


def deferred(progress: float, start: float) -> bool:
    """Whether a part that starts at ``start`` is still waiting; both are shares of training.

    With progress = epoch / epochs the switch falls exactly on epoch start·epochs.
    """
    return progress < start


class Schedule(ABC):
    """A factor on the learning rate over the training, whose epochs are all equally many steps."""

    @abstractmethod
    def factor(self, epoch: float, epochs: int) -> float:
        """Factor at the fractional, 0-based ``epoch`` of ``epochs``."""

    def warmup_end(self, epochs: int) -> float:
        """Share of training after which the warm-up is over."""
        return 0.0


SCHEDULES: Registry[Schedule] = Registry("schedule")


def warmup_length(warmup_epochs: float, epochs: int) -> float:
    """Epochs of warm-up; never more than half of a training, so that short ones learn too."""
    return min(warmup_epochs, epochs / 2)


@SCHEDULES.register("constant")
@component
class Constant(Schedule):
    """The same learning rate throughout."""

    def factor(self, epoch: float, epochs: int) -> float:
        """1."""
        return 1.0


@SCHEDULES.register("step")
@component
class Step(Schedule):
    """Linear warm-up, then a drop by ``gamma`` at every milestone (share of training).

    The defaults at 200 epochs are the schedule of Cui et al. 2019: ×0.01 at epoch 160 and
    once more at 180. ``per_epoch`` changes the rate only when an epoch begins and warms up
    with (epoch + 1) / warmup_epochs, as Cao et al. 2019 do. The warm-up takes at most half
    of the training.
    """

    warmup_epochs: WarmupEpochs = 5.0
    milestones: tuple[Share, ...] = (0.8, 0.9)
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.01
    per_epoch: bool = False

    def factor(self, epoch: float, epochs: int) -> float:
        """Warm-up times ``gamma`` for each milestone passed."""
        if self.per_epoch:
            epoch = math.floor(epoch)
        warmup = warmup_length(self.warmup_epochs, epochs)
        ramp = (epoch + self.per_epoch) / warmup if warmup > 0 else 1.0
        passed = sum(not deferred(epoch / epochs, milestone) for milestone in self.milestones)
        return float(min(1.0, ramp) * self.gamma**passed)

    def warmup_end(self, epochs: int) -> float:
        """Share of training after which the warm-up is over."""
        return warmup_length(self.warmup_epochs, epochs) / epochs


@SCHEDULES.register("cosine")
@component
class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to ``final`` (a share of the full rate).

    The warm-up takes at most half of the training.
    """

    warmup_epochs: WarmupEpochs = 5.0
    final: Annotated[float, Field(ge=0, le=1)] = 0.0

    def factor(self, epoch: float, epochs: int) -> float:
        """Ramp up to 1, then final + (1 - final)·(1 + cos πt) / 2 (Loshchilov, Hutter 2017)."""
        warmup = warmup_length(self.warmup_epochs, epochs)
        if epoch < warmup:
            return epoch / warmup
        t = min(1.0, (epoch - warmup) / (epochs - warmup))
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * t)) / 2

    def warmup_end(self, epochs: int) -> float:
        """Share of training after which the warm-up is over."""
        return warmup_length(self.warmup_epochs, epochs) / epochs
