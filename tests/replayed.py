"""A processor that records and replays steps as a GPU does, so that tests need none."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from tuner.lane import Lane
from tuner.seeding import seeded
from tuner.stacks import CudaGraphs, Stacks
from tuner.steps import Execution, PlainSteps, SeatedSteps, Steps


class Late:
    """A mark that is passed at the second look, and what was launched before it is done then."""

    def __init__(self, device: HostGraphs) -> None:
        self.looks, self.device, self.passed = itertools.count(), device, False

    def query(self) -> bool:
        if next(self.looks) > 0:
            self.synchronize()
        return self.passed

    def synchronize(self) -> None:
        self.device.catch_up()
        self.passed = True


class HostGraphs:
    """Records a step by keeping it, and executes what was replayed as late as a GPU may.

    That is when somebody waits for it, or when something comes after it on its stream.
    """

    def __init__(self) -> None:
        self.random = torch.Generator().get_state()
        self.recorded = 0
        self.marks: list[Late] = []
        self.launched: deque[Callable[[], None]] = deque()

    def catch_up(self) -> None:
        while self.launched:
            with self.drawing():
                self.launched.popleft()()

    def work(self) -> Any:
        self.catch_up()
        return nullcontext()

    def join(self) -> None:
        self.catch_up()

    @contextmanager
    def drawing(self) -> Iterator[None]:
        with seeded("anything"):
            torch.set_rng_state(self.random)
            yield
            self.random = torch.get_rng_state()

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        return lambda: self.launched.append(step)

    def mark(self) -> Late:
        self.marks.append(Late(self))
        return self.marks[-1]

    def reseed(self, seed: int, random: Mapping[str, Tensor] | None) -> None:
        self.catch_up()
        known = None if random is None else random.get("host")
        self.random = torch.Generator().manual_seed(seed).get_state() if known is None else known

    def random_state(self) -> dict[str, Tensor]:
        return {"host": self.random}


@dataclass
class Replaying:
    """What executed the steps of each training, and the stacks in which they found seats."""

    made: list[SeatedSteps]
    stacks: Stacks

    @classmethod
    def by(cls, patch: pytest.MonkeyPatch) -> Self:
        """Let the processor execute graphs, all trainings with seats in the same stacks."""
        found = cls([], Stacks(lambda _: HostGraphs()))

        def steps(lane: Lane, execution: Execution, own: Stacks | None, seats: int) -> Steps:
            if execution == "plain":
                return PlainSteps(lane)
            stacks = found.stacks if own is None or own.device is CudaGraphs else own
            found.made.append(SeatedSteps(lane, stacks, seats))
            return found.made[-1]

        patch.setattr("tuner.trainer.steps_of", steps)
        return found

    @property
    def recorded(self) -> int:
        """How often a step was recorded in the stacks that are left."""
        devices = [stack.device for stack in self.stacks.stacks]
        return sum(device.recorded for device in devices if isinstance(device, HostGraphs))
