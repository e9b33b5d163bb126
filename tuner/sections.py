"""Sections of a study file: objective, budget and search; the ladder has a module of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tuner.registry import component

LARGEST = 100_000


@component
class Floor:
    """A metric that may not fall more than ``drop`` below the cross-entropy baseline's.

    Like every metric of the search it is taken over the validation images, whose class mix is
    flatter than that of the training part (``data.validation_cap``).
    """

    metric: str = "accuracy"
    drop: Annotated[float, Field(ge=0, le=1)] = 0.02


def _floor(value: Any) -> Any:
    if value is False:
        return None
    if value is not None and not isinstance(value, Mapping | Floor):
        raise ValueError("must be a table with metric and drop, or false for no floor")
    return value


@component
class Objective:
    """What a trial is judged by: a metric on validation, adjusted by default, and a floor.

    In a study file ``floor = false`` stands for none.
    """

    metric: str = "tail_accuracy"
    adjusted: bool = True
    floor: Annotated[Floor | None, BeforeValidator(_floor)] = Floor()


@component
class Budget:
    """How much may be trained, by all workers together; whatever is reached first ends it.

    ``trials`` (all of a grid when not given) of ``epochs`` each; ``gpu_hours`` of training summed
    over the slots, GPU or not; ``hours`` on the clock since the first trial began; ``target``, a
    value of the objective; ``plateau``, complete trials without a better one than before.
    """

    trials: Annotated[int, Field(ge=1, le=LARGEST)] | None = None
    epochs: Annotated[int, Field(ge=1, le=LARGEST)]
    gpu_hours: Annotated[float, Field(gt=0)] | None = None
    hours: Annotated[float, Field(gt=0)] | None = None
    target: float | None = None
    plateau: Annotated[int, Field(ge=1, le=LARGEST)] | None = None


@component
class Search:
    """How trials are proposed and pruned.

    ``gate`` belongs to the progressive strategy: the tail accuracy at which it stops.
    ``prune_after`` is the share of training before which nothing is pruned; ``control`` the
    share of trials that are never pruned, to measure what pruning would have cost.
    """

    algorithm: Literal["tpe", "random", "grid", "gp"] = "tpe"
    strategy: Literal["plain", "progressive"] = "plain"
    pruner: Literal["tail_accuracy", "none"] = "tail_accuracy"
    gate: Annotated[float, Field(gt=0, le=1)] = 0.6
    prune_after: Annotated[float, Field(ge=0, le=1)] = 0.5
    control: Annotated[float, Field(ge=0, le=1)] = 0.1
    seed: Annotated[int, Field(ge=0)] = 0
