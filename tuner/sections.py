"""Sections of a study file: objective, budget and search; the ladder has a module of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tuner.metrics import METRICS
from tuner.registry import component

LARGEST = 100_000
LARGEST_SHARE = 0.2
"""What a floor lets go of the baseline's value at most, if its ``drop`` is no larger."""
PLAIN = "of plain cross-entropy, unadjusted"
"""What the floor is measured from, whether trials are judged adjusted or not."""


@component
class Floor:
    """A metric that may not fall more than ``drop`` below the cross-entropy baseline's.

    Nor by more than a fifth of what the baseline has (or the share ``drop``, if that is more):
    with hundreds of classes plain cross-entropy may have less than ``drop`` to lose, and any
    recipe would do. A metric to minimise may rise by ``drop``. Like every metric of the search it
    is taken over the validation images, whose class mix is flatter than that of the training part
    (``data.validation_cap``).
    """

    metric: str = "accuracy"
    drop: Annotated[float, Field(ge=0, le=1)] = 0.02

    def bound(self, plain: float) -> float:
        """The worst value a recipe may have where the baseline has ``plain``."""
        if METRICS[self.metric] == "minimize":
            return plain + self.drop
        return plain - min(self.drop, self._share * plain)

    @property
    def _share(self) -> float:
        return max(LARGEST_SHARE, self.drop)

    def __str__(self) -> str:
        if METRICS[self.metric] == "minimize":
            return f"{self.metric} at most {self.drop:g} above that {PLAIN}"
        points = f"at most {100 * self.drop:g} points, and {100 * self._share:g} % of it,"
        return f"{self.metric} {points} below that {PLAIN}"


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
    over the slots, GPU or not, an epoch when it ends; ``hours`` on the clock since the first trial
    began; ``target``, a value of the objective; ``plateau``, complete trials without a better one
    than before.
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
