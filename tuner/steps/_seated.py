"""Steps in a seat of a stack, as CUDA graphs: recorded once for a kind, replayed without the host.

A step reads everything that changes from tensors at fixed places: weights, the images it takes,
what chance decided, the learning rate. What is drawn is drawn ahead for a chunk of steps and
copied in one go; nothing on the host is asked before the chunk is done. Stacks of one seat on
streams of their own fill a device together; the lanes of a larger one go in lockstep.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tuner.lane import Lane
from tuner.seeding import derive_seed, generator
from tuner.stacks import (
    CHUNK,
    Chunk,
    Kind,
    Mark,
    Stack,
    Stacks,
    Uncapturable,
    is_groupable,
    kind_of,
    not_groupable,
)
from tuner.steps._plain import PlainSteps

AHEAD = 2
"""Chunks that are launched before the first of them is done."""

log = logging.getLogger(__name__)


class SeatedSteps:
    """Executes steps in a seat; see ``Steps``.

    What cannot be recorded, such as a loss that reads its own result, is executed plainly.
    """

    def __init__(self, lane: Lane, stacks: Stacks, seats: int = 1) -> None:
        self.lane, self.stacks, self.seats = lane, stacks, seats
        self.plain = PlainSteps(lane)
        self.total = self.plain.total
        self.stack: Stack | None = None
        self.seat = 0
        self.launched: deque[tuple[Mark, int]] = deque()
        self.recordable = True

    def run(
        self, batches: Sequence[Tensor], done: int, random: Mapping[str, Tensor] | None
    ) -> Generator[int | None, None, None]:
        """See ``Steps``; stops are for between chunks."""
        stack = self._seated({len(batch) for batch in batches}) if self.recordable else None
        if stack is None:
            yield from self.plain.run(batches, done, random)
            return
        if stack.seats == 1:
            stack.device.reseed(derive_seed(*self._epoch), random)
        # Where no step is left, what is read at the end is what the stack's stream copied just now.
        self.launched.append((stack.mark(), done))
        try:
            for begin, end in _chunks(batches, done):
                yield from self._launch(stack, batches, begin, end)
                while len(self.launched) > (AHEAD if end < len(batches) else 0):
                    yield from self._landed()
        finally:
            stack.asking.pop(self.seat, None)
            self.settle(done)
        recipe = self.lane.recipe
        if recipe.training.stage((self.lane.epoch + 1) / recipe.epochs) != self.lane.stage:
            # What the lane changes by itself there, steps of its neighbours would write over.
            self.close()

    @property
    def _epoch(self) -> tuple[object, ...]:
        return self.lane.recipe.seed, "epoch", self.lane.epoch

    def _seated(self, sizes: set[int]) -> Stack | None:
        """The stack in which the lane has a seat for the coming epoch; None if there is none."""
        try:
            kind = kind_of(self.lane)
            if self.seats > 1 and is_groupable(self.lane, kind):
                try:
                    return self._sit(kind, self.seats, sizes)
                except Uncapturable as reason:
                    not_groupable(self.lane, kind, str(reason))
            return self._sit(kind, 1, sizes)
        except Uncapturable as reason:
            log.info("a recipe is trained without graphs: %s", reason)
            self.recordable = False
            self.close()
            return None

    def _sit(self, kind: Kind, seats: int, sizes: set[int]) -> Stack:
        """Take a seat unless the lane has it, and begin the epoch there.

        Raises:
            Uncapturable: It has none now.
        """
        if self.stack is not None and self.stack.kind != kind:
            self.close()
        if self.stack is None:
            self.stack, self.seat = self.stacks.take(self.lane, kind, seats)
            self.steps = self._steps_so_far()
        stack = self.stack
        try:
            stack.begin(self.seat, sizes, self.total)
        except Uncapturable:
            self.close()
            self.stacks.drop(stack)
            raise
        return stack

    def _steps_so_far(self) -> int:
        """Steps that the optimizer has taken, where it counts them."""
        states = self.lane.optimizer.state.values()
        return int(next((state["step"] for state in states if "step" in state), 0))

    def _launch(
        self, stack: Stack, batches: Sequence[Tensor], begin: int, end: int
    ) -> Generator[None, None, None]:
        """Draw a chunk ahead, ask for it, and wait until it is launched."""
        lane, indices = self.lane, torch.stack(list(batches[begin:end]))
        rates = [lane.rates(step / len(batches))[0] for step in range(begin, end)]
        numbers = [
            stack.optimizer.numbers(rate, self.steps + step) for step, rate in enumerate(rates)
        ]
        size = lane.data.image_shape[1:]
        drawn = lane.augment.plan(
            end - begin, indices.shape[1], size, lane.generator, lane.progress
        )
        chunk = Chunk(indices, torch.tensor(numbers, dtype=lane.dtype), drawn)
        self.steps += end - begin
        stack.ask(self.seat, chunk)
        while chunk.mark is None:
            yield None
            stack.look(self.seat)
        self.launched.append((chunk.mark, end))

    def _landed(self) -> Iterator[int | None]:
        """Wait for the oldest chunk; the steps done with it."""
        mark, end = self.launched[0]
        while not mark.query():
            yield None
        self.launched.popleft()
        yield end

    def settle(self, done: int) -> int:
        """See ``Steps``."""
        while self.launched:
            mark, done = self.launched.popleft()
            mark.synchronize()
        if self.stack is not None:
            self.total.copy_(self.stack.totals[self.seat])
        return done

    def random_state(self) -> dict[str, Tensor]:
        """State of the lane's own generator, and of one of the processor that nothing drew from."""
        if self.stack is None:
            return self.plain.random_state()
        of_device = self.stack.device.random_state() if self.stack.seats == 1 else {}
        return {"cpu": generator(*self._epoch).get_state(), **of_device}

    def close(self) -> None:
        """See ``Steps``: the lane leaves its seat with tensors of its own."""
        if self.stack is not None:
            stack, self.stack = self.stack, None
            stack.leave(self.seat)


def _chunks(batches: Sequence[Tensor], begin: int) -> Iterator[tuple[int, int]]:
    """Bounds of runs of like batches, at most ``CHUNK`` long."""
    while begin < len(batches):
        end = begin + 1
        while end < min(len(batches), begin + CHUNK) and len(batches[end]) == len(batches[begin]):
            end += 1
        yield begin, end
        begin = end
