"""How one training runs: batch size, precision, and one stage or two."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from tuner.registry import Registry, component
from tuner.samplers import ClassAware, Natural

Precision = Literal["auto", "float32", "bfloat16"]
Layout = Literal["auto", "channels_last", "contiguous"]

LAST = 0.999
"""A share of training that every last epoch has passed, or nearly so."""

TRAININGS: Registry[Any] = Registry("training")


class TrainingBase:
    """What all trainings share.

    ``precision`` and ``layout`` of the activations are "auto" where the machine shall choose: a
    study's trial takes what is fastest on its first worker, and its recipe says which that was.
    Outside a study "auto" is float32 in channels_last.
    """

    batch_size: int
    precision: Precision
    layout: Layout

    def canonical(self) -> TrainingBase:
        """The simplest training that does the same."""
        if "auto" not in (self.precision, self.layout):
            return self
        precision = "float32" if self.precision == "auto" else self.precision
        layout = "channels_last" if self.layout == "auto" else self.layout
        return replace(self, precision=precision, layout=layout)  # type: ignore[type-var]

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
