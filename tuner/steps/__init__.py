"""How the steps of a lane are executed: one after another, or as CUDA graphs on a stream.

Both give the same numbers for the same lane; which is faster, ``tuner.backends`` measures.
"""

from __future__ import annotations

from typing import Literal

from tuner.datasets import ResidentImages
from tuner.lane import Lane
from tuner.steps._base import Steps
from tuner.steps._graph import GraphSteps
from tuner.steps._plain import PlainSteps

__all__ = ["Execution", "GraphSteps", "PlainSteps", "Steps", "steps_of"]

Execution = Literal["auto", "plain", "graph", "compiled"]


def steps_of(lane: Lane, execution: Execution = "auto") -> Steps:
    """What executes the steps of ``lane``: graphs where they can be, unless told otherwise.

    Graphs need a CUDA device, whole batches and images that lie on the device. "compiled" are
    graphs of passes that torch.compile made.
    """
    lane.compiles = execution == "compiled"
    resident = isinstance(lane.data.train.images, ResidentImages)
    possible = lane.device.type == "cuda" and lane.micro_batch is None and resident
    return GraphSteps(lane) if possible and execution != "plain" else PlainSteps(lane)
