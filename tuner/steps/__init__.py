"""How the steps of a lane are executed: one after another, or as CUDA graphs in a seat of a stack.

All give the same numbers up to rounding; which is fastest, ``tuner.backends`` measures.
"""

from __future__ import annotations

from typing import Literal

from tuner.datasets import ResidentImages
from tuner.lane import Lane
from tuner.stacks import Stacks
from tuner.steps._base import Steps
from tuner.steps._plain import PlainSteps
from tuner.steps._seated import SeatedSteps

__all__ = ["Execution", "PlainSteps", "SeatedSteps", "Stacks", "Steps", "steps_of"]

Execution = Literal["auto", "plain", "graph", "compiled", "grouped"]


def steps_of(
    lane: Lane, execution: Execution = "auto", stacks: Stacks | None = None, seats: int = 1
) -> Steps:
    """What executes the steps of ``lane``: graphs where they can be, unless told otherwise.

    Graphs need a CUDA device, whole batches and images that lie on the device. "compiled" are
    graphs of passes that torch.compile made; "grouped" those of ``seats`` lanes in lockstep, whose
    layers are one, see ``tuner.twins``. Lanes that share ``stacks`` overwrite each other's seats
    there, and sit beside each other; without, the lane has some of its own.
    """
    lane.compiles = execution == "compiled"
    resident = isinstance(lane.data.train.images, ResidentImages)
    possible = lane.device.type == "cuda" and lane.micro_batch is None and resident
    if not possible or execution == "plain":
        return PlainSteps(lane)
    return SeatedSteps(lane, stacks or Stacks(), seats if execution == "grouped" else 1)
