"""How one training runs: batch size, precision, and one stage or two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from tuner.registry import Registry, component
from tuner.samplers import ClassAware, Natural

Precision = Literal["auto", "float32", "bfloat16"]
Layout = Literal["auto", "channels_last", "contiguous", "fused"]

LAST = 0.999
"""A share of training that every last epoch has passed, or nearly so."""

TRAININGS: Registry[Any] = Registry("training")

T = TypeVar("T")


def for_each_stage(components: Sequence[Any], build: Callable[[Any, int], T]) -> list[T]:
    """What each stage works with, built of its component and the index of the stage.

    A stage with the same component as the one before goes on with what that has.
    """
    built: list[T] = []
    for stage, chosen in enumerate(components):
        same = stage > 0 and chosen == components[stage - 1]
        built.append(built[-1] if same else build(chosen, stage))
    return built


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Optimizer steps of an epoch over ``images`` training images, whatever the sampler."""
    full, rest = divmod(images, batch_size)
    return max(1, full + (rest > 1))


def batches_of(indices: Tensor, batch_size: int) -> list[Tensor]:
    """The batches of an epoch of image indices (N,): ``steps_per_epoch`` of them.

    A last batch of one sample joins the one before it: batch norm cannot train on one.
    """
    batches = list(torch.split(indices, batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


class TrainingBase:
    """What all trainings share.

    ``precision`` and ``layout`` of the activations are "auto" where the machine shall choose: a
    study's trial takes what is fastest on its first worker, and its recipe says which that was.
    Outside a study "auto" is float32 in channels_last. "fused" is channels_last where one thread
    of a processor computes batch norms together with what follows them (``tuner.fused``); anywhere
    else it is channels_last.
    """

    batch_size: int
    precision: Precision
    classifier_only: bool = False
    reset_head: bool = False
    restart_schedule: bool = False
    layout: Layout

    def canonical(self) -> TrainingBase:
        """The simplest training that does the same."""
        if "auto" not in (self.precision, self.layout):
            return self
        precision = "float32" if self.precision == "auto" else self.precision
        layout = "channels_last" if self.layout == "auto" else self.layout
        return replace(self, precision=precision, layout=layout)  # type: ignore[type-var]

    def canonical_for(self, loss: Any, sampler: Any) -> TrainingBase:
        """The simplest training that does the same with these, which are canonical."""
        return self

    def losses(self, loss: Any) -> tuple[Any, ...]:
        """Loss components of the stages, given the recipe's own loss."""
        return (loss,)

    def samplers(self, sampler: Any) -> tuple[Any, ...]:
        """Sampler components of the stages, given the recipe's own sampler."""
        return (sampler,)

    def stage(self, progress: float) -> int:
        """Index of the stage at ``progress`` in [0, 1)."""
        return 0

    def stage_start(self) -> float:
        """Progress from which the last stage runs; 0 when there is one stage."""
        return 0.0


@TRAININGS.register("single_stage")
@component
class SingleStage(TrainingBase):
    """One stage: the recipe's sampler, loss and schedule from the first epoch to the last."""

    batch_size: Annotated[int, Field(ge=2)] = 128
    precision: Precision = "auto"
    layout: Layout = "auto"


@TRAININGS.register("two_stage")
@component
class TwoStage(TrainingBase):
    """Two stages: natural sampling, then balanced (Kang et al. 2020); or the reverse.

    The balanced stage uses the recipe's sampler, or class-balanced sampling when that samples
    naturally. ``classifier_only`` freezes the backbone in the second stage (cRT);
    ``reset_head`` starts it from a fresh classifier; ``restart_schedule`` runs the
    learning-rate schedule once more over the second stage.
    """

    batch_size: Annotated[int, Field(ge=2)] = 128
    precision: Precision = "auto"
    layout: Layout = "auto"
    switch: Annotated[float, Field(gt=0, lt=1)] = 0.8
    order: Literal["natural_first", "balanced_first"] = "natural_first"
    classifier_only: bool = False
    reset_head: bool = False
    restart_schedule: bool = False

    def losses(self, loss: Any) -> tuple[Any, ...]:
        """The recipe's loss in both stages."""
        return (loss, loss)

    def samplers(self, sampler: Any) -> tuple[Any, ...]:
        """Natural and balanced sampler components, in the order of the stages."""
        natural = Natural()
        stage = (self.switch, LAST) if self.order == "natural_first" else (0.0, self.switch / 2)
        idle = all(sampler.is_natural(progress) for progress in stage)
        balanced = ClassAware(exponent=1.0) if idle else sampler
        stages = (natural, balanced)
        return stages if self.order == "natural_first" else stages[::-1]

    def stage(self, progress: float) -> int:
        """0 before ``switch``, 1 from there on."""
        return int(progress >= self.switch)

    def stage_start(self) -> float:
        """Progress from which the second stage runs."""
        return self.switch


@TRAININGS.register("deferred")
@component
class Deferred(TrainingBase):
    """Plain cross-entropy and natural sampling until ``switch``, then what the recipe says.

    Deferred re-weighting (Cao et al. 2019) for every loss and sampler. Model, momentum, schedule
    and augmentation run on through the switch. A ``start`` of the loss or the sampler still means
    a share of the whole training. Recipes that differ only in what acts from the switch on share
    everything before it: see ``Recipe.stage_one_key``.
    """

    batch_size: Annotated[int, Field(ge=2)] = 128
    precision: Precision = "auto"
    layout: Layout = "auto"
    switch: Annotated[float, Field(gt=0, lt=1)] = 0.8

    def canonical_for(self, loss: Any, sampler: Any) -> TrainingBase:
        """One stage, where the second one trains as the first."""
        if loss == loss.plain() and sampler == Natural():
            return SingleStage(
                batch_size=self.batch_size, precision=self.precision, layout=self.layout
            )
        return self

    def losses(self, loss: Any) -> tuple[Any, ...]:
        """The plain form of the recipe's loss, then the loss."""
        return (loss.plain(), loss)

    def samplers(self, sampler: Any) -> tuple[Any, ...]:
        """Natural sampling, then the recipe's sampler."""
        return (Natural(), sampler.canonical())

    def stage(self, progress: float) -> int:
        """0 before ``switch``, 1 from there on."""
        return int(progress >= self.switch)

    def stage_start(self) -> float:
        """Progress from which the recipe's own loss and sampler act."""
        return self.switch
