"""Stacks of lanes of one kind: steps are recorded once, and seats are overwritten in place."""

from __future__ import annotations

from tuner.stacks._device import CudaGraphs, GraphDevice, Mark, Uncapturable
from tuner.stacks._kind import Kind, kind_of
from tuner.stacks._recorded import CHUNK, Chunk
from tuner.stacks._stack import Stack
from tuner.stacks._stacks import Stacks
from tuner.stacks._together import is_groupable, not_groupable

__all__ = [
    "CHUNK",
    "Chunk",
    "CudaGraphs",
    "GraphDevice",
    "Kind",
    "Mark",
    "Stack",
    "Stacks",
    "Uncapturable",
    "is_groupable",
    "kind_of",
    "not_groupable",
]
