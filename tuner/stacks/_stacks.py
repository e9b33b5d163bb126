"""The stacks of a slot: a lane takes a free seat of its kind, or a stack is made for it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tuner.lane import Lane
from tuner.stacks._device import CudaGraphs, GraphDevice
from tuner.stacks._kind import Kind
from tuner.stacks._stack import Stack


class Stacks:
    """Keeps stacks from one trial to the next, at most as many as were in use at a time.

    ``device`` makes what records and executes steps.
    """

    def __init__(self, device: Callable[[torch.device], GraphDevice] = CudaGraphs) -> None:
        self.device = device
        self.stacks: list[Stack] = []
        self.most = 0

    def take(self, lane: Lane, kind: Kind, seats: int) -> tuple[Stack, int]:
        """A stack of that many seats, and the seat of it that the lane has now.

        Raises:
            Uncapturable: The lane's model or optimizer cannot be put into a seat.
        """
        alike = [s for s in self.stacks if s.kind == kind and s.seats == seats and s.has_room]
        if alike:
            stack = max(alike, key=lambda each: len(each.lanes))
            self.stacks.remove(stack)
        else:
            self._make_room()
            stack = Stack(lane, kind, seats, self.device(lane.device))
        # The last one is the one that was used last.
        self.stacks.append(stack)
        seat = stack.take(lane)
        self.most = max(self.most, sum(bool(each.lanes) for each in self.stacks))
        return stack, seat

    def _make_room(self) -> None:
        """Drop the idle stack that was not used for longest, if there are as many as may be."""
        idle = [stack for stack in self.stacks if not stack.lanes]
        if idle and len(self.stacks) >= self.most:
            self.drop(idle[0])

    def drop(self, stack: Stack) -> None:
        """Drop a stack whose steps could not be recorded, unless other lanes have seats."""
        if stack in self.stacks and not stack.lanes:
            stack.wait()
            self.stacks.remove(stack)

    def free(self) -> None:
        """Drop all stacks that are idle: their memory is needed."""
        for stack in list(self.stacks):
            self.drop(stack)
